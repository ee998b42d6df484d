"""Events on their way out of a run, so that who takes them slowly does not hold up who measures.

Invariant: events leave in the order in which they were put, and none is lost but live metrics that are out of date.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from llmpilot_contracts.errors import UnavailableError
from llmpilot_loadtester.domain.events import LiveMetrics, RecordsCame, RunEvent

Emit = Callable[[RunEvent], Awaitable[None]]

MOST_WAITING_BYTES = 64 << 20
"""Of records: some minutes of them. Then workers are not read until there is room, and keep theirs."""


class EventOutbox:
    """Gives events to `emit`, one after another."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._waiting: deque[RunEvent] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Condition()
        self._is_emitting = False

    async def put(self, event: RunEvent) -> None:
        """Append an event; waits while too much waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting_bytes < MOST_WAITING_BYTES)
            if isinstance(event, LiveMetrics) and self._waiting and isinstance(self._waiting[-1], LiveMetrics):
                self._waiting.pop()
            self._waiting.append(event)
            self._waiting_bytes += _size_bytes(event)
            self._changed.notify_all()

    async def run(self) -> None:
        """Emit what comes, until cancelled. Raises what `emit` raises."""
        while True:
            async with self._changed:
                self._is_emitting = False
                self._changed.notify_all()
                await self._changed.wait_for(lambda: bool(self._waiting))
                event = self._waiting.popleft()
                self._waiting_bytes -= _size_bytes(event)
                self._is_emitting = True
            await self._emit(event)

    async def flush(self, limit_seconds: float) -> None:
        """Wait until everything was emitted; UnavailableError after the limit."""
        try:
            async with asyncio.timeout(limit_seconds), self._changed:
                await self._changed.wait_for(lambda: not self._waiting and not self._is_emitting)
        except TimeoutError as error:
            message = (
                f"{len(self._waiting)} events could not be stored within {limit_seconds:g} s: check that NATS runs"
            )
            raise UnavailableError(message) from error


def _size_bytes(event: RunEvent) -> int:
    return len(event.columns) if isinstance(event, RecordsCame) else 0
