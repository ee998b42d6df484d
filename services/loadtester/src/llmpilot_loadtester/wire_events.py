"""Between protobuf and domain: what happens in a load test, as its log has it.

Invariant: `read_event(write_event(event)) == event`, but for what a load test does not show.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from google.protobuf.message import Message

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import PilotError
from llmpilot_loadtester.domain.events import LiveMetrics, Noted, RecordsCame, StageBegan, StageMeasured, TargetFound
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent, MeasurementPublished
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.wire import read_load_test, write_load_test
from llmpilot_loadtester.wire_results import read_result, write_result
from llmpilot_loadtester.wire_spec import read_stage, write_stage

LARGEST_SNAPSHOT_BYTES = 900_000
"""NATS takes messages of 1 MiB."""
_SHORT_EXAMPLE, _SHORT_REASON, _FEW_REASONS = 60, 200, 3


def write_event(event: LogEvent, *, index: int, unix_nanos: int) -> pb.LoadTestEvent:
    """Return an event for the wire; what is found of a target is said by the load test that changed."""
    wire = pb.LoadTestEvent(index=index)
    wire.event_time.FromNanoseconds(unix_nanos)
    match event:
        case Changed():
            wire.changed.CopyFrom(write_load_test(event.load_test, with_results=False))
        case StageBegan():
            wire.stage_started.CopyFrom(_write_began(event))
        case RecordsCame():
            wire.records.CopyFrom(pb.RecordFrame(**_fields(event)))
        case LiveMetrics():
            wire.live.CopyFrom(pb.LiveMetrics(**_fields(event)))
        case StageMeasured():
            wire.stage_completed.CopyFrom(write_result(event.result))
        case Noted():
            wire.note = event.text
        case MeasurementPublished():
            wire.measurement_published.CopyFrom(pb.MeasurementPublished(**_fields(event)))
        case TargetFound():
            raise PilotError("TargetFound is no event of the log: a bug of the caller")
    return wire


def read_event(wire: Message) -> LogEvent | None:
    """Return what happened; None: a newer version of the load tester wrote what this one does not know."""
    if not isinstance(wire, pb.LoadTestEvent):
        raise TypeError(f"expected LoadTestEvent, got {type(wire).__name__}")
    kind = wire.WhichOneof("event")
    read = _READERS.get(kind or "")
    return read(wire) if read else None


def is_end(wire: Message) -> bool:
    """Whether an event is the last of its load test."""
    if not isinstance(wire, pb.LoadTestEvent) or wire.WhichOneof("event") != "changed":
        return False
    return wire.changed.state in {pb.STATE_SUCCEEDED, pb.STATE_FAILED, pb.STATE_CANCELLED}


def write_snapshot(load_test: LoadTest) -> pb.LoadTestSnapshot:
    """Return a load test as replicas share it; where it would be too large, with results in short."""
    snapshot = _snapshot_of(load_test)
    if snapshot.ByteSize() > LARGEST_SNAPSHOT_BYTES:
        snapshot = _snapshot_of(replace(load_test, results=tuple(map(_in_short, load_test.results))))
    return snapshot


def _snapshot_of(load_test: LoadTest) -> pb.LoadTestSnapshot:
    return pb.LoadTestSnapshot(
        load_test=write_load_test(load_test),
        owner=load_test.owner,
        cancel_requested=load_test.cancel_requested,
        spec_digest=load_test.spec_digest,
    )


def _in_short(result: StageResult) -> StageResult:
    """Leave out what only explains; the log has it."""
    errors = tuple(replace(error, example=error.example[:_SHORT_EXAMPLE]) for error in result.metrics.errors)
    reasons = tuple(reason[:_SHORT_REASON] for reason in result.verdict.reasons[:_FEW_REASONS])
    return replace(
        result,
        metrics=replace(result.metrics, errors=errors),
        verdict=replace(result.verdict, reasons=reasons, notes=()),
    )


def read_snapshot(wire: Message) -> LoadTest:
    """Return a load test as another replica wrote it."""
    if not isinstance(wire, pb.LoadTestSnapshot):
        raise TypeError(f"expected LoadTestSnapshot, got {type(wire).__name__}")
    load_test = read_load_test(wire.load_test)
    return replace(load_test, owner=wire.owner, cancel_requested=wire.cancel_requested, spec_digest=wire.spec_digest)


def _fields(event: RecordsCame | LiveMetrics | MeasurementPublished) -> dict[str, Any]:
    return asdict(event)  # the messages have the fields of the dataclasses


def _write_began(event: StageBegan) -> pb.StageStarted:
    return pb.StageStarted(
        stage_index=event.stage_index,
        attempt=event.attempt,
        stage=write_stage(event.stage),
        start_unix_nanos=event.start_unix_nanos,
        stage_count=event.stage_count,
    )


def _read_began(wire: pb.StageStarted) -> StageBegan:
    return StageBegan(
        stage_index=wire.stage_index,
        attempt=wire.attempt,
        stage=read_stage(wire.stage),
        start_unix_nanos=wire.start_unix_nanos,
        stage_count=wire.stage_count,
    )


def _read_records(wire: pb.RecordFrame) -> RecordsCame:
    return RecordsCame(
        stage_index=wire.stage_index, attempt=wire.attempt, request_count=wire.request_count, columns=wire.columns
    )


def _read_live(wire: pb.LiveMetrics) -> LiveMetrics:
    values: dict[str, Any] = {
        field.name: None if field.has_presence and not wire.HasField(field.name) else getattr(wire, field.name)  # type: ignore[arg-type]
        for field in wire.DESCRIPTOR.fields
    }
    return LiveMetrics(**values)


def _read_published(wire: pb.MeasurementPublished) -> MeasurementPublished:
    return MeasurementPublished(stage_index=wire.stage_index, event_id=wire.event_id)


_READERS: Mapping[str, Callable[[pb.LoadTestEvent], LogEvent]] = {
    "changed": lambda wire: Changed(load_test=read_load_test(wire.changed)),
    "stage_started": lambda wire: _read_began(wire.stage_started),
    "records": lambda wire: _read_records(wire.records),
    "live": lambda wire: _read_live(wire.live),
    "stage_completed": lambda wire: StageMeasured(result=read_result(wire.stage_completed)),
    "note": lambda wire: Noted(text=wire.note),
    "measurement_published": lambda wire: _read_published(wire.measurement_published),
}
