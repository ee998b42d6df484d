"""The two pipes of a worker: messages of the supervisor come in, records and pulses go out.

Invariant: nothing but messages reaches the supervisor, whatever prints; and the event loop never waits for a pipe.
"""

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent.event import Event
from gevent.hub import get_hub

from llmpilot_loadtester.worker_messages import Kind, MessageReader

_READ, _WRITE = 1, 2
_READ_BYTES = 1 << 20
_PIPE_BYTES = 1 << 20
MOST_WAITING_BYTES = 128 * 1024 * 1024
"""Of messages that a supervisor does not read; what can be done without is dropped beyond it."""


def take_over_pipes() -> tuple[int, int]:
    """Return new descriptors of standard input and output; what prints afterwards goes to standard error."""
    inbound, outbound = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 a device
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for fd in (inbound, outbound):
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError, AttributeError):  # not a pipe, or more than a user may have
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return inbound, outbound


class Inbox:
    """Calls `on_message` in the hub for every message, and `on_end` once when the supervisor has closed the pipe."""

    def __init__(self, fd: int, on_message: Callable[[Kind, bytes], None], on_end: Callable[[str], None]) -> None:
        """on_end: takes what was wrong with the pipe; empty: it was closed."""
        self._fd = fd
        self._on_message, self._on_end = on_message, on_end
        self._messages = MessageReader()
        self._watcher = get_hub().loop.io(fd, _READ)
        self._watcher.start(self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
            if not data:
                self._end("")
                return
            for kind, payload in self._messages.feed(data):
                self._on_message(kind, payload)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._end(f"what the supervisor says cannot be read: {error}")

    def _end(self, problem: str) -> None:
        self._watcher.stop()
        self._on_end(problem)


class Outbox:
    """Messages on their way to the supervisor."""

    def __init__(self, fd: int) -> None:
        self.is_broken = False
        """Whether the supervisor does not read any more."""
        self._fd = fd
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._watcher: Any = get_hub().loop.io(fd, _WRITE)
        self._is_watching = False
        self._empty = Event()
        self._empty.set()

    def put(self, message: bytes, *, droppable: bool = False) -> bool:
        """Send a message as soon as the pipe takes it; returns whether it was not dropped."""
        if self.is_broken or (droppable and self._waiting_bytes + len(message) > MOST_WAITING_BYTES):
            return False
        self._waiting.append(memoryview(message))
        self._waiting_bytes += len(message)
        self._write()
        return True

    def drain(self, limit_seconds: float) -> None:
        """Wait until everything was taken."""
        self._empty.wait(limit_seconds)

    def _write(self) -> None:
        try:
            while self._waiting:
                first = self._waiting[0]
                written_bytes = os.write(self._fd, first)
                self._waiting_bytes -= written_bytes
                if written_bytes == len(first):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = first[written_bytes:]
        except BlockingIOError:
            pass
        except OSError:
            self.is_broken = True
            self._waiting.clear()
        self._watch(bool(self._waiting))

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._is_watching:
            self._empty.clear()
            self._watcher.start(self._write)
        elif not wanted and self._is_watching:
            self._watcher.stop()
            self._empty.set()
        self._is_watching = wanted
