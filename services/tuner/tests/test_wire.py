"""Between protobuf and domain: nothing changes on the way, and everything that is wrong is said."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, PilotError, PreconditionError, Violation
from llmpilot_contracts.job import State
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.events import CaseRan, Note
from llmpilot_tuner.domain.probe_json import KeptProbe, probe_json, read_probe
from llmpilot_tuner.domain.probing import CaseRun, Outcome, Probe, ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec
from llmpilot_tuner.domain.tuning import Changed, LogEvent, Tuning
from llmpilot_tuner.wire import read_create_request, read_kept_spec, read_tuning, write_tuning
from llmpilot_tuner.wire_events import is_end, read_event, read_snapshot, write_event, write_snapshot
from llmpilot_tuner.wire_spec import LARGEST_CONFIG_BYTES, read_spec, write_spec

GIB = 2**30
UNKNOWN: Any = 99
"""What a newer version may send for a kind or a state."""
SPEC = TuningSpec(
    config_json=bundled_config("llama-3.1-8b"),
    llm_name="meta-llama/Llama-3.1-8B",
    gpu_name="A100-40GB",
    gpu_memory_bytes=40 * GIB,
    reserved_bytes=GIB,
    longest_sequence=2048,
    most_new_tokens=1024,
    most_requests=256,
)


def asked(**fields: Any) -> pb.TuningSpec:
    """A specification that leaves everything to the defaults that can be."""
    wanted: dict[str, Any] = {
        "llm": llm_pb2.Llm(name="llama-3.1-8b"),
        "probe": pb.PROBE_KIND_ANALYTIC,
        "server": pb.SERVER_KIND_TGIS,
        "gpu_profile": "1xA100-40GB",
    }
    return pb.TuningSpec(**(wanted | fields))


def read(wire: pb.TuningSpec) -> TuningSpec:
    violations: list[Violation] = []
    spec = read_spec(wire, violations)
    assert violations == []
    assert spec is not None
    return spec


def refused(wire: pb.TuningSpec) -> dict[str, str]:
    violations: list[Violation] = []
    read_spec(wire, violations)
    return {each.field: each.description for each in violations}


specs = st.builds(
    TuningSpec,
    config_json=st.just(SPEC.config_json),
    llm_name=st.sampled_from(["", "mine", SPEC.llm_name]),
    probe=st.sampled_from([kind for kind in ProbeKind if kind is not ProbeKind.SERVER]),
    server=st.sampled_from(Server),
    gpu_name=st.sampled_from(["", "A100-40GB", "H100-80GB"]),
    gpu_count=st.sampled_from([1, 2, 4, 8]),
    gpu_memory_bytes=st.integers(64 * GIB, 2**50),
    reserved_bytes=st.integers(0, GIB),
    precision_name=st.sampled_from(["", "fp32", "fp16", "bf16"]),
    eager_attention=st.booleans(),
    longest_sequence=st.integers(64, 100_000),
    most_new_tokens=st.integers(1, 63),
    most_requests=st.integers(1, 1_000),
    prefill_limit=st.none() | st.integers(2**50, 2**60),
    prompt_logprobs=st.booleans(),
    granule=st.integers(1, 1_000),
    precision=st.floats(0, 0.5),
    step_seconds=st.floats(0.5, 1e6),
    soak_steps=st.integers(0, 1_000),
    seed=st.integers(0, 2**63),
).map(lambda spec: replace(spec, eager_attention=spec.eager_attention and spec.server is not Server.VLLM))


@given(spec=specs)
@settings(max_examples=50, deadline=None)
def test_a_specification_comes_back_as_it_was_written(spec: TuningSpec) -> None:
    assert read(pb.TuningSpec.FromString(write_spec(spec).SerializeToString())) == spec


def test_a_server_to_probe_comes_back() -> None:
    spec = replace(SPEC, probe=ProbeKind.SERVER, server=Server.TGI, target=ServerTarget(url="http://host:80"))
    assert read(write_spec(spec)) == spec


def test_a_profile_says_how_much_memory_there_is_and_what_of_it_is_not_for_tensors() -> None:
    """39.39 GiB and 1.71 GiB are what the raw records of an A100 say, see gpus.csv; .57 GiB are the collectives'."""
    one, two = read(asked()), read(asked(gpu_profile="2xA100-40GB"))
    assert (one.gpu_name, one.gpu_count, two.gpu_count) == ("A100-40GB", 1, 2)
    assert one.gpu_memory_bytes == two.gpu_memory_bytes == round(A100_GIB * GIB)
    assert one.reserved_bytes == round(A100_RUNTIME_GIB * GIB)
    assert two.reserved_bytes - one.reserved_bytes == round(0.57 * GIB)


A100_GIB, A100_RUNTIME_GIB = 39.39, 1.71


