"""Lets a greenlet sleep until a time of the wall clock, for arrivals that must be on time.

Invariant: it never wakes early, and late by tens of microseconds unless the hub is busy.
"""

import time
from typing import Any

import gevent
from gevent.hub import get_hub

from llmpilot_loadtester.engine.timer import KernelTimer

_NANOS = 1_000_000_000


class Pacer:
    """Lets one greenlet at a time sleep until a time of the wall clock, to within tens of microseconds."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._sleeper: Any = None
        try:
            self._timer: KernelTimer | None = KernelTimer(self._wake, clock="realtime")
        except OSError:
            self._timer = None

    def sleep_until(self, realtime_nanos: int) -> None:
        """Return at that time; at once if it has passed."""
        left_nanos = realtime_nanos - time.time_ns()
        if left_nanos <= 0:
            return
        if self._timer is None:
            gevent.sleep(left_nanos / _NANOS)
            return
        self._timer.set_at(realtime_nanos)
        self._sleeper = gevent.getcurrent()
        try:
            self._hub.switch()
        finally:
            self._sleeper = None

    def close(self) -> None:
        """Give the timer back."""
        if self._timer is not None:
            self._timer.close()

    def _wake(self) -> None:
        if self._sleeper is not None:
            self._sleeper.switch()
