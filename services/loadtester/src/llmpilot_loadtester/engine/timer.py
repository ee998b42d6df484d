"""A timer of the kernel (timerfd) in the gevent hub: libev's own timers have steps of a millisecond.

Invariant: a timer that fires was set to that time or an earlier one. Source: timerfd_create(2).
"""

import ctypes
import os
from collections.abc import Callable

from gevent.hub import Hub, get_hub

_READ = 1
_CLOCKS = {"realtime": 0, "monotonic": 1}
_NONBLOCK_CLOEXEC = 0o2004000
_ABSOLUTE = 1
_NANOS = 1_000_000_000


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


_libc = ctypes.CDLL(None, use_errno=True)


class KernelTimer:
    """One timer: set again and again, it calls `on_time` in the hub."""

    def __init__(self, on_time: Callable[[], None], *, clock: str = "monotonic", hub: Hub | None = None) -> None:
        """clock: "realtime" or "monotonic". Raises OSError where the kernel has no timerfd."""
        create = getattr(_libc, "timerfd_create", None)
        if create is None:
            raise OSError("this kernel has no timerfd")
        self._fd = create(_CLOCKS[clock], _NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._set = _libc.timerfd_settime
        self._spec = _Itimerspec()
        self._pointer = ctypes.byref(self._spec)
        self._on_time = on_time
        self._watcher = (hub or get_hub()).loop.io(self._fd, _READ)
        self._watcher.start(self._fire)

    def set_after(self, nanos: int) -> None:
        """Fire once, so many nanoseconds from now, at least one."""
        self._spec.value[0], self._spec.value[1] = divmod(max(nanos, 1), _NANOS)
        self._set(self._fd, 0, self._pointer, None)

    def set_at(self, nanos: int) -> None:
        """Fire once at a time of the timer's clock; at once if it has passed."""
        self._spec.value[0], self._spec.value[1] = divmod(max(nanos, 1), _NANOS)
        self._set(self._fd, _ABSOLUTE, self._pointer, None)

    def close(self) -> None:
        """Never fire again."""
        self._watcher.stop()
        self._watcher.close()
        os.close(self._fd)

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # set again before it was read
        self._on_time()
