"""The log of a tuning: what is in it, and what whoever continues it must know."""

from dataclasses import dataclass

from google.protobuf.message import Message

from llmpilot_contracts.subjects import TUNING_EVENT
from llmpilot_servicekit.jobs import job_log
from llmpilot_servicekit.jobs.job_log import JobHistory, JobLog
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_tuner.domain.events import Note
from llmpilot_tuner.domain.probe_json import KeptProbe
from llmpilot_tuner.domain.tuning import Changed, LogEvent, Tuning
from llmpilot_tuner.tuning_states import TUNING_WIRE
from llmpilot_tuner.wire_events import FIRST_INDEX, is_end, read_event, write_event

TuningLog = JobLog[LogEvent]


@dataclass(frozen=True, slots=True, kw_only=True)
class History(JobHistory[Tuning]):
    """What a log says that is to be continued."""

    probes: tuple[KeptProbe, ...] = ()


def tuning_log(nats: NatsConnection, tuning_id: str, history: History) -> TuningLog:
    """Return the log of a tuning, to be continued."""
    return JobLog(
        nats,
        TUNING_EVENT.of(tuning_id),
        write=write_event,
        note=_note,
        next_index=history.next_index,
        last_sequence=history.last_sequence,
    )


def _note(text: str) -> LogEvent:
    return Note(text=text)


async def read_history(nats: NatsConnection, tuning_id: str) -> History:
    """Read a whole log. UnavailableError: NATS is away; PilotError: another version wrote it."""
    probes: list[KeptProbe] = []

    def take(message: Message) -> None:
        event = None if is_end(message) else read_event(message)
        if isinstance(event, KeptProbe):
            probes.append(event)

    end = await job_log.read_history(
        nats, TUNING_WIRE, tuning_id, first_index=FIRST_INDEX, take=take, read_end=_read_end
    )
    return History(next_index=end.next_index, last_sequence=end.last_sequence, ended=end.ended, probes=tuple(probes))


def _read_end(message: Message) -> Tuning | None:
    event = read_event(message)
    return event.tuning if isinstance(event, Changed) else None
