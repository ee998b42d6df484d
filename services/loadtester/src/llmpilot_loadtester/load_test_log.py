"""The log of a load test: its events in a JetStream stream, appended by the one process that runs it.

Invariant: indices are 0, 1, 2 ... without gap or repetition, whatever happens to NATS or to the writer: an event is
stored only right after the one that its writer stored or read before. A second writer finds out with its next event.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from google.protobuf.message import Message

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.subjects import LOAD_TEST_EVENT
from llmpilot_loadtester.domain.events import Noted, RecordsCame, StageBegan, StageMeasured
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent, MeasurementPublished
from llmpilot_loadtester.domain.record_frames import pack_records, unpack_records
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.patience import patiently
from llmpilot_loadtester.wire_events import index_of, is_end, read_event, write_event
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError

LARGEST_WAITING_BYTES = 8 * 1024 * 1024
"""What may wait for NATS here; then who appends waits, with a larger store of its own."""
_ACKNOWLEDGED_SECONDS = 2
"""After which an event is published again; one that was stored is not stored twice."""
LARGEST_FRAME_BYTES = 512 * 1024
"""NATS takes messages of 1 MiB."""


class LoadTestLog:
    """Appends to the log of one load test; `run` stores what was appended."""

    def __init__(
        self,
        nats: NatsConnection,
        load_test_id: str,
        *,
        next_index: int,
        last_sequence: int,
        largest_waiting_bytes: int = LARGEST_WAITING_BYTES,
    ) -> None:
        self._nats = nats
        self._subject = LOAD_TEST_EVENT.of(load_test_id)
        self._writer = uuid.uuid4().hex
        self._next_index = next_index
        self._last_sequence = last_sequence
        self._largest_waiting_bytes = largest_waiting_bytes
        self._waiting: asyncio.Queue[Message] = asyncio.Queue()
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._lost: StaleSequenceError | None = None

    async def append(self, event: LogEvent) -> None:
        """Take an event, to be stored in its order; waits while too much waits for NATS.

        StaleSequenceError: another process writes this log now.
        """
        await self._has_room.wait()
        if self._lost:
            raise self._lost
        for part in _small_enough(event):
            message = write_event(part, index=self._next_index, unix_nanos=time.time_ns())
            self._next_index += 1
            self._waiting_bytes += message.ByteSize()
            self._waiting.put_nowait(message)
        self._open_or_close()

    async def run(self) -> None:
        """Store what is appended, for ever, however long NATS is away."""
        while True:
            message = await self._waiting.get()
            try:
                if self._lost is None:
                    await self._store(message)
            except StaleSequenceError as error:
                self._lost = error
            finally:
                self._waiting_bytes -= message.ByteSize()
                self._waiting.task_done()
                self._open_or_close()

    async def flush(self) -> None:
        """Wait until everything that was appended is stored; raises as `append` does where another process writes."""
        await self._waiting.join()
        if self._lost:
            raise self._lost

    def _open_or_close(self) -> None:
        if self._waiting_bytes < self._largest_waiting_bytes:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def _store(self, message: Message) -> None:
        index = index_of(message)
        publish = partial(
            self._nats.publish,
            self._subject,
            event_id=f"{self._writer}/{index}",  # another writer's event of this index is not this one sent again
            after_sequence=self._last_sequence,
            timeout_seconds=_ACKNOWLEDGED_SECONDS,
        )
        try:
            self._last_sequence = await patiently(partial(publish, payload=message))
        except StaleSequenceError:
            # It may be stored, where only the acknowledgement was lost: then the last event is this one.
            last = await patiently(partial(self._nats.last, self._subject))
            if last is None or last[0] != message:
                raise
            self._last_sequence = last[1]
        except InvalidInputError as error:
            note = write_event(Noted(text=f"event {index} could not be kept: {error}"), index=index, unix_nanos=0)
            note.event_time.CopyFrom(message.event_time)  # type: ignore[attr-defined]
            self._last_sequence = await patiently(partial(publish, payload=note))


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
class History:
    """What a log says that is to be continued."""

    next_index: int = 0
    last_sequence: int = 0
    results: tuple[StageResult, ...] = ()
    attempts: Mapping[int, int]
    """By stage: how often it was begun."""
    published: frozenset[int] = frozenset()
    """Stages whose measurements were published."""
    ended: LoadTest | None = None
    """As its last event says, if that is its end."""


async def read_history(nats: NatsConnection, load_test_id: str) -> History:
    """Read a whole log. UnavailableError: NATS is away."""
    subject = LOAD_TEST_EVENT.of(load_test_id)
    last = await nats.last(subject)
    if last is None:
        return History(attempts={})
    last_message, last_sequence = last
    results: dict[int, StageResult] = {}
    attempts: dict[int, int] = {}
    published: set[int] = set()

    async def take(message: Message, sequence: int) -> bool:
        match read_event(message):
            case StageBegan() as began:
                attempts[began.stage_index] = max(began.attempt, attempts.get(began.stage_index, 0))
            case StageMeasured() as measured:
                results[measured.result.stage_index] = measured.result
            case MeasurementPublished() as event:
                published.add(event.stage_index)
        return sequence >= last_sequence

    await replay(nats, load_test_id, take)
    end = read_event(last_message) if is_end(last_message) else None
    return History(
        next_index=index_of(last_message) + 1,
        last_sequence=last_sequence,
        results=tuple(results.values()),
        attempts=attempts,
        published=frozenset(published),
        ended=end.load_test if isinstance(end, Changed) else None,
    )


async def watch(
    nats: NatsConnection,
    load_test_id: str,
    start_index: int,
    *,
    ended: bool,
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Send the events of a load test from `start_index` on, and those that come, until it ends.

    `ended`: whether it has already. UnavailableError: NATS is away at the beginning; later it is waited for.
    """
    last_index, last_sequence = start_index - 1, None
    if ended:
        last = await nats.last(LOAD_TEST_EVENT.of(load_test_id))
        if last is None or index_of(last[0]) < start_index:
            return  # too old to be kept, or seen
        last_sequence = last[1]

    async def take(message: Message, sequence: int) -> bool:
        nonlocal last_index
        if (index := index_of(message)) > last_index:
            last_index = index
            await send(message)
        return is_end(message) or sequence == last_sequence

    await replay(nats, load_test_id, take)


async def replay(nats: NatsConnection, load_test_id: str, take: Callable[[Message, int], Awaitable[bool]]) -> None:
    """Hand over all events of a load test, and those that come, until `take` returns True or raises."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def hand_over(message: Message, sequence: int) -> None:
        if ended.done():
            return
        try:
            if await take(message, sequence):
                ended.set_result(None)
        except Exception as error:  # noqa: BLE001 for whoever replays, not for the log of messages that failed
            ended.set_exception(error)

    following = asyncio.ensure_future(nats.follow(LOAD_TEST_EVENT.of(load_test_id), hand_over))
    try:
        await asyncio.wait([ended, following], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            following.result()
        ended.result()
    finally:
        following.cancel()
        await asyncio.wait([following])
