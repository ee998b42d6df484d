"""The log of a job: its events in a JetStream stream, appended by the one process that runs it.

Invariant: indices have no gap and no repetition, whatever happens to NATS or to the writer: an event is
stored only right after the one that its writer stored or read before. A second writer finds out with its next event.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.subjects import Subject
from llmpilot_servicekit.jobs.job_wire import J, JobWire, WriteEvent, index_of
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError
from llmpilot_servicekit.patience import patiently

E = TypeVar("E")

LARGEST_WAITING_BYTES = 8 * 1024 * 1024
"""What may wait for NATS here; then who appends waits, with a larger store of its own."""
_ACKNOWLEDGED_SECONDS = 2
"""After which an event is published again; one that was stored is not stored twice."""


def whole(event: E) -> Iterable[E]:
    """Yield an event that is never too large for a message."""
    yield event


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHistory(Generic[J]):
    """Where a log ends that is to be continued."""

    next_index: int = 0
    last_sequence: int = 0
    ended: J | None = None
    """As its last event says, if that is its end."""


class JobLog(Generic[E]):
    """Appends to the log of one job; `run` stores what was appended."""

    def __init__(
        self,
        nats: NatsConnection,
        subject: Subject,
        *,
        write: WriteEvent[E],
        note: Callable[[str], E],
        next_index: int,
        last_sequence: int,
        split: Callable[[E], Iterable[E]] = whole,
        largest_waiting_bytes: int = LARGEST_WAITING_BYTES,
    ) -> None:
        """Write to `subject`; note: makes the event that stands for one that no message can hold."""
        self._nats = nats
        self._subject = subject
        self._write = write
        self._note = note
        self._split = split
        self._writer = uuid.uuid4().hex
        self._next_index = next_index
        self._last_sequence = last_sequence
        self._largest_waiting_bytes = largest_waiting_bytes
        self._waiting: asyncio.Queue[Message] = asyncio.Queue()
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._lost: StaleSequenceError | None = None

    async def append(self, event: E) -> None:
        """Take an event, to be stored in its order; waits while too much waits for NATS.

        StaleSequenceError: another process writes this log now.
        """
        await self._has_room.wait()
        if self._lost:
            raise self._lost
        for part in self._split(event):
            message = self._write(part, index=self._next_index, unix_nanos=time.time_ns())
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
            text = f"event {index} could not be kept: {error}"
            note: Any = self._write(self._note(text), index=index, unix_nanos=0)
            note.event_time.CopyFrom(message.event_time)  # type: ignore[attr-defined]
            self._last_sequence = await patiently(partial(publish, payload=note))


async def read_history(
    nats: NatsConnection,
    wire: JobWire[J],
    job_id: str,
    *,
    first_index: int,
    take: Callable[[Message], None],
    read_end: Callable[[Message], J | None],
) -> JobHistory[J]:
    """Hand over a whole log, and return where it ends. UnavailableError: NATS is away."""
    subject = wire.event.of(job_id)
    last = await nats.last(subject)
    if last is None:
        return JobHistory(next_index=first_index)
    last_message, last_sequence = last

    async def hand_over(message: Message, sequence: int) -> bool:
        take(message)
        return sequence >= last_sequence

    await replay(nats, subject, hand_over)
    return JobHistory(
        next_index=index_of(last_message) + 1,
        last_sequence=last_sequence,
        ended=read_end(last_message) if wire.is_end(last_message) else None,
    )


async def watch(
    nats: NatsConnection,
    wire: JobWire[J],
    job_id: str,
    start_index: int,
    *,
    ended: bool,
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Send the events of a job from `start_index` on, and those that come, until it ends.

    `ended`: whether it has already. UnavailableError: NATS is away at the beginning; later it is waited for.
    """
    subject = wire.event.of(job_id)
    last_index, last_sequence = start_index - 1, None
    if ended:
        last = await nats.last(subject)
        if last is None or index_of(last[0]) < start_index:
            return  # too old to be kept, or seen
        last_sequence = last[1]

    async def take(message: Message, sequence: int) -> bool:
        nonlocal last_index
        if (index := index_of(message)) > last_index:
            last_index = index
            await send(message)
        return wire.is_end(message) or sequence == last_sequence

    await replay(nats, subject, take)


async def replay(nats: NatsConnection, subject: Subject, take: Callable[[Message, int], Awaitable[bool]]) -> None:
    """Hand over all events of a job, and those that come, until `take` returns True or raises."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def hand_over(message: Message, sequence: int) -> None:
        if ended.done():
            return
        try:
            if await take(message, sequence):
                ended.set_result(None)
        except Exception as error:  # noqa: BLE001 for whoever replays, not for the log of messages that failed
            ended.set_exception(error)

    following = asyncio.ensure_future(nats.follow(subject, hand_over))
    try:
        await asyncio.wait([ended, following], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            following.result()
        ended.result()
    finally:
        following.cancel()
        await asyncio.wait([following])
