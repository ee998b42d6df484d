"""The service as its clients see it: a real process, a real nats-server."""

import asyncio
import json
from typing import Any

import grpc
import nats
import pytest

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 60
ENDS = {pb.STATE_SUCCEEDED, pb.STATE_FAILED, pb.STATE_CANCELLED}


@pytest.fixture(scope="module")
def finished(service: Any, make_spec: Any) -> tuple[pb.Tuning, list[pb.TuningEvent]]:
    """A tuning as it was accepted, and its events."""
    made = service.create(make_spec())
    return made, service.watch(made.name)


def kinds(events: list[pb.TuningEvent]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


async def completed(nats_url: str) -> dict[str, pb.TuningCompleted]:
    """Read what was published with a plain client, by the names of the tunings."""
    client = await nats.connect(nats_url)
    stream = await client.jetstream().stream_info("TUNING_RESULTS")
    subscription = await client.jetstream().subscribe("llmpilot.tuning.v1.completed", ordered_consumer=True)
    found: dict[str, pb.TuningCompleted] = {}
    for _ in range(stream.state.messages):
        message = await subscription.next_msg(timeout=10)
        event = pb.TuningCompleted.FromString(message.data)
        assert (message.headers or {})["Nats-Msg-Id"] == event.event_id
        assert event.tuning.name not in found
        found[event.tuning.name] = event
    await client.close()
    return found


def test_a_tuning_runs_to_its_end(service: Any, finished: Any) -> None:
    made, events = finished
    ended = service.get(made.name)
    assert made.state == pb.STATE_PENDING
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    assert ended.max_batch_weight >= 1024  # one longest request
    assert not ended.measured
    assert ended.create_time.ToNanoseconds() < ended.end_time.ToNanoseconds()
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert events[-1].changed == ended


def test_what_was_left_to_defaults_is_shown(finished: Any) -> None:
    spec = finished[0].spec
    assert (spec.most_requests, spec.most_new_tokens, spec.soak_steps) == (256, 512, 50)
    assert spec.llm.name == "meta-llama/Llama-3.1-8B"
    assert spec.gpu_memory_bytes > spec.reserved_bytes > 0


def test_the_log_has_every_probe_with_its_cases(service: Any, finished: Any) -> None:
    """A probe that passed at the weight that was found; every case of a probe that passed has passed."""
    made, events = finished
    probes = [event.probe_completed for event in events if event.HasField("probe_completed")]
    assert service.get(made.name).probe_count == len(probes) > 0
    assert service.get(made.name).max_batch_weight in {probe.weight for probe in probes if probe.passed}
    for probe in probes:
        cases = [event.case_completed for event in events if event.case_completed.weight == probe.weight]
        assert len(cases) == len(json.loads(probe.probe_json)["probe"]["runs"]) > 0
        assert all(case.passed for case in cases) is probe.passed


def test_a_log_begins_and_ends_with_the_tuning(finished: Any) -> None:
    said = kinds(finished[1])
    assert (said[0], said[-1], said.count("changed")) == ("changed", "changed", 2)
    assert "note" in said


def test_the_report_is_that_of_the_command_line(service: Any, finished: Any) -> None:
    ended = service.get(finished[0].name)
    report = json.loads(ended.report_json)
    assert report["max_batch_weight"] == ended.max_batch_weight
    assert len(report["probes"]) == ended.probe_count
    assert report["llm_name"] == "meta-llama/Llama-3.1-8B"


def test_what_was_found_is_published_once(service: Any, finished: Any, nats_url: str) -> None:
    event = asyncio.run(completed(nats_url))[finished[0].name]
    assert event.tuning == service.get(finished[0].name)
    assert event.event_time == event.tuning.end_time


def test_a_watch_goes_on_where_it_is_told_to(service: Any, replicas: Any, finished: Any) -> None:
    made, events = finished
    assert service.watch(made.name, 1) == events
    assert replicas[1].watch(made.name, len(events) - 2) == events[-3:]
    assert service.watch(made.name, len(events) + 1) == []
    assert service.watch(made.name, 10**9) == []


def test_the_same_again_is_answered_without_a_probe(service: Any, finished: Any, make_spec: Any, nats_url: str) -> None:
    """Under another name of the same LLM, whose name is then in the report; another limit is another tuning."""
    first = service.get(finished[0].name)
    named = llm_pb2.Llm(name="mine", config_json=first.spec.llm.config_json)
    again = service.watch(service.create(make_spec(llm=named)).name)[-1].changed
    assert again.from_cache
    assert (again.max_batch_weight, again.probe_count) == (first.max_batch_weight, 0)
    assert json.loads(again.report_json) == json.loads(first.report_json) | {"llm_name": "mine"}
    assert asyncio.run(completed(nats_url))[again.name].tuning.from_cache
    other = service.watch(service.create(make_spec(most_requests=8)).name)[-1].changed
    assert not other.from_cache
    assert other.probe_count > 0


def test_any_replica_knows_a_tuning_at_once(replicas: Any, make_spec: Any) -> None:
    made = replicas[0].create(make_spec())
    assert replicas[1].get(made.name).name == made.name
    ended = replicas[1].watch(made.name)[-1].changed
    assert replicas[0].get(made.name) == ended


def test_the_same_request_again_returns_its_tuning(replicas: Any, make_spec: Any) -> None:
    made = replicas[0].create(make_spec(), "once")
    assert replicas[1].create(make_spec(), "once").name == made.name
    replicas[0].watch(made.name)
    assert replicas[1].create(make_spec(), "once").state in ENDS


def test_another_request_cannot_take_a_tuning(service: Any, make_spec: Any) -> None:
    service.create(make_spec(), "mine", "taken")
    for request_id, spec, said in (
        ("yours", make_spec(), "choose another tuning_id"),
        ("mine", make_spec(most_requests=9), "choose another request_id"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            service.create(spec, request_id, "taken")
        error = error_from_rpc(caught.value)
        assert isinstance(error, PreconditionError)
        assert said in str(error)


def test_a_server_that_does_not_answer_fails_the_tuning(service: Any, make_spec: Any) -> None:
    """It is not taken for one that ran out of memory."""
    target = pb.ServerTarget(url="http://127.0.0.1:1")
    spec = make_spec(probe=pb.PROBE_KIND_SERVER, server=pb.SERVER_KIND_VLLM, target=target)
    events = service.watch(service.create(spec).name)
    assert events[-1].changed.state == pb.STATE_FAILED
    assert "127.0.0.1:1" in events[-1].changed.error
    assert not events[-1].changed.HasField("max_batch_weight")


def test_tunings_are_listed_by_name_in_pages(service: Any, make_spec: Any) -> None:
    made = {service.create(make_spec(), tuning_id=f"page-{number}").name for number in range(3)}
    names: list[str] = []
    token = ""
    while True:
        page = service.stub.ListTunings(pb.ListTuningsRequest(page_size=2, page_token=token), timeout=TIMEOUT_SECONDS)
        assert len(page.tunings) <= 2
        names += [tuning.name for tuning in page.tunings]
        assert not any(tuning.report_json for tuning in page.tunings)
        if not (token := page.next_page_token):
            break
    assert names == sorted(set(names))
    assert made <= set(names)


def test_a_specification_does_not_outlive_its_tuning(
    service: Any, finished: Any, nats_url: str, eventually: Any
) -> None:
    async def kept() -> int:
        client = await nats.connect(nats_url)
        info = await client.jetstream().stream_info("OBJ_TUNING_SPECS")
        await client.close()
        return int(info.state.messages)

    assert service.get(finished[0].name).state == pb.STATE_SUCCEEDED
    eventually(lambda: asyncio.run(kept()) == 0)


def test_prometheus_sees_the_watches(service: Any) -> None:
    assert "llmpilot_tuning_open_calls" in service.metrics()
