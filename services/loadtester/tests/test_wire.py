"""Between protobuf and domain: what is shown, what is kept, and that nothing changes on the way."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.workload.v1 import workload_pb2
from llmpilot_contracts.errors import Violation
from llmpilot_contracts.job import State
from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.events import LiveMetrics, Noted, RecordsCame, StageBegan, StageMeasured
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent, MeasurementPublished
from llmpilot_loadtester.domain.results import (
    ErrorCount,
    Interval,
    LatencySummary,
    StageMetrics,
    StageResult,
    Verdict,
)
from llmpilot_loadtester.domain.spec import (
    LARGEST_STAGE_COUNT,
    Load,
    LoadKind,
    LoadTestSpec,
    PromptRequests,
    Protocol,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
)
from llmpilot_loadtester.measuring import event_id_of, is_measurement
from llmpilot_loadtester.wire import LARGEST_SHOWN_SPEC_BYTES, read_kept_spec, read_load_test, write_load_test
from llmpilot_loadtester.wire_events import is_end, read_event, read_snapshot, write_event, write_snapshot
from llmpilot_loadtester.wire_llm import write_measurement
from llmpilot_loadtester.wire_spec import read_spec, write_spec

SECRET_TARGET = Target(
    url="https://user:hunter2@host:8443/prefix?token=hunter2",
    protocol=Protocol.OPENAI_CHAT,
    api_key="hunter2",
    headers=(("x-team", "hunter2"),),
    ca_certificates_pem="hunter2",
    insecure=True,
)
STAGE = Stage(
    load=Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=4),)),
    warm_up_seconds=1.0,
    measure_seconds=2.0,
)
UP = UserStep(at_seconds=0, users_count=1)
SPEC = LoadTestSpec(
    target=Target(url="http://host:8000"),
    requests=SyntheticRequests(input_tokens=10, output_tokens=20, seed=3),
    stages=(STAGE,),
    service_level=ServiceLevel(ttft_ms=200.0, itl_ms=50.0),
    llm_name="llama-3.1-8b",
    gpu_profile="1xA100-40GB",
)
SOME = LatencySummary(count=3, mean_ms=1.5, median_ms=1.0, p90_ms=2.0, p95_ms=2.5, p99_ms=3.0)
NONE = LatencySummary()
METRICS = StageMetrics(
    window_seconds=2.0,
    request_count=10,
    ok_count=7,
    errors=(
        ErrorCount(status="out_of_memory", count=2, example="CUDA"),
        ErrorCount(status="timeout", count=1, example=""),
    ),
    ttft=replace(SOME, mean_interval=Interval(low=1.0, high=2.0)),
    ttft_from_schedule=SOME,
    nttft=NONE,
    itl=SOME,
    chunk_gap=SOME,
    tpot=SOME,
    end_to_end=SOME,
    end_to_end_from_schedule=SOME,
    normalized_latency=SOME,
    send_lateness=SOME,
    first_byte=SOME,
    requests_per_second=3.5,
    output_tokens_per_second=70.25,
    input_tokens_per_second=None,
    sent_per_second=5.0,
    send_gap_cv=None,
    goodput_requests_per_second=3.0,
    good_share=0.6,
    input_tokens_mean=None,
    output_tokens_mean=20.0,
    concurrency_mean=3.9,
    token_count_sources=("server",),
    stamp_sources=("kernel",),
    steady=None,
)
RESULT = StageResult(
    stage_index=1,
    attempt=2,
    stage=STAGE,
    start_unix_nanos=1_795_276_848_282_018_149,
    metrics=METRICS,
    verdict=Verdict(is_valid=True, notes=("a note",)),
    service_level=ServiceLevel(ttft_ms=200.0, share=0.9),
)
LOAD_TEST = LoadTest(
    id="lt-1",
    spec=SPEC,
    request_id="request",
    create_time=datetime(2026, 11, 21, 15, 0, 0, 250, tzinfo=UTC),
    state=State.FAILED,
    error="the server is away",
    end_time=datetime(2026, 11, 21, 16, 0, tzinfo=UTC),
    found_load=0.0,
    simulated=True,
    served_model="m",
)


@pytest.mark.parametrize(
    "event",
    [
        Changed(load_test=LOAD_TEST),
        StageBegan(stage_index=1, attempt=2, stage=STAGE, start_unix_nanos=1_795_276_848_282_018_149, stage_count=3),
        RecordsCame(stage_index=1, attempt=2, request_count=3, columns=b"\x00\xff"),
        LiveMetrics(
            stage_index=1,
            elapsed_seconds=1.5,
            phase="measuring",
            users_count=4,
            in_flight_count=4,
            sent_count=10,
            ok_count=6,
            error_count=0,
            tokens_per_second=50.5,
            requests_per_second=3.0,
            ttft_median_ms=None,
            itl_median_ms=0.0,
            worker_cpu=0.25,
        ),
        StageMeasured(result=RESULT),
        Noted(text="a note"),
        MeasurementPublished(stage_index=1, event_id="id"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_comes_back_as_it_was(event: LogEvent) -> None:
    wire = write_event(event, index=7, unix_nanos=1_795_276_848_282_018_149)
    sent = pb.LoadTestEvent.FromString(wire.SerializeToString())
    assert read_event(sent) == event
    assert (sent.index, sent.event_time.ToNanoseconds()) == (7, 1_795_276_848_282_018_149)


def test_what_nobody_reported_is_null_and_not_zero() -> None:
    wire = write_event(StageMeasured(result=RESULT), index=0, unix_nanos=0)
    assert '"input_tokens_per_second":null' in wire.stage_completed.metrics_json


def test_an_event_of_a_newer_version_is_passed_over() -> None:
    assert read_event(pb.LoadTestEvent(index=1)) is None


@pytest.mark.parametrize(
    ("state", "ends"),
    [("PENDING", False), ("RUNNING", False), ("SUCCEEDED", True), ("FAILED", True), ("CANCELLED", True)],
)
def test_a_log_ends_with_a_final_state(state: str, ends: bool) -> None:
    changed = pb.LoadTest(state=pb.State.Value(f"STATE_{state}"))
    assert is_end(pb.LoadTestEvent(changed=changed)) is ends


def test_a_snapshot_comes_back_as_it_was() -> None:
    shared = replace(LOAD_TEST, results=(RESULT,), owner="me", cancel_requested=True, spec_digest="digest")
    assert read_snapshot(write_snapshot(shared)) == shared
    assert read_load_test(write_load_test(shared)) == replace(shared, owner="", cancel_requested=False, spec_digest="")


def test_a_snapshot_of_as_many_stages_as_there_may_be_fits_into_a_message_of_nats() -> None:
    """Every number at its longest, every kind of error with a long text, and the largest spec: 1 MiB is the limit."""
    longest = -1.2345678901234567e-101
    values: dict[str, Any] = {each.name: longest for each in fields(LatencySummary) if each.name.endswith("_ms")}
    for each in fields(LatencySummary):
        if each.name.endswith("_interval"):
            values[each.name] = Interval(low=longest, high=longest)
    latency = LatencySummary(count=10**12, **values)
    metrics: dict[str, Any] = {
        each.name: latency for each in fields(StageMetrics) if isinstance(getattr(METRICS, each.name), LatencySummary)
    }
    errors = tuple(ErrorCount(status=status, count=10**9, example="\u00e9" * 300) for status in STATUSES)
    result = replace(
        RESULT,
        metrics=replace(METRICS, errors=errors, **metrics),
        verdict=Verdict(is_valid=False, reasons=("w" * 1_000,) * 20, notes=("n" * 300,) * 5),
    )
    steps = tuple(UserStep(at_seconds=1.1 * number, users_count=100_000) for number in range(19))
    stages = (replace(STAGE, load=replace(STAGE.load, user_steps=steps)),) * LARGEST_STAGE_COUNT
    spec = replace(SPEC, stages=stages)
    assert LARGEST_SHOWN_SPEC_BYTES * 0.9 < write_spec(spec).ByteSize() < LARGEST_SHOWN_SPEC_BYTES
    whole = replace(
        LOAD_TEST, spec=spec, error="e" * 4_000, results=(replace(result, stage=stages[0]),) * LARGEST_STAGE_COUNT
    )
    snapshot = write_snapshot(whole)
    assert snapshot.ByteSize() < 1024 * 1024 - 1024
    back = read_snapshot(snapshot)
    assert [result.metrics.ttft for result in back.results] == [latency] * LARGEST_STAGE_COUNT
    assert [error.count for error in back.results[-1].metrics.errors] == [10**9] * len(STATUSES)
    assert not back.results[-1].verdict.is_valid


def test_a_shown_spec_has_no_secret_and_nothing_large() -> None:
    requests = PromptRequests(jsonl=b'{"prompt": "hunter2"}', output_tokens=5)
    spec = replace(SPEC, target=SECRET_TARGET, requests=requests, reply_tokenizer_json=b"hunter2")
    shown = write_spec(spec)
    assert b"hunter2" not in shown.SerializeToString()
    assert shown.target.url == "https://host:8443/prefix"
    assert [header.name for header in shown.target.headers] == ["x-team"]
    assert shown.WhichOneof("requests") == "prompts"


def test_zero_on_the_wire_stands_for_the_default() -> None:
    wire = pb.LoadTestSpec(
        target=pb.Target(url="http://host:1", protocol=pb.PROTOCOL_TGI),
        workload=pb.WorkloadRequests(sampling=workload_pb2.Sampling(workload_model="workloadModels/conversation")),
        search=pb.LoadSearch(kind=pb.LOAD_KIND_USERS, low=1, high=8, measure_seconds=1),
        service_level=pb.ServiceLevel(ttft_ms=1),
    )
    violations: list[Violation] = []
    spec = read_spec(wire, violations)
    assert spec is not None
    assert violations == []
    assert (spec.target.request_timeout_seconds, spec.target.connect_timeout_seconds) == (600, 10)
    assert spec.search is not None
    assert (spec.search.precision, spec.search.confidence) == (0.05, 0.95)
    assert spec.service_level == ServiceLevel(ttft_ms=1, share=0.95)


def test_a_kept_spec_is_whole() -> None:
    wire = pb.LoadTestSpec(
        target=pb.Target(url="http://host:1", protocol=pb.PROTOCOL_TGI, api_key="sk-1"),
        prompts=pb.PromptRequests(jsonl=b'{"prompt": "p"}\n'),
    )
    spec, write = read_kept_spec(wire.SerializeToString())
    assert spec.target.api_key == "sk-1"
    assert isinstance(spec.requests, PromptRequests)
    assert spec.requests.jsonl == b'{"prompt": "p"}\n'
    assert write is None  # no LLM is named


def test_a_measurement_says_what_the_stage_measured() -> None:
    wire = pb.LoadTestSpec(llm=llm_pb2.Llm(name="llama-3.1-8b"), gpu_profile="1xA100-40GB")
    event = write_measurement(wire, RESULT, "the id", False)
    made = event.measurement
    assert (event.event_id, made.users_count) == ("the id", 4)
    assert (made.llm, made.gpu_profile) == ("llama-3.1-8b", "1xA100-40GB")
    assert (made.request_count, made.error_count, made.oom_count) == (10, 3, 2)
    assert (made.test_seconds, made.throughput_tokens_per_second) == (2.0, 70.25)
    assert (made.ttft.median_ms, made.itl.p99_ms) == (1.0, 3.0)
    assert not made.nttft.HasField("median_ms")
    assert event.llm_spec.layer_count == 32  # config.json of Llama 3.1 8B


def test_the_recommender_takes_the_measurement() -> None:
    """By its own reader and the dataset's schema, which the services share through nothing but NATS."""
    dataset_file = pytest.importorskip("llmpilot_recommender.dataset_file")
    wire_measurement = pytest.importorskip("llmpilot_recommender.wire_measurement")
    wire = pb.LoadTestSpec(llm=llm_pb2.Llm(name="llama-3.1-8b"), gpu_profile="1xA100-40GB")
    measurement, spec = wire_measurement.read_measurement_recorded(write_measurement(wire, RESULT, "id", True))
    assert list(dataset_file.violations_of(measurement)) == []
    assert measurement.origin == "simulated"
    assert spec.violations() == ()


def test_the_event_id_of_a_measurement_is_that_of_its_load_test_and_stage() -> None:
    ids = {event_id_of("a", 0), event_id_of("a", 1), event_id_of("b", 0)}
    assert len(ids) == 3
    assert event_id_of("a", 0) in ids


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (STAGE.load, True),
        (Load(kind=LoadKind.USERS, user_steps=(UP, UserStep(at_seconds=1, users_count=2))), False),
        (Load(kind=LoadKind.POISSON, rate_per_second=3.0), False),
    ],
    ids=["constant", "steps", "rate"],
)
def test_only_a_constant_number_of_users_makes_a_measurement(load: Any, expected: bool) -> None:
    assert is_measurement(replace(RESULT, stage=replace(STAGE, load=load))) is expected
