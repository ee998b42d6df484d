"""Keeps every worker supplied with requests, ahead of when it sends them.

Invariant: a request is given to one worker, once, in the order of the source; what is held in memory has a limit in
bytes, except where a load is sent all at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.domain.spec import Load, LoadKind
from llmpilot_loadtester.supervision.request_sources import SourceRequest
from llmpilot_loadtester.worker_messages import Kind, QueuedRequest, pack_message, pack_requests

Send = Callable[[bytes], Awaitable[None]]

AHEAD_NANOS = 5 * 10**9
"""How long before it is due a request of a schedule is given to its worker."""
_FEWEST_QUEUED = 64
"""Requests a worker of a closed loop has in stock, or 4 times its users, if there are more."""
_LEAST_QUEUED = 16
"""Requests a worker has in stock whatever their size."""
_QUEUED_BYTES = 16 << 20
"""Of the requests that a worker has in stock."""
_BUFFERED_BYTES = 32 << 20
"""Of the requests that were read and not yet given to a worker."""
_MESSAGE_COUNT = 64
_MESSAGE_BYTES = 1 << 20


class _Buffer:
    """Requests that were read and not yet given, with their offsets; the lanes of a closed loop share one."""

    def __init__(self) -> None:
        self.requests: deque[tuple[int, int, SourceRequest]] = deque()
        """Index, nanoseconds after the start or -1, request."""
        self.bytes = 0

    def add(self, index: int, offset_nanos: int, request: SourceRequest) -> None:
        self.requests.append((index, offset_nanos, request))
        self.bytes += len(request.body)

    def take(self) -> tuple[int, int, SourceRequest]:
        taken = self.requests.popleft()
        self.bytes -= len(taken[2].body)
        return taken


class _Lane:
    """What one worker has in stock: was given and has not sent."""

    def __init__(self, buffer: _Buffer, target_count: int) -> None:
        self.buffer = buffer
        self.target_count = target_count
        self.given_count = 0
        self.has_all = False
        """Whether the worker was told that there are no more."""
        self.changed = asyncio.Event()
        self._stock_bytes = 0
        self._sizes: deque[int] = deque()

    @property
    def has_room(self) -> bool:
        level = len(self._sizes)
        return level < _LEAST_QUEUED or (level < self.target_count and self._stock_bytes < _QUEUED_BYTES)

    def give(self, size_bytes: int) -> None:
        self.given_count += 1
        self._sizes.append(size_bytes)
        self._stock_bytes += size_bytes

    def note_sent(self, sent_count: int) -> None:
        while self._sizes and self.given_count - len(self._sizes) < sent_count:
            self._stock_bytes -= self._sizes.popleft()
        self.changed.set()


class RequestFeed:
    """The requests of one stage. `fill`, and `serve` for every worker, run as tasks until the stage ends."""

    def __init__(
        self,
        source: AsyncIterator[SourceRequest],
        load: Load,
        *,
        users_counts: Sequence[int],
        offsets: Iterator[int] | None,
    ) -> None:
        """users_counts: by worker; 0 where requests have a schedule.

        offsets: when requests are due, nanoseconds after the start; None: users are waited for, or the source says it.
        """
        self._source = source
        self._load = load
        self._offsets = offsets
        self._is_all_at_once = load.kind is LoadKind.ALL_AT_ONCE
        shared = _Buffer()
        self._lanes = [
            _Lane(
                shared if load.is_closed else _Buffer(),
                max(_FEWEST_QUEUED, 4 * users_count) if load.is_closed else 2**31,
            )
            for users_count in users_counts
        ]
        self._buffers = list({id(lane.buffer): lane.buffer for lane in self._lanes}.values())
        self._start_nanos: int | None = None
        self._read_count = 0
        self._last_offset_nanos = 0
        self._is_at_end = False
        self._room = asyncio.Event()
        self._primed = asyncio.Event()

    @property
    def buffered_bytes(self) -> int:
        """Of requests that were read and not yet given to a worker."""
        return sum(buffer.bytes for buffer in self._buffers)

    async def primed(self) -> None:
        """Wait until as much was read as the workers take before the start, or everything."""
        await self._primed.wait()

    def begin(self, start_nanos: int) -> None:
        """Say when time 0 is; `serve` comes after."""
        self._start_nanos = start_nanos

    def note_sent(self, worker: int, sent_count: int) -> None:
        """Take how many requests of the stage a worker has sent, by its last pulse."""
        self._lanes[worker].note_sent(sent_count)
        self._room.set()

    def has_sent_all(self, worker: int, sent_count: int) -> bool:
        """Whether a worker knows that there are no more requests, and has sent what it was given."""
        lane = self._lanes[worker]
        return lane.has_all and sent_count >= lane.given_count

    async def fill(self) -> None:
        """Read the source ahead. PreconditionError: it has no requests, or they lack the times that the load needs."""
        limit = self._load.request_count or None
        async with aclosing(self._source) as requests:  # type: ignore[type-var]
            async for request in requests:
                if not self._add(request):
                    break
                if limit is not None and self._read_count >= limit:
                    break
                if not self._read_count % _MESSAGE_COUNT:
                    await asyncio.sleep(0)  # a source that never waits
                while self._is_far_ahead():
                    self._primed.set()
                    self._room.clear()
                    await self._room.wait()
        if not self._read_count:
            raise PreconditionError("there are no requests to send: look at what the load test is to send")
        self._is_at_end = True
        self._primed.set()
        self._wake()

    async def serve(self, worker: int, send: Send) -> None:
        """Give requests to one worker, until it has all."""
        lane = self._lanes[worker]
        while True:
            lane.changed.clear()
            if batch := self._next_batch(lane):
                self._room.set()
                await send(pack_requests(batch))
            elif self._is_at_end and not lane.buffer.requests:
                break
            else:
                await lane.changed.wait()
        self._wake()  # lanes that share the buffer have come to its end, too
        await send(pack_message(Kind.NO_MORE_REQUESTS))
        lane.has_all = True

    def _add(self, request: SourceRequest) -> bool:
        """Put a request where its worker finds it; returns whether there was still a time to send it."""
        offset_nanos = -1
        if self._load.kind is LoadKind.TRACE:
            offset_nanos = self._own_offset(request)
        elif self._offsets is not None:
            due = next(self._offsets, None)
            if due is None:
                return False
            offset_nanos = due
        lane = self._lanes[self._read_count % len(self._lanes)]
        lane.buffer.add(self._read_count, offset_nanos, request)
        self._read_count += 1
        self._last_offset_nanos = offset_nanos
        if self._load.is_closed:
            self._wake()
        else:
            lane.changed.set()
        return True

    def _own_offset(self, request: SourceRequest) -> int:
        if request.arrival_offset_nanos is None:
            raise PreconditionError(
                "the requests have no arrival times, and the load is a trace: choose a workload model with arrivals, "
                "or another load"
            )
        return round(request.arrival_offset_nanos / self._load.speed)

    def _is_far_ahead(self) -> bool:
        if self._is_all_at_once:
            return False  # all must be there when it begins
        if self.buffered_bytes >= _BUFFERED_BYTES:
            return True
        if self._load.is_closed:
            wanted = sum(lane.target_count for lane in self._lanes)
            return len(self._buffers[0].requests) >= wanted
        return self._last_offset_nanos > self._elapsed_nanos() + AHEAD_NANOS

    def _elapsed_nanos(self) -> int:
        return 0 if self._start_nanos is None else max(time.time_ns() - self._start_nanos, 0)

    def _next_batch(self, lane: _Lane) -> list[QueuedRequest]:
        """Take what a worker should have now, at most a message."""
        assert self._start_nanos is not None  # noqa: S101 begin() comes first
        until_nanos = self._elapsed_nanos() + AHEAD_NANOS
        waiting = lane.buffer.requests
        batch: list[QueuedRequest] = []
        size_bytes = 0
        while waiting and len(batch) < _MESSAGE_COUNT and size_bytes < _MESSAGE_BYTES:
            if waiting[0][1] > until_nanos or not (lane.has_room or self._is_all_at_once):
                break
            index, offset_nanos, request = lane.buffer.take()
            lane.give(len(request.body))
            size_bytes += len(request.body)
            batch.append(
                QueuedRequest(
                    index=index,
                    body=request.body,
                    input_tokens=request.input_tokens,
                    scheduled_nanos=-1 if offset_nanos < 0 else self._start_nanos + offset_nanos,
                )
            )
        return batch

    def _wake(self) -> None:
        for lane in self._lanes:
            lane.changed.set()
