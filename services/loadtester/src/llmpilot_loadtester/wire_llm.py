"""Between protobuf and domain: the LLM under test, and what a stage measured of it, for the recommender."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.measurement.v1 import measurement_pb2
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.results import LatencySummary, StageResult
from llmpilot_perfmodel.bundled_llms import find_bundled
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec

OUT_OF_MEMORY = STATUSES[1]
_SPEC_FIELDS = tuple(field.name for field in llm_pb2.LlmSpec.DESCRIPTOR.fields)
_LARGEST_NAME = 200


def llm_violations(llm: llm_pb2.Llm, gpu_profile: str) -> Iterator[Violation]:
    """Yield what is wrong with the names under which measurements are published; both are empty where none are."""
    is_named = bool(llm.name or llm.WhichOneof("source"))
    if is_named and not gpu_profile:
        yield Violation("spec.gpu_profile", "must be set where llm is: a measurement is of both")
    if gpu_profile and not is_named:
        yield Violation("spec.llm", "must be set where gpu_profile is: a measurement is of both")
    if is_named and not llm.name:
        yield Violation("spec.llm.name", "must be set: measurements are published under it")
    for field, name in (("spec.llm.name", llm.name), ("spec.gpu_profile", gpu_profile)):
        if name != name.strip() or not name.isprintable() or len(name) > _LARGEST_NAME:
            description = f"must be at most {_LARGEST_NAME} printable characters without spaces around them"
            yield Violation(field, f"{description}, is {name[:80]!r}")
    try:
        spec = architecture_of(llm)
    except InvalidInputError as error:
        yield from (Violation(f"spec.llm.{each.field}", each.description) for each in error.violations)
    else:
        yield from (Violation(f"spec.llm.spec.{each.field}", each.description) for each in _problems(spec))


def _problems(spec: LlmSpec | None) -> tuple[Violation, ...]:
    return spec.violations() if spec else ()


def architecture_of(llm: llm_pb2.Llm) -> LlmSpec | None:
    """Return the architecture that is given, or known by the name; None: the name alone must do."""
    match llm.WhichOneof("source"):
        case "spec":
            return _read_llm_spec(llm.spec)
        case "config_json":
            return parse_config(llm.config_json)
    bundled = find_bundled(llm.name) if llm.name else None
    return parse_config(bundled.config_json) if bundled else None


def _read_llm_spec(wire: llm_pb2.LlmSpec) -> LlmSpec:
    optional = {field.name for field in wire.DESCRIPTOR.fields if field.has_presence}
    values: dict[str, Any] = {
        name: None if name in optional and not wire.HasField(name) else getattr(wire, name)  # type: ignore[arg-type]
        for name in _SPEC_FIELDS
    }
    return LlmSpec(**values)


def write_measurement(
    spec: pb.LoadTestSpec, result: StageResult, event_id: str, simulated: bool
) -> measurement_pb2.MeasurementRecorded:
    """Return the event that says what a stage of a constant number of users measured."""
    metrics, architecture = result.metrics, architecture_of(spec.llm)
    out_of_memory_count = sum(error.count for error in metrics.errors if error.status == OUT_OF_MEMORY)
    event = measurement_pb2.MeasurementRecorded(
        event_id=event_id,
        measurement=measurement_pb2.Measurement(
            llm=spec.llm.name,
            gpu_profile=spec.gpu_profile,
            users_count=result.stage.load.most_users or 0,
            origin=measurement_pb2.ORIGIN_SIMULATED if simulated else measurement_pb2.ORIGIN_MEASURED,
            test_seconds=metrics.window_seconds,
            ttft=_write_quantiles(metrics.ttft),
            nttft=_write_quantiles(metrics.nttft),
            itl=_write_quantiles(metrics.itl),
            throughput_tokens_per_second=metrics.output_tokens_per_second,
            request_count=metrics.request_count,
            error_count=metrics.error_count,
            oom_count=out_of_memory_count,
        ),
        llm_spec=_write_llm_spec(architecture) if architecture else None,
    )
    event.record_time.FromDatetime(datetime.now(UTC))
    return event


def _write_llm_spec(spec: LlmSpec) -> llm_pb2.LlmSpec:
    return llm_pb2.LlmSpec(**{name: getattr(spec, name) for name in _SPEC_FIELDS})


def _write_quantiles(latency: LatencySummary) -> measurement_pb2.LatencyQuantiles:
    return measurement_pb2.LatencyQuantiles(
        median_ms=latency.median_ms, p90_ms=latency.p90_ms, p95_ms=latency.p95_ms, p99_ms=latency.p99_ms
    )