def test_what_is_said_of_a_gpu_wins_over_its_profile() -> None:
    spec = read(asked(gpu_memory_bytes=24 * GIB, reserved_bytes=0))
    assert (spec.gpu_memory_bytes, spec.reserved_bytes) == (24 * GIB, 0)


def test_a_cpu_sets_nothing_aside() -> None:
    assert read(asked(probe=pb.PROBE_KIND_CPU)).reserved_bytes == 0


def test_limits_follow_from_the_context_of_the_llm() -> None:
    """Llama-3.1 reads 131,072 tokens, Llama-2 4,096."""
    new, old = read(asked()), read(asked(llm=llm_pb2.Llm(name="llama-2-7b")))
    assert (new.longest_sequence, new.most_new_tokens, new.most_requests) == (8192, 1024, 256)
    assert (old.longest_sequence, old.most_new_tokens) == (4096, 1024)
    short = read(asked(longest_sequence=512))
    assert (short.longest_sequence, short.most_new_tokens) == (512, 256)
    assert (new.precision, new.step_seconds, new.soak_steps, new.granule) == (0.01, 120, 50, 1)


def test_no_soak_and_no_imprecision_can_be_asked_for() -> None:
    assert read(asked(soak_steps=0)).soak_steps == 0
    assert read(asked(precision_share=0)).precision == 0


