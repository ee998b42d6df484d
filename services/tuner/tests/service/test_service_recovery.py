"""Processes that die, are stopped or lose NATS: a tuning goes on, and no probe is made twice."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 60


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server that no other test uses."""
    with start_nats_server(tmp_path / "nats") as server:
        yield server


def is_probe(event: pb.TuningEvent) -> bool:
    return bool(event.HasField("probe_completed"))


def weights(events: list[pb.TuningEvent]) -> list[int]:
    return [event.probe_completed.weight for event in events if is_probe(event)]


def test_a_tuning_goes_on_from_its_probes_where_a_killed_service_left_it(
    tmp_path: Path, start_service: Any, make_slow_spec: Any
) -> None:
    """While NATS is restarted too: no probe is made again, no event is lost, and the report has all probes."""
    server = start_nats_server(tmp_path / "nats")
    port = int(server.url.rpartition(":")[2])
    try:
        with start_service(LLMPILOT_NATS_URL=server.url) as first:
            name = first.create(make_slow_spec()).name
            before = first.watch_until(name, is_probe)
            first.process.kill()
            first.process.wait(TIMEOUT_SECONDS)
        with start_service(LLMPILOT_NATS_URL=server.url) as second:
            watched: list[pb.TuningEvent] = []
            watching = threading.Thread(target=lambda: watched.extend(second.watch(name)))
            watching.start()
            second.watch_until(name, lambda event: "going on from" in event.note)
            server.kill()
            server = start_nats_server(tmp_path / "nats", port=port)
            watching.join(TIMEOUT_SECONDS)
            ended = second.get(name)
            assert second.watch(name) == watched
    finally:
        server.stop()
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    assert ended.measured
    assert watched[: len(before)] == before
    assert [event.index for event in watched] == list(range(1, len(watched) + 1))
    made = weights(watched)
    assert len(set(made)) == len(made) == ended.probe_count
    assert [probe["weight"] for probe in json.loads(ended.report_json)["probes"]] == made


def test_cancelling_ends_the_probe_and_the_next_tuning_begins(
    own_nats: NatsServer, start_service: Any, make_slow_spec: Any, make_spec: Any
) -> None:
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        slow = service.create(make_slow_spec()).name
        service.watch_until(slow, lambda event: event.WhichOneof("event") == "changed")
        waiting, unwanted = (service.create(make_spec()).name for _ in range(2))
        service.cancel(unwanted)
        assert service.watch(unwanted)[-1].changed.state == pb.STATE_CANCELLED  # while the first one runs
        assert service.get(waiting).state == pb.STATE_PENDING
        service.cancel(slow)
        assert service.watch(slow)[-1].changed.state == pb.STATE_CANCELLED
        assert service.cancel(slow).state == pb.STATE_CANCELLED
        assert service.watch(waiting)[-1].changed.state == pb.STATE_SUCCEEDED


def test_a_stopping_service_ends_its_watches_and_leaves_the_tuning_to_the_next_start(
    own_nats: NatsServer, start_service: Any, make_slow_spec: Any
) -> None:
    """Who comes next need not wait for the silence of who was stopped."""
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        name = service.create(make_slow_spec()).name
        call = service.stub.WatchTuning(pb.WatchTuningRequest(name=name), timeout=TIMEOUT_SECONDS)
        next(call)
        service.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        # Where the machine is busy it is cut off before it hears why, as any reader that is slow.
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
    with start_service(LLMPILOT_NATS_URL=own_nats.url, LLMPILOT_TAKE_OVER_SECONDS="3600") as service:
        changes = service.watch_until(name, lambda event: event.index > 1 and event.HasField("changed"))
        assert changes[-1].changed.state == pb.STATE_RUNNING
        service.cancel(name)
        assert service.watch(name)[-1].changed.state == pb.STATE_CANCELLED


def test_without_nats_a_client_is_told_to_try_again(start_service: Any, own_nats: NatsServer, make_spec: Any) -> None:
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        own_nats.kill()
        with pytest.raises(grpc.RpcError) as caught:
            service.create(make_spec())
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
