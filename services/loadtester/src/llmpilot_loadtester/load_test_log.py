"""The log of a load test: what is in it, and what whoever continues it must know."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.message import Message

from llmpilot_contracts.subjects import LOAD_TEST_EVENT
from llmpilot_loadtester.domain.events import Noted, RecordsCame, StageBegan, StageMeasured
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent, MeasurementPublished
from llmpilot_loadtester.domain.record_frames import pack_records, unpack_records
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.load_test_states import LOAD_TEST_WIRE
from llmpilot_loadtester.wire_events import read_event, write_event
from llmpilot_servicekit.jobs import job_log
from llmpilot_servicekit.jobs.job_log import LARGEST_WAITING_BYTES, JobHistory, JobLog
from llmpilot_servicekit.nats_connection import NatsConnection

LARGEST_FRAME_BYTES = 512 * 1024
"""NATS takes messages of 1 MiB."""
LoadTestLog = JobLog[LogEvent]


def load_test_log(
    nats: NatsConnection,
    load_test_id: str,
    *,
    next_index: int,
    last_sequence: int,
    largest_waiting_bytes: int = LARGEST_WAITING_BYTES,
) -> LoadTestLog:
    """Return the log of a load test, to be continued."""
    return JobLog(
        nats,
        LOAD_TEST_EVENT.of(load_test_id),
        write=write_event,
        note=_note,
        split=_small_enough,
        next_index=next_index,
        last_sequence=last_sequence,
        largest_waiting_bytes=largest_waiting_bytes,
    )


def _note(text: str) -> LogEvent:
    return Noted(text=text)


def _small_enough(event: LogEvent) -> Iterator[LogEvent]:
    """Yield the event, or the same records in smaller frames."""
    if not isinstance(event, RecordsCame) or len(event.columns) <= LARGEST_FRAME_BYTES or event.request_count <= 1:
        yield event
        return
    batch, middle = unpack_records(event.columns), event.request_count // 2
    for rows in (slice(None, middle), slice(middle, None)):
        half = batch.take(np.arange(len(batch))[rows])
        yield from _small_enough(replace(event, request_count=len(half), columns=pack_records(half)))


@dataclass(frozen=True, slots=True, kw_only=True)
class History(JobHistory[LoadTest]):
    """What a log says that is to be continued."""

    results: tuple[StageResult, ...] = ()
    attempts: Mapping[int, int]
    """By stage: how often it was begun."""
    published: frozenset[int] = frozenset()
    """Stages whose measurements were published."""


async def read_history(nats: NatsConnection, load_test_id: str) -> History:
    """Read a whole log. UnavailableError: NATS is away."""
    results: dict[int, StageResult] = {}
    attempts: dict[int, int] = {}
    published: set[int] = set()

    def take(message: Message) -> None:
        match read_event(message):
            case StageBegan() as began:
                attempts[began.stage_index] = max(began.attempt, attempts.get(began.stage_index, 0))
            case StageMeasured() as measured:
                results[measured.result.stage_index] = measured.result
            case MeasurementPublished() as event:
                published.add(event.stage_index)

    end = await job_log.read_history(nats, LOAD_TEST_WIRE, load_test_id, first_index=0, take=take, read_end=_read_end)
    return History(
        next_index=end.next_index,
        last_sequence=end.last_sequence,
        ended=end.ended,
        results=tuple(results.values()),
        attempts=attempts,
        published=frozenset(published),
    )


def _read_end(message: Message) -> LoadTest | None:
    event = read_event(message)
    return event.load_test if isinstance(event, Changed) else None
