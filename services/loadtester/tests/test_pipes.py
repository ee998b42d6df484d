"""The pipe to a supervisor that reads slowly, or not at all: the event loop never waits for it."""

import os
from collections.abc import Iterator

import gevent
import pytest

from llmpilot_loadtester.engine import pipes
from llmpilot_loadtester.engine.pipes import Outbox

LIMIT_SECONDS = 10.0
LARGE = bytes(range(256)) * 20_000
"""Much more than a pipe holds."""


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """Where the supervisor reads, and where the worker writes."""
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def read_all(fd: int, size: int) -> bytes:
    """Reads so many bytes while the loop runs."""
    received = b""
    with gevent.Timeout(LIMIT_SECONDS):
        while len(received) < size:
            try:
                received += os.read(fd, 1 << 20)
            except BlockingIOError:
                gevent.sleep(0.001)
    return received


def test_a_full_pipe_stops_nobody_and_loses_nothing(ends: tuple[int, int]) -> None:
    outbox = Outbox(ends[1])
    assert all(outbox.put(message, droppable=True) for message in (b"first", LARGE, b"last"))
    outbox.drain(0.01)  # it is full: the limit ends the wait
    assert read_all(ends[0], len(LARGE) + 9) == b"first" + LARGE + b"last"
    with gevent.Timeout(LIMIT_SECONDS):
        outbox.drain(2 * LIMIT_SECONDS)
    assert outbox.put(b"again")
    assert os.read(ends[0], 100) == b"again"


def test_what_can_be_done_without_is_dropped_when_too_much_waits(
    ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "MOST_WAITING_BYTES", len(LARGE))
    outbox = Outbox(ends[1])
    assert outbox.put(LARGE, droppable=True)
    assert not outbox.put(LARGE, droppable=True)
    assert outbox.put(b"needed")
    assert read_all(ends[0], len(LARGE) + 6) == LARGE + b"needed"
    gevent.sleep(0)
    assert outbox.put(LARGE, droppable=True)


def test_a_supervisor_that_is_gone_takes_nothing_more() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    outbox = Outbox(writing)
    assert outbox.put(LARGE)
    os.close(reading)
    with gevent.Timeout(LIMIT_SECONDS):
        outbox.drain(2 * LIMIT_SECONDS)
    assert outbox.is_broken
    assert not outbox.put(b"more")
    os.close(writing)
