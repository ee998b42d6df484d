"""Watches every socket of the process in one epoll inside the gevent hub.

A wake-up serves all sockets that are ready by then, the more the busier the process is; the times of the parts are
the kernel's and do not suffer. Invariant: what is watched is called from the hub, never from a greenlet, and must not
switch.
"""

import select
import sys
from collections.abc import Callable
from typing import Any

from gevent import monkey
from gevent.hub import get_hub

from llmpilot_loadtester.engine.sockets import keep_stamping

_READ = 1
_BATCH = 1024


class Reader:
    """Calls whoever has something to read."""

    def __init__(self) -> None:
        self.read_count = 0
        """Times that a socket had something to read."""
        self._loop = get_hub().loop
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._watchers: dict[int, Any] = {}
        self._stamping = keep_stamping()
        make_epoll = _original_epoll()
        self._epoll = make_epoll() if make_epoll else None
        if self._epoll is not None:
            self._watcher = self._loop.io(self._epoll.fileno(), _READ)
            self._watcher.start(self._on_ready)

    def add(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` whenever `fd` has something to read or is closed by its peer."""
        if self._epoll is not None:
            self._callbacks[fd] = on_readable
            self._epoll.register(fd, select.POLLIN)
        else:
            watcher = self._watchers[fd] = self._loop.io(fd, _READ)
            watcher.start(self._on_one, on_readable)

    def remove(self, fd: int) -> None:
        """Watch `fd` no longer; before it is closed."""
        if self._epoll is not None:
            self._callbacks.pop(fd)
            self._epoll.unregister(fd)
        else:
            watcher = self._watchers.pop(fd)
            watcher.stop()
            watcher.close()

    def close(self) -> None:
        """Watch nothing any longer."""
        for fd in [*self._callbacks, *self._watchers]:
            self.remove(fd)
        self._stamping.close()
        if self._epoll is not None:
            self._watcher.stop()
            self._watcher.close()
            self._epoll.close()

    def _on_ready(self) -> None:
        assert self._epoll is not None, "watched"  # noqa: S101
        callbacks = self._callbacks
        ready = self._epoll.poll(0, _BATCH)
        self.read_count += len(ready)
        for fd, _ in ready:
            callback = callbacks.get(fd)
            if callback is None:  # removed by a callback before it
                continue
            try:
                callback()
            except Exception:  # noqa: BLE001 gevent stops a watcher that raises: every connection would be deaf
                get_hub().handle_error(callback, *sys.exc_info())

    def _on_one(self, callback: Callable[[], None]) -> None:
        self.read_count += 1
        callback()


def _original_epoll() -> Callable[[], "select.epoll"] | None:
    """Return epoll, which gevent's monkey patch takes away; None where the kernel has none."""
    try:
        return monkey.get_original("select", "epoll")  # type: ignore[no-any-return]
    except AttributeError:
        return None
