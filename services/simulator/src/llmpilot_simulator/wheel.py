"""A timer wheel: many appointments, few alarms.

Invariant: an appointment is never early and at most one tick late, whatever else is due; those of one tick keep the
order in which they were made.
"""

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


class TimerWheel(Generic[T]):
    """Items by the tick at which they are due; a tick without items costs nothing."""

    __slots__ = ("_buckets", "_ticks", "tick_nanos")

    def __init__(self, tick_nanos: int) -> None:
        self.tick_nanos = tick_nanos
        self._buckets: dict[int, list[T]] = {}
        self._ticks: list[int] = []
        """A heap of the keys of `_buckets`."""

    def add(self, due_nanos: int, item: T) -> None:
        """Make an appointment."""
        tick = -(-due_nanos // self.tick_nanos)
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = [item]
            heappush(self._ticks, tick)
        else:
            bucket.append(item)

    def next_nanos(self) -> int | None:
        """Return when the next tick with an item is; None: there is none."""
        return self._ticks[0] * self.tick_nanos if self._ticks else None

    def take_due(self, now_nanos: int) -> Iterable[T]:
        """Remove and return what is due, in the order of its ticks."""
        last = now_nanos // self.tick_nanos
        ticks = self._ticks
        if not ticks or ticks[0] > last:
            return ()
        due = self._buckets.pop(heappop(ticks))
        while ticks and ticks[0] <= last:
            due.extend(self._buckets.pop(heappop(ticks)))
        return due

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))
