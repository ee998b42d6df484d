"""Between protobuf and domain: what happens in a tuning, as its log and the stream of results have it.

Invariant: what a tuning goes on from can be read from its log as it was written.
"""

from dataclasses import replace

from google.protobuf.message import Message

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_tuner.domain.events import CaseRan, Note
from llmpilot_tuner.domain.probe_json import KeptProbe, probe_json, read_probe
from llmpilot_tuner.domain.probing import Outcome
from llmpilot_tuner.domain.tuning import Changed, LogEvent, Tuning
from llmpilot_tuner.wire import read_tuning, write_tuning

FIRST_INDEX = 1


def write_event(event: LogEvent, *, index: int, unix_nanos: int) -> pb.TuningEvent:
    """Return an event for the wire."""
    wire = pb.TuningEvent(index=index)
    wire.event_time.FromNanoseconds(unix_nanos)
    match event:
        case Changed():
            wire.changed.CopyFrom(write_tuning(event.tuning))
        case CaseRan():
            wire.case_completed.CopyFrom(
                pb.CaseCompleted(
                    weight=event.weight,
                    case=event.run.batch.case,
                    passed=event.run.outcome is Outcome.PASSED,
                    peak_bytes=event.run.peak_bytes,
                    seconds=event.run.seconds,
                )
            )
        case KeptProbe(probe=probe):
            wire.probe_completed.CopyFrom(
                pb.ProbeCompleted(weight=probe.weight, passed=probe.passed, probe_json=probe_json(event))
            )
        case Note():
            wire.note = event.text
    return wire


def read_event(wire: Message) -> LogEvent | None:
    """Return what happened; None: a case, of which the log has only a part, or what a newer version wrote."""
    if not isinstance(wire, pb.TuningEvent):
        raise TypeError(f"expected TuningEvent, got {type(wire).__name__}")
    match wire.WhichOneof("event"):
        case "changed":
            return Changed(tuning=read_tuning(wire.changed))
        case "probe_completed":
            return read_probe(wire.probe_completed.probe_json)
        case "note":
            return Note(text=wire.note)
    return None


def is_end(wire: Message) -> bool:
    """Whether an event is the last of its tuning."""
    if not isinstance(wire, pb.TuningEvent) or wire.WhichOneof("event") != "changed":
        return False
    return wire.changed.state in {pb.STATE_SUCCEEDED, pb.STATE_FAILED, pb.STATE_CANCELLED}


def write_completed(tuning: Tuning, event_id: str) -> pb.TuningCompleted:
    """Return the event that says what a tuning found."""
    wire = pb.TuningCompleted(event_id=event_id, tuning=write_tuning(tuning))
    if tuning.end_time is not None:
        wire.event_time.FromDatetime(tuning.end_time)
    return wire


def write_snapshot(tuning: Tuning) -> pb.TuningSnapshot:
    """Return a tuning as replicas share it."""
    return pb.TuningSnapshot(
        tuning=write_tuning(tuning),
        owner=tuning.owner,
        cancel_requested=tuning.cancel_requested,
        spec_digest=tuning.spec_digest,
    )


def read_snapshot(wire: Message) -> Tuning:
    """Return a tuning as another replica wrote it."""
    if not isinstance(wire, pb.TuningSnapshot):
        raise TypeError(f"expected TuningSnapshot, got {type(wire).__name__}")
    tuning = read_tuning(wire.tuning)
    return replace(tuning, owner=wire.owner, cancel_requested=wire.cancel_requested, spec_digest=wire.spec_digest)
