"""The service as its clients see it: a real process, a real nats-server, the real simulator under load."""

import asyncio
import json
import uuid
from typing import Any

import grpc
import nats
import pytest

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.measurement.v1 import measurement_pb2
from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 60
ENDS = {pb.STATE_SUCCEEDED, pb.STATE_FAILED, pb.STATE_CANCELLED}


def create(service: Any, spec: pb.LoadTestSpec, request_id: str = "", load_test_id: str = "") -> pb.LoadTest:
    request = pb.CreateLoadTestRequest(spec=spec, request_id=request_id or uuid.uuid4().hex, load_test_id=load_test_id)
    answer: pb.CreateLoadTestResponse = service.stub.CreateLoadTest(request, timeout=TIMEOUT_SECONDS)
    return answer.load_test


def get(service: Any, name: str) -> pb.LoadTest:
    answer = service.stub.GetLoadTest(pb.GetLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    load_test: pb.LoadTest = answer.load_test
    return load_test


def cancel(service: Any, name: str) -> pb.LoadTest:
    answer = service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    load_test: pb.LoadTest = answer.load_test
    return load_test


def kinds(events: list[pb.LoadTestEvent]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


@pytest.fixture(scope="module")
def finished(service: Any, make_spec: Any) -> tuple[pb.LoadTest, list[pb.LoadTestEvent]]:
    """A load test of two stages that has ended, with keys in its specification, and its events."""
    spec = make_spec(1, 2)
    spec.target.api_key = "sk-secret-1"
    spec.target.headers.add(name="x-team", value="secret-2")
    spec.llm.name, spec.gpu_profile = "llama-3.1-8b", "1xA100-40GB"
    made = create(service, spec)
    assert made.state == pb.STATE_PENDING
    return made, service.watch(made.name)


def test_a_load_test_runs_to_its_end(service: Any, finished: Any) -> None:
    made, events = finished
    ended = get(service, made.name)
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    assert [result.stage_index for result in ended.results] == [0, 1]
    assert [result.attempt for result in ended.results] == [1, 1]
    assert ended.simulated
    assert ended.served_model.endswith("-simulated")
    assert ended.create_time.ToNanoseconds() < ended.end_time.ToNanoseconds()
    assert [event.index for event in events] == list(range(len(events)))
    assert events[-1].changed.state == pb.STATE_SUCCEEDED


def test_the_log_has_every_request_of_every_stage(finished: Any) -> None:
    """A stage's metrics are of records that are in the log: those sent in its window."""
    _, events = finished
    for result in (event.stage_completed for event in events if event.WhichOneof("event") == "stage_completed"):
        frames = [event.records for event in events if event.WhichOneof("event") == "records"]
        batches = [unpack_records(frame.columns) for frame in frames if frame.stage_index == result.stage_index]
        start_nanos = result.start_time.ToNanoseconds() + round(result.stage.warm_up_seconds * 1e9)
        end_nanos = start_nanos + round(result.stage.measure_seconds * 1e9)
        sent = [nanos for batch in batches for nanos in batch.send_nanos.tolist() if start_nanos <= nanos < end_nanos]
        metrics = json.loads(result.metrics_json)
        assert metrics["request_count"] == len(sent) > 0
        assert metrics["ttft"]["median_ms"] >= 20


def test_the_order_of_events_is_that_of_a_run(finished: Any) -> None:
    _, events = finished
    said = [kind for kind in kinds(events) if kind not in {"live", "records", "note", "measurement_published"}]
    stages = ["stage_started", "stage_completed"] * 2
    assert said == ["changed", "changed", *stages, "changed"]  # begins; knows its target; ends
    assert "live" in kinds(events)


def test_nothing_shows_a_key(service: Any, finished: Any, nats_url: str) -> None:
    made, events = finished
    shown = [made, get(service, made.name), *events]
    assert get(service, made.name).spec.target.headers[0].name == "x-team"

    async def everything_kept() -> list[bytes]:
        client = await nats.connect(nats_url)
        kept = []
        for stream in await client.jetstream().streams_info():
            subscription = await client.jetstream().subscribe(">", stream=stream.config.name, ordered_consumer=True)
            kept += [(await subscription.next_msg(timeout=10)).data for _ in range(stream.state.messages)]
            await subscription.unsubscribe()
        await client.close()
        return kept

    found = [message.SerializeToString() for message in shown] + asyncio.run(everything_kept())
    assert not [text for text in found if b"secret" in text]


def test_a_watch_goes_on_where_it_is_told_to(service: Any, replicas: Any, finished: Any) -> None:
    made, events = finished
    assert replicas[1].watch(made.name, len(events) - 3) == events[-3:]
    assert service.watch(made.name, len(events)) == []
    assert service.watch(made.name, 10**9) == []


def test_any_replica_knows_a_load_test_at_once(replicas: Any, make_spec: Any) -> None:
    made = create(replicas[0], make_spec(1, measure_seconds=60))
    assert get(replicas[1], made.name).name == made.name
    cancel(replicas[1], made.name)
    events = replicas[1].watch(made.name)
    assert events[-1].changed.state == pb.STATE_CANCELLED
    assert get(replicas[0], made.name).state == pb.STATE_CANCELLED


def test_cancelling_keeps_what_was_recorded(service: Any, make_spec: Any) -> None:
    made = create(service, make_spec(2, measure_seconds=60))
    request = pb.WatchLoadTestRequest(name=made.name)
    watched = []
    for answer in service.stub.WatchLoadTest(request, timeout=TIMEOUT_SECONDS):
        watched.append(answer.event)
        if answer.event.WhichOneof("event") == "records" and watched.count(answer.event) == 1:
            cancel(service, made.name)
    assert watched[-1].changed.state == pb.STATE_CANCELLED
    assert get(service, made.name).results == []
    ended = cancel(service, made.name)
    assert ended.state == pb.STATE_CANCELLED
    assert watched == service.watch(made.name)


def test_the_same_request_again_returns_its_load_test(replicas: Any, make_spec: Any) -> None:
    spec = make_spec(1, url="http://127.0.0.1:1")
    made = create(replicas[0], spec, "once")
    assert create(replicas[1], spec, "once").name == made.name
    replicas[0].watch(made.name)
    assert create(replicas[1], spec, "once").state in ENDS


def test_another_request_cannot_take_a_load_test(service: Any, make_spec: Any) -> None:
    spec = make_spec(1, url="http://127.0.0.1:1")
    create(service, spec, "mine", "taken")
    for request_id, changed, said in (
        ("yours", spec, "choose another load_test_id"),
        ("mine", make_spec(2, url="http://127.0.0.1:1"), "choose another request_id"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            create(service, changed, request_id, "taken")
        error = error_from_rpc(caught.value)
        assert isinstance(error, PreconditionError)
        assert said in str(error)


def test_a_target_that_does_not_answer_fails_the_load_test(service: Any, make_spec: Any) -> None:
    made = create(service, make_spec(1, url="http://127.0.0.1:1"))
    events = service.watch(made.name)
    assert events[-1].changed.state == pb.STATE_FAILED
    assert "127.0.0.1:1" in events[-1].changed.error
    assert get(service, made.name).error == events[-1].changed.error


def test_load_tests_are_listed_by_name_in_pages(service: Any, make_spec: Any) -> None:
    spec = make_spec(1, url="http://127.0.0.1:1")
    made = {create(service, spec, load_test_id=f"page-{number}").name for number in range(3)}
    names: list[str] = []
    token = ""
    while True:
        page = service.stub.ListLoadTests(
            pb.ListLoadTestsRequest(page_size=2, page_token=token), timeout=TIMEOUT_SECONDS
        )
        assert len(page.load_tests) <= 2
        names += [load_test.name for load_test in page.load_tests]
        assert not any(load_test.results for load_test in page.load_tests)
        if not (token := page.next_page_token):
            break
    assert names == sorted(set(names))
    assert made <= set(names)


def test_a_valid_stage_is_published_as_a_simulated_measurement(finished: Any, nats_url: str) -> None:
    """The event says what the stage's metrics say; an invalid stage has a note instead."""
    _, events = finished
    completed = [event.stage_completed for event in events if event.HasField("stage_completed")]
    results = {result.stage_index: result for result in completed}
    sent = [event.measurement_published for event in events if event.HasField("measurement_published")]
    published = {measurement.stage_index: measurement.event_id for measurement in sent}
    valid = {index for index, result in results.items() if result.verdict.is_valid}
    notes = [event.note for event in events if event.WhichOneof("event") == "note"]
    assert set(published) == valid
    assert sum("no measurement was published" in note for note in notes) == len(results) - len(valid)
    found = asyncio.run(measurements(nats_url))
    assert [found[event_id].measurement.users_count for _, event_id in sorted(published.items())] == [
        results[index].stage.load.user_steps[0].users_count for index in sorted(valid)
    ]
    for index, event_id in published.items():
        measurement, metrics = found[event_id].measurement, json.loads(results[index].metrics_json)
        assert (measurement.llm, measurement.gpu_profile) == ("llama-3.1-8b", "1xA100-40GB")
        assert measurement.origin == measurement_pb2.ORIGIN_SIMULATED
        assert measurement.ttft.median_ms == metrics["ttft"]["median_ms"]
        assert measurement.itl.p99_ms == metrics["itl"]["p99_ms"]
        assert measurement.request_count == metrics["request_count"]
        assert found[event_id].llm_spec.layer_count == 32


async def measurements(nats_url: str) -> dict[str, measurement_pb2.MeasurementRecorded]:
    client = await nats.connect(nats_url)
    stream = await client.jetstream().stream_info("MEASUREMENTS")
    subscription = await client.jetstream().subscribe("llmpilot.measurement.v1.recorded", ordered_consumer=True)
    found: dict[str, measurement_pb2.MeasurementRecorded] = {}
    for _ in range(stream.state.messages):
        event = measurement_pb2.MeasurementRecorded.FromString((await subscription.next_msg(timeout=10)).data)
        assert event.event_id not in found
        found[event.event_id] = event
    await client.close()
    return found


def test_prometheus_sees_a_load_test_that_runs(service: Any, replicas: Any, make_spec: Any, eventually: Any) -> None:
    made = create(service, make_spec(2, measure_seconds=60))
    load_test_id = made.name.removeprefix("loadTests/")
    label = f'load_test="{load_test_id}"'

    def shown() -> str:
        return "".join(replica.metrics() for replica in replicas)

    eventually(lambda: f"llmpilot_loadtest_users{{{label}}} 2.0" in shown())
    eventually(lambda: f'llmpilot_loadtest_requests_total{{{label},status="ok"}}' in shown())
    cancel(service, made.name)
    service.watch(made.name)
    eventually(lambda: f"llmpilot_loadtest_users{{{label}}} 0.0" in shown())
