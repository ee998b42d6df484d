"""Between protobuf and domain: measurements as they travel on NATS."""

from datetime import datetime

from llmpilot.measurement.v1 import measurement_pb2
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.wire_llm import read_llm_spec, write_llm_spec

ORIGINS = {
    measurement_pb2.ORIGIN_MEASURED: Origin.MEASURED,
    measurement_pb2.ORIGIN_PUBLISHED_MEDIAN: Origin.PUBLISHED_MEDIAN,
    measurement_pb2.ORIGIN_SIMULATED: Origin.SIMULATED,
}
WIRE_ORIGINS = {origin: wire for wire, origin in ORIGINS.items()}


def _read_quantiles(wire: measurement_pb2.LatencyQuantiles) -> Quantiles:
    def value(name: str) -> float | None:
        return float(getattr(wire, name)) if wire.HasField(name) else None  # type: ignore[arg-type]

    return Quantiles(
        median_ms=value("median_ms"), p90_ms=value("p90_ms"), p95_ms=value("p95_ms"), p99_ms=value("p99_ms")
    )


def read_measurement_recorded(event: measurement_pb2.MeasurementRecorded) -> tuple[Measurement, LlmSpec | None]:
    """Return the measurement of an event and, if it says so, the architecture of its LLM."""
    wire = event.measurement
    if wire.origin not in ORIGINS:
        raise InvalidInputError([Violation("measurement.origin", f"must be set, is {wire.origin}")])
    measurement = Measurement(
        llm=wire.llm,
        gpu_profile=wire.gpu_profile,
        users_count=wire.users_count,
        origin=ORIGINS[wire.origin],
        test_seconds=wire.test_seconds if wire.HasField("test_seconds") else None,
        ttft=_read_quantiles(wire.ttft),
        nttft=_read_quantiles(wire.nttft),
        itl=_read_quantiles(wire.itl),
        throughput_tokens_per_second=wire.throughput_tokens_per_second
        if wire.HasField("throughput_tokens_per_second")
        else None,
        request_count=wire.request_count if wire.HasField("request_count") else None,
        error_count=wire.error_count if wire.HasField("error_count") else None,
        oom_count=wire.oom_count if wire.HasField("oom_count") else None,
    )
    return measurement, read_llm_spec(event.llm_spec) if event.HasField("llm_spec") else None


def _write_quantiles(quantiles: Quantiles) -> measurement_pb2.LatencyQuantiles:
    return measurement_pb2.LatencyQuantiles(
        median_ms=quantiles.median_ms, p90_ms=quantiles.p90_ms, p95_ms=quantiles.p95_ms, p99_ms=quantiles.p99_ms
    )


def write_measurement(measurement: Measurement) -> measurement_pb2.Measurement:
    """Return a measurement for the wire."""
    return measurement_pb2.Measurement(
        llm=measurement.llm,
        gpu_profile=measurement.gpu_profile,
        users_count=measurement.users_count,
        origin=WIRE_ORIGINS[measurement.origin],
        test_seconds=measurement.test_seconds,
        ttft=_write_quantiles(measurement.ttft),
        nttft=_write_quantiles(measurement.nttft),
        itl=_write_quantiles(measurement.itl),
        throughput_tokens_per_second=measurement.throughput_tokens_per_second,
        request_count=measurement.request_count,
        error_count=measurement.error_count,
        oom_count=measurement.oom_count,
    )


def write_measurement_recorded(
    measurement: Measurement, spec: LlmSpec | None, *, event_id: str, record_time: datetime
) -> measurement_pb2.MeasurementRecorded:
    """Return the event that says a measurement was made."""
    event = measurement_pb2.MeasurementRecorded(
        event_id=event_id,
        measurement=write_measurement(measurement),
        llm_spec=write_llm_spec(spec) if spec else None,
    )
    event.record_time.FromDatetime(record_time)
    return event
