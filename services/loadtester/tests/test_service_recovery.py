"""Processes that die, are stopped or lose NATS: a load test goes on, and nothing that was measured is lost."""

import asyncio
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import nats
import pytest

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 60


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server that no other test uses."""
    with start_nats_server(tmp_path / "nats") as server:
        yield server


def create(service: Any, spec: pb.LoadTestSpec, request_id: str = "") -> str:
    request = pb.CreateLoadTestRequest(spec=spec, request_id=request_id or uuid.uuid4().hex)
    name: str = service.stub.CreateLoadTest(request, timeout=TIMEOUT_SECONDS).load_test.name
    return name


def get(service: Any, name: str) -> pb.LoadTest:
    answer = service.stub.GetLoadTest(pb.GetLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    load_test: pb.LoadTest = answer.load_test
    return load_test


def watch_until(service: Any, name: str, wanted: Callable[[pb.LoadTestEvent], bool]) -> list[pb.LoadTestEvent]:
    """Watch as far as an event, then go away."""
    call = service.stub.WatchLoadTest(pb.WatchLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    events = []
    for answer in call:
        events.append(answer.event)
        if wanted(answer.event):
            call.cancel()
            return events
    raise AssertionError("it ended before")


def began(stage_index: int) -> Callable[[pb.LoadTestEvent], bool]:
    return lambda event: event.HasField("stage_started") and event.stage_started.stage_index == stage_index


def records_of(stage_index: int, attempt: int = 1) -> Callable[[pb.LoadTestEvent], bool]:
    wanted = (stage_index, attempt)
    return lambda event: event.HasField("records") and (event.records.stage_index, event.records.attempt) == wanted


def stages_begun(events: list[pb.LoadTestEvent]) -> list[tuple[int, int]]:
    started = [event.stage_started for event in events if event.HasField("stage_started")]
    return [(stage.stage_index, stage.attempt) for stage in started]


def test_a_load_test_goes_on_where_a_killed_service_and_then_a_stopped_one_left_it(
    own_nats: NatsServer, start_service: Any, make_spec: Any
) -> None:
    """Both in stage two; the last one need not wait for the silence of who was stopped."""
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as first:
        name = create(first, make_spec(1, 2))
        before = watch_until(first, name, records_of(1))
        first.process.kill()
        first.process.wait(TIMEOUT_SECONDS)
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as second:
        watch_until(second, name, records_of(1, attempt=2))
    with start_service(LLMPILOT_NATS_URL=own_nats.url, LLMPILOT_TAKE_OVER_SECONDS="3600") as third:
        events = third.watch(name)
        ended = get(third, name)
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    assert events[: len(before)] == before
    assert [event.index for event in events] == list(range(len(events)))
    assert stages_begun(events) == [(0, 1), (1, 1), (1, 2), (1, 3)]
    assert [(result.stage_index, result.attempt) for result in ended.results] == [(0, 1), (1, 3)]
    first_result = next(event.stage_completed for event in before if event.HasField("stage_completed"))
    assert ended.results[0] == first_result


def test_a_replica_takes_over_from_one_that_was_killed(
    own_nats: NatsServer, start_service: Any, make_spec: Any
) -> None:
    variables = {"LLMPILOT_NATS_URL": own_nats.url}
    with start_service(**variables) as first, start_service(**variables) as second:
        name = create(first, make_spec(1))
        watch_until(first, name, began(0))
        running, other = sorted((first, second), key=lambda each: "job begins" not in each.log.read_text())
        running.process.kill()
        assert stages_begun(other.watch(name)) == [(0, 1), (0, 2)]
        assert get(other, name).state == pb.STATE_SUCCEEDED


def test_nats_restarted_in_the_middle_loses_nothing(tmp_path: Path, start_service: Any, make_spec: Any) -> None:
    """Killed in stage one and away for a second; the load goes on meanwhile, as its first attempt."""
    server = start_nats_server(tmp_path / "nats")
    port = int(server.url.rpartition(":")[2])
    try:
        with start_service(LLMPILOT_NATS_URL=server.url) as service:
            name = create(service, make_spec(1, 2, measure_seconds=1))
            watched: list[pb.LoadTestEvent] = []
            watching = threading.Thread(target=lambda: watched.extend(service.watch(name)))
            watching.start()
            watch_until(service, name, records_of(0))
            server.kill()
            server = start_nats_server(tmp_path / "nats", port=port)
            watching.join(TIMEOUT_SECONDS)
            ended = get(service, name)
            assert ended.state == pb.STATE_SUCCEEDED, ended.error
            assert [event.index for event in watched] == list(range(len(watched)))
            assert stages_begun(watched) == [(0, 1), (1, 1)]
            assert service.watch(name) == watched
    finally:
        server.stop()


def test_load_tests_wait_for_each_other(own_nats: NatsServer, start_service: Any, make_spec: Any) -> None:
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        first = create(service, make_spec(1, measure_seconds=60))
        watch_until(service, first, began(0))
        second, third = (create(service, make_spec(1)) for _ in range(2))
        assert get(service, second).state == pb.STATE_PENDING
        service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=third), timeout=TIMEOUT_SECONDS)
        assert service.watch(third)[-1].changed.state == pb.STATE_CANCELLED  # while the first one runs
        assert get(service, second).state == pb.STATE_PENDING
        service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=first), timeout=TIMEOUT_SECONDS)
        assert service.watch(second)[-1].changed.state == pb.STATE_SUCCEEDED


def test_a_stopping_service_ends_its_watches(own_nats: NatsServer, start_service: Any, make_spec: Any) -> None:
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        name = create(service, make_spec(1, measure_seconds=60))
        watch_until(service, name, began(0))
        call = service.stub.WatchLoadTest(pb.WatchLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
        next(call)
        service.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        # Where the machine is busy it is cut off before it hears why, as any reader that is slow.
        assert isinstance(error_from_rpc(caught.value), UnavailableError)


def test_watches_whose_clients_are_gone_are_closed(service: Any, make_spec: Any, eventually: Any) -> None:
    name = create(service, make_spec(1, measure_seconds=60))
    calls = [service.stub.WatchLoadTest(pb.WatchLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS) for _ in range(20)]
    assert {next(call).event.index for call in calls} == {0}
    open_calls = 'llmpilot_loadtest_open_calls{method="WatchLoadTest"}'
    eventually(lambda: f"{open_calls} 20.0" in service.metrics())
    for call in calls:
        call.cancel()
    eventually(lambda: f"{open_calls} 0.0" in service.metrics())
    service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)


def test_keys_do_not_outlive_a_load_test(nats_url: str, replicas: Any, make_spec: Any, eventually: Any) -> None:
    spec = make_spec(1, measure_seconds=60)
    spec.target.api_key = "sk-secret"

    async def kept() -> int:
        client = await nats.connect(nats_url)
        info = await client.jetstream().stream_info("OBJ_LOAD_TEST_SPECS")
        await client.close()
        return int(info.state.messages)

    name = create(replicas[0], spec)
    assert asyncio.run(kept()) > 0
    replicas[0].stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    replicas[0].watch(name)
    eventually(lambda: asyncio.run(kept()) == 0)
    assert not [replica for replica in replicas if "sk-secret" in replica.log.read_text()]


def test_without_nats_a_client_is_told_to_try_again(start_service: Any, own_nats: NatsServer, make_spec: Any) -> None:
    with start_service(LLMPILOT_NATS_URL=own_nats.url) as service:
        own_nats.kill()
        with pytest.raises(grpc.RpcError) as caught:
            create(service, make_spec(1))
        assert isinstance(error_from_rpc(caught.value), UnavailableError)


def test_the_workload_generator_of_this_machine_is_found(
    own_nats: NatsServer, start_service: Any, make_spec: Any, tmp_path: Path, eventually: Any
) -> None:
    """A real one, by the file that it writes while it serves."""
    address_file = tmp_path / "workload-generator.addresses.json"
    variables = {"LLMPILOT_LISTEN": "127.0.0.1:0", "LLMPILOT_NATS_URL": own_nats.url}
    environment = os.environ | variables | {"LLMPILOT_ADDRESS_FILE": str(address_file)}
    command = [sys.executable, "-m", "llmpilot_workload_generator"]
    spec = make_spec(1)
    spec.workload.sampling.workload_model = "workloadModels/conversation"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as generator:
        try:
            eventually(address_file.exists)
            variables = {"LLMPILOT_NATS_URL": own_nats.url, "LLMPILOT_ADDRESS_FOLDER": str(tmp_path)}
            with start_service(**variables) as service:
                ended = service.watch(create(service, spec))[-1].changed
        finally:
            generator.terminate()
    assert ended.state == pb.STATE_SUCCEEDED, ended.error


def test_without_a_workload_generator_a_load_test_says_what_to_set(service: Any, make_spec: Any) -> None:
    spec = make_spec(1)
    spec.workload.sampling.workload_model = "workloadModels/conversation"
    ended = service.watch(create(service, spec))[-1].changed
    assert ended.state == pb.STATE_FAILED
    assert "LLMPILOT_WORKLOAD_GENERATOR_ADDRESS" in ended.error
