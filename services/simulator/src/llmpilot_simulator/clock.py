"""The clocks of the real-time server, and an alarm finer than the event loop's own timers.

Invariant: things are scheduled on the monotonic clock, which never jumps, and reported on the wall clock, which the
kernel's receive timestamps use.
Source of the alarm: asyncio rounds its timers up to a millisecond, the resolution of epoll_wait; timerfd_create(2) has
the resolution of the hardware.
"""

import asyncio
import ctypes
import os
import platform
import time
from collections.abc import Callable
from typing import Any, Protocol

NANOS_PER_SECOND = 1_000_000_000

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = 0o2004000
_TFD_TIMER_ABSTIME = 1


def nanos(seconds: float) -> int:
    """Return whole nanoseconds."""
    return round(seconds * NANOS_PER_SECOND)


class Clock(Protocol):
    """What the server reads the time from."""

    def monotonic_nanos(self) -> int:
        """Return nanoseconds since any origin; never goes back."""
        ...

    def wall_nanos(self) -> int:
        """Return nanoseconds since the epoch (CLOCK_REALTIME)."""
        ...


class SystemClock:
    """The clocks of this machine."""

    monotonic_nanos = staticmethod(time.monotonic_ns)
    wall_nanos = staticmethod(time.time_ns)


class Alarm(Protocol):
    """Calls back at the time it was last set to; the callback sets it again, to None at least."""

    def set(self, due_nanos: int | None) -> None:
        """Replace the time of the next call; one in the past calls at once, from the event loop. None: no call."""
        ...

    def close(self) -> None:
        """Call back no more."""
        ...


def create_alarm(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Alarm:
    """Return the finest alarm that this platform has."""
    if platform.system() == "Linux":
        return TimerFdAlarm(loop, callback)
    return LoopAlarm(loop, callback)


class LoopAlarm:
    """An alarm by the event loop's own timers: a millisecond late at worst on Linux."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def set(self, due_nanos: int | None) -> None:
        """Replace the time of the next call."""
        self.close()
        if due_nanos is None:
            return
        delay_seconds = (due_nanos - time.monotonic_ns()) / NANOS_PER_SECOND
        self._handle = self._loop.call_later(max(delay_seconds, 0.0), self._callback)

    def close(self) -> None:
        """Call back no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanos", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class TimerFdAlarm:
    """An alarm by a Linux timer that the event loop polls like a socket.

    The timer is set through ctypes: os.timerfd_create came with Python 3.13. Setting it also forgets an expiration, so
    the descriptor is never read and the callback must set it, to None at least.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        libc: Any = ctypes.PyDLL(
            None, use_errno=True
        )  # these calls do not block: keeping the interpreter's lock is cheaper
        self._settime = libc.timerfd_settime
        self._descriptor: int = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._spec = _TimerSpec()
        self._pointer = ctypes.byref(self._spec)
        self._loop = loop
        loop.add_reader(self._descriptor, callback)

    def set(self, due_nanos: int | None) -> None:
        """Replace the time of the next call."""
        value = self._spec.value
        value.seconds, value.nanos = (0, 0) if due_nanos is None else divmod(max(due_nanos, 1), NANOS_PER_SECOND)
        self._settime(self._descriptor, _TFD_TIMER_ABSTIME, self._pointer, None)

    def close(self) -> None:
        """Call back no more."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