def test_a_bundled_llm_is_known_by_its_name() -> None:
    spec = read(asked())
    assert spec.llm_name == "meta-llama/Llama-3.1-8B"
    assert spec.config_json == bundled_config("llama-3.1-8b")


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Of a request that leaves nothing right."""
    request = pb.CreateTuningRequest(
        tuning_id="Not An Id",
        spec=pb.TuningSpec(
            probe=UNKNOWN,
            gpu_profile="3xA100",
            precision="fp17",
            longest_sequence=-5,
            most_requests=-1,
            granule=-1,
            precision_share=2.0,
            step_seconds=-1.0,
            soak_steps=-1,
        ),
    )
    with pytest.raises(InvalidInputError) as caught:
        read_create_request(request)
    assert {each.field for each in caught.value.violations} >= {
        "request_id",
        "tuning_id",
        "spec.llm",
        "spec.probe",
        "spec.server",
        "spec.gpu_profile",
        "spec.granule",
        "spec.precision_share",
        "spec.step_seconds",
        "spec.soak_steps",
    }


@pytest.mark.parametrize(
    ("field", "changes", "said"),
    [
        ("spec.llm", {"llm": llm_pb2.Llm()}, "must be set"),
        ("spec.llm.name", {"llm": llm_pb2.Llm(name="llama-3.1-8")}, "did you mean"),
        ("spec.llm.name", {"llm": llm_pb2.Llm(name="a\nb", config_json=SPEC.config_json)}, "printable"),
        ("spec.llm.spec", {"llm": llm_pb2.Llm(name="x", spec=llm_pb2.LlmSpec(layer_count=2))}, "config.json"),
        ("spec.llm.config_json", {"llm": llm_pb2.Llm(config_json=" " * (LARGEST_CONFIG_BYTES + 1))}, "may have"),
        ("spec.llm.config_json", {"llm": llm_pb2.Llm(config_json="no JSON")}, "JSON"),
        ("spec.probe", {"probe": 0}, "known kind"),
        ("spec.server", {"server": 0}, "known kind"),
        ("spec.gpu_profile", {"gpu_profile": "1xA100-40G"}, "did you mean"),
        ("spec.gpu_profile", {"gpu_profile": ""}, "gpu_memory_bytes"),
        ("spec.gpu_count", {"gpu_count": 3}, "must be 0 or the 1"),
        ("spec.gpu_count", {"gpu_profile": "", "gpu_memory_bytes": 2**40, "gpu_count": 3}, "divide"),
        ("spec.gpu_memory_bytes", {"gpu_memory_bytes": -1}, ">= 1"),
        ("spec.reserved_bytes", {"reserved_bytes": 2**40}, "less than"),
        ("spec.precision", {"precision": "fp17"}, "must be one of"),
        ("spec.longest_sequence", {"longest_sequence": 1}, ">= 2"),
        ("spec.most_new_tokens", {"most_new_tokens": 8192}, "longest_sequence"),
        ("spec.most_requests", {"most_requests": -1}, ">= 1"),
        ("spec.most_requests", {"most_requests": 16_385}, "<= 16,384"),
        ("spec.prefill_limit", {"prefill_limit": -1}, ">= 1"),
        ("spec.granule", {"granule": -2}, ">= 1"),
        ("spec.precision_share", {"precision_share": float("nan")}, "< 1"),
        ("spec.step_seconds", {"step_seconds": float("inf")}, "> 0"),
        ("spec.soak_steps", {"soak_steps": -1}, ">= 0"),
        ("spec.target", {"probe": pb.PROBE_KIND_SERVER}, "missing"),
        ("spec.target", {"target": pb.ServerTarget(url="grpc://host:1")}, "must not be set"),
        (
            "spec.target.url",
            {"probe": pb.PROBE_KIND_SERVER, "target": pb.ServerTarget(url="file:///etc/passwd")},
            "must be a URL",
        ),
    ],
)
def test_a_wrong_field_is_named(field: str, changes: dict[str, Any], said: str) -> None:
    found = refused(asked(**changes))
    assert list(found) == [field]
    assert said in found[field]


def test_an_llm_larger_than_its_gpus_is_refused_with_the_number_that_hold_it() -> None:
    """70.6 billion parameters in 16 bits are 131.4 GiB; a GPU has some 37 GiB for them, and a quarter of it is 32.9."""
    with pytest.raises(PreconditionError, match="that fits is 4 such GPUs"):
        read(asked(llm=llm_pb2.Llm(name="llama-3.1-70b")))


def test_what_is_kept_of_a_specification_has_nothing_left_to_defaults() -> None:
    tuning, kept = read_create_request(pb.CreateTuningRequest(request_id="r", spec=asked()))
    assert read_kept_spec(kept) == tuning.spec
    assert pb.TuningSpec.FromString(kept).most_requests == 256


def test_the_same_request_makes_the_same_id() -> None:
    ids = [read_create_request(pb.CreateTuningRequest(request_id=request, spec=asked()))[0].id for request in "aab"]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("tn-")


TUNING = Tuning(
    id="tn-1",
    spec=SPEC,
    request_id="request",
    create_time=datetime(2024, 11, 17, 1, 2, 3, 456_789, tzinfo=UTC),
    state=State.SUCCEEDED,
    end_time=datetime(2024, 11, 17, 2, tzinfo=UTC),
    max_batch_weight=12_345,
    report_json='{"a": 1}',
    measured=True,
    probe_count=3,
    from_cache=True,
)


@pytest.mark.parametrize(
    "tuning",
    [TUNING, replace(TUNING, state=State.PENDING, end_time=None, max_batch_weight=None, report_json="", error="no")],
)
def test_a_tuning_comes_back_as_it_was_written(tuning: Tuning) -> None:
    assert read_tuning(write_tuning(tuning)) == tuning
    shared = replace(tuning, owner="process", cancel_requested=True, spec_digest="d1")
    assert read_snapshot(write_snapshot(shared)) == shared


def test_a_tuning_of_another_version_is_not_guessed() -> None:
    wire = write_tuning(TUNING)
    wire.state = UNKNOWN
    with pytest.raises(PilotError, match="another version"):
        read_tuning(wire)


BATCH = Batch(
    case="mixed",
    prefill=(Rows(request_count=1, input_tokens=10, context_tokens=4),),
    decode=(Rows(request_count=2, input_tokens=3, output_tokens=1), Rows(request_count=1, input_tokens=9)),
    residents=(Rows(request_count=7, input_tokens=5),),
    pool_tokens=100,
    copied_tokens=5,
    all_logits=True,
)
PASSED = CaseRun(batch=BATCH, outcome=Outcome.PASSED, peak_bytes=2**40, live_before_bytes=0, seconds=0.25)
FAILED = CaseRun(batch=BATCH, outcome=Outcome.OUT_OF_MEMORY, message="Tried to allocate 2 GiB")
PROBE = KeptProbe(key="k1", probe=Probe(weight=2**60, runs=(PASSED, FAILED)))


def test_a_probe_comes_back_as_it_was_kept() -> None:
    assert read_probe(probe_json(PROBE)) == PROBE


def test_a_probe_that_cannot_be_read_says_what_to_do() -> None:
    with pytest.raises(PilotError, match="start the tuning anew"):
        read_probe('{"weight": "much"}')


EVENTS: list[LogEvent] = [Changed(tuning=TUNING), PROBE, Note(text="a line")]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was_written(event: LogEvent) -> None:
    wire = write_event(event, index=7, unix_nanos=1_000_000_001)
    assert (wire.index, wire.event_time.seconds, wire.event_time.nanos) == (7, 1, 1)
    assert read_event(wire) == event


def test_a_case_says_its_peak_only_where_it_is_known() -> None:
    passed, failed = (
        write_event(CaseRan(weight=9, run=run), index=1, unix_nanos=0).case_completed for run in (PASSED, FAILED)
    )
    assert (passed.weight, passed.case, passed.passed, passed.peak_bytes) == (9, "mixed", True, 2**40)
    assert (failed.passed, failed.HasField("peak_bytes")) == (False, False)


@pytest.mark.parametrize("state", State)
def test_a_log_ends_with_the_end_of_its_tuning(state: State) -> None:
    event = write_event(Changed(tuning=replace(TUNING, state=state)), index=1, unix_nanos=0)
    assert is_end(event) is (state in {State.SUCCEEDED, State.FAILED, State.CANCELLED})


def test_notes_end_nothing() -> None:
    assert not is_end(write_event(Note(text="the end"), index=1, unix_nanos=0))
