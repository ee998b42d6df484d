"""The real-time core in an event loop, with sinks that keep what they get."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from llmpilot_simulator.generation import Generation
from llmpilot_simulator.pace import FixedPace
from llmpilot_simulator.realtime import RealTimeServer

DEADLINE_SECONDS = 30
MILLISECOND = 1_000_000


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []
        """Index, and when it was due."""
        self.received_nanos: list[int] = []
        self.ends: list[str | None] = []
        self.ended = asyncio.Event()

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Keep them."""
        self.tokens += [(index, due_nanos) for index in range(first_index, first_index + count)]
        self.received_nanos.append(time.time_ns())

    def on_end(self, failure: str | None) -> None:
        """Keep it."""
        self.ends.append(failure)
        self.ended.set()


class Failing(Kept):
    """A sink with a bug."""

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Fail."""
        raise RuntimeError(f"a bug with {count} token at {first_index}, due {due_nanos}")


def reply(tokens: int) -> Generation:
    return Generation(
        input_tokens=3,
        tokens=("x",) * tokens,
        pieces=("x",) * tokens,
        finish_reason="length",
        stop_sequence=None,
        block_hashes=np.empty(0, np.int64),
    )


def serve(work: Callable[[RealTimeServer], Awaitable[None]], *, ttft_ms: float, itl_ms: float) -> RealTimeServer:
    """Do some work with a server at a fixed pace."""

    async def main() -> RealTimeServer:
        server = RealTimeServer(FixedPace(ttft_seconds=ttft_ms / 1000, itl_seconds=itl_ms / 1000))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await work(server)
        finally:
            server.close()
        return server

    return asyncio.run(main())


def test_tokens_come_once_in_order_at_their_times_and_then_the_end() -> None:
    sink = Kept()
    arrivals: list[int] = []

    async def work(server: RealTimeServer) -> None:
        arrivals.append(time.time_ns())
        server.submit(reply(4), sink)
        assert server.open_count == 1
        await server.wait_idle()

    server = serve(work, ttft_ms=5, itl_ms=2)

    assert [index for index, _ in sink.tokens] == [0, 1, 2, 3]
    due = [nanos for _, nanos in sink.tokens]
    assert np.diff(due) / MILLISECOND == pytest.approx([2, 2, 2], abs=0.2)
    assert (due[0] - arrivals[0]) / MILLISECOND >= 5 - 0.2
    assert all(received >= nanos for received, nanos in zip(sink.received_nanos, due, strict=True))
    assert sink.ends == [None]
    assert server.open_count == 0
    assert server.statistics.finished["length"] == 1


def test_a_cancelled_request_sends_nothing_more_and_ends_once() -> None:
    sink = Kept()

    async def work(server: RealTimeServer) -> None:
        ticket = server.submit(reply(4), sink)
        server.cancel(ticket)
        server.cancel(ticket)
        await server.wait_idle()

    server = serve(work, ttft_ms=0, itl_ms=0)

    assert (sink.tokens, sink.ends) == ([], [])
    assert server.statistics.finished["abort"] == 1
    assert server.load.running_count == 0


def test_a_request_that_the_server_gives_up_is_told_why() -> None:
    sink = Kept()

    async def work(server: RealTimeServer) -> None:
        server.cancel(server.submit(reply(4), sink), failure="out of memory")

    server = serve(work, ttft_ms=0, itl_ms=0)

    assert sink.ends == ["out of memory"]
    assert server.statistics.finished["error"] == 1


def test_a_sink_that_fails_does_not_silence_the_others() -> None:
    """They are due in the same tick, before it and after it."""
    sinks = [Kept(), Failing(), Kept()]
    errors: list[str] = []

    async def work(server: RealTimeServer) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(str(context["exception"])))
        arrival_nanos = server.now_nanos()
        tickets = [server.submit(reply(3), sink, arrival_nanos=arrival_nanos) for sink in sinks]
        await sinks[0].ended.wait()
        await sinks[2].ended.wait()
        server.cancel(tickets[1])
        await server.wait_idle()

    serve(work, ttft_ms=1, itl_ms=1)

    assert [len(sink.tokens) for sink in sinks] == [3, 0, 3]
    assert len(errors) == 1
    assert errors[0].startswith("a bug with 1 token at 0")


def test_an_earlier_request_is_not_kept_waiting_by_a_later_alarm() -> None:
    late, early = Kept(), Kept()

    async def work(server: RealTimeServer) -> None:
        now_nanos = server.now_nanos()
        server.submit(reply(1), late, arrival_nanos=now_nanos + 3600 * 1000 * MILLISECOND)
        server.submit(reply(1), early, arrival_nanos=now_nanos)
        await early.ended.wait()

    serve(work, ttft_ms=1, itl_ms=1)

    assert late.tokens == []
