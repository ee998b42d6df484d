"""The real-time core: takes requests in, and says when each of their tokens leaves.

Invariant: a token is never early; when the process is late, later tokens are not (the model's clock does not drift).
There is one alarm for everything, and no task and no timer per request or token. It belongs to one event loop.

    reply text (generation.py) -> RealTimeServer -> sink of the protocol (http_stream.py, servicer.py)
                                    |  ^
                            Pace: when (pace.py)
"""

import asyncio
from typing import Protocol

from llmpilot_simulator.clock import Alarm, Clock, SystemClock, create_alarm
from llmpilot_simulator.generation import Generation
from llmpilot_simulator.metrics import Load, Statistics
from llmpilot_simulator.wheel import TimerWheel

TICK_NANOS = 250_000
"""How late the wheel may make a token. Waking up costs as much as a token or two, so finer ticks spend the core."""


class TokenSink(Protocol):
    """Where the tokens of one reply go. It is called from the event loop and must not block."""

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Send `count` tokens now; `due_nanos` is when the model says they leave, on the wall clock."""
        ...

    def on_end(self, failure: str | None) -> None:
        """Nothing follows. failure: why the server gave up on the request; None: that was its last token."""
        ...


class Appointment(Protocol):
    """Something to do at a time."""

    def fire(self) -> None:
        """Do it."""
        ...


class Ticket:
    """A request that is being served."""

    __slots__ = (
        "arrival_nanos",
        "generation",
        "is_open",
        "last_nanos",
        "max_tokens",
        "next_index",
        "sink",
        "slot",
        "token_count",
    )

    def __init__(self, generation: Generation, sink: TokenSink, *, max_tokens: int | None, arrival_nanos: int) -> None:
        self.generation = generation
        self.sink = sink
        self.max_tokens = max_tokens
        self.arrival_nanos = arrival_nanos
        """On the monotonic clock."""
        self.token_count = len(generation.pieces)
        self.next_index = 0
        self.last_nanos = arrival_nanos
        self.slot = -1
        """The pace's own."""
        self.is_open = True


class Outlet(Protocol):
    """What a pace works with."""

    def now_nanos(self) -> int:
        """Return the time on the monotonic clock."""
        ...

    def at(self, due_nanos: int, appointment: Appointment) -> None:
        """Fire an appointment at a time, or at once if that is past."""
        ...

    def deliver(self, ticket: Ticket, due_nanos: int) -> bool:
        """Send the ticket's next token; returns whether more are to come."""
        ...

    def fail(self, ticket: Ticket, failure: str) -> None:
        """Give up on a request."""
        ...


class Pace(Load, Protocol):
    """Decides when tokens leave."""

    def attach(self, outlet: Outlet) -> None:
        """Learn where tokens leave; called once, before anything else."""
        ...

    def submit(self, ticket: Ticket) -> None:
        """Take a request in; raises InvalidInputError for one that can never be served."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request that has not ended."""
        ...


class RealTimeServer:
    """Requests in, tokens out, on time."""

    def __init__(self, pace: Pace, *, clock: Clock | None = None, tick_nanos: int = TICK_NANOS) -> None:
        self._pace = pace
        self._clock = clock or SystemClock()
        self._wheel: TimerWheel[Appointment] = TimerWheel(tick_nanos)
        self._alarm: Alarm = create_alarm(asyncio.get_running_loop(), self._wake)
        self._alarm_nanos: int | None = None
        self._is_firing = False
        self._wall_offset = self._clock.wall_nanos() - self._clock.monotonic_nanos()
        self._open_count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.statistics = Statistics()
        pace.attach(self)

    @property
    def load(self) -> Load:
        """What the scheduler is busy with."""
        return self._pace

    @property
    def open_count(self) -> int:
        """Requests taken in and not ended."""
        return self._open_count

    def submit(
        self,
        generation: Generation,
        sink: TokenSink,
        *,
        max_tokens: int | None = None,
        arrival_nanos: int | None = None,
    ) -> Ticket:
        """Take a request in.

        max_tokens: what the scheduler must reserve for; None: as many as will be generated.
        arrival_nanos: when it arrived, on the monotonic clock; None: now.
        Raises InvalidInputError for a request that can never be scheduled.
        """
        arrival_nanos = self.now_nanos() if arrival_nanos is None else arrival_nanos
        ticket = Ticket(generation, sink, max_tokens=max_tokens, arrival_nanos=arrival_nanos)
        self._pace.submit(ticket)
        self._open_count += 1
        self._idle.clear()
        return ticket

    def cancel(self, ticket: Ticket, *, failure: str | None = None) -> None:
        """Forget a request, whose place is free before the next step; nothing happens to one that has ended.

        failure: tell the sink that the server gave up; None: the client did, and nobody is told.
        """
        if ticket.is_open:
            self._close(ticket, "abort" if failure is None else "error")
            self._pace.cancel(ticket)
            if failure is not None:
                ticket.sink.on_end(failure)

    async def wait_idle(self) -> None:
        """Wait until every request has ended."""
        await self._idle.wait()

    def close(self) -> None:
        """Send nothing more."""
        self._alarm.close()

    def now_nanos(self) -> int:
        """Return the time on the monotonic clock."""
        return self._clock.monotonic_nanos()

    def wall_nanos_of(self, monotonic_nanos: int) -> int:
        """Return a time of the monotonic clock on the wall clock, as the two stand now."""
        return monotonic_nanos + self._clock.wall_nanos() - self._clock.monotonic_nanos()

    def at(self, due_nanos: int, appointment: Appointment) -> None:
        """Fire an appointment at a time, or at once if that is past."""
        self._wheel.add(due_nanos, appointment)
        if not self._is_firing and (self._alarm_nanos is None or due_nanos < self._alarm_nanos):
            self._set_alarm()

    def deliver(self, ticket: Ticket, due_nanos: int) -> bool:
        """Send the ticket's next token; returns whether more are to come."""
        index = ticket.next_index
        statistics = self.statistics
        gap_nanos = due_nanos - ticket.last_nanos
        if index:
            statistics.inter_token_latency.observe(gap_nanos)
        else:
            statistics.time_to_first_token.observe(gap_nanos)
            statistics.prompt_tokens += ticket.generation.input_tokens
        statistics.generation_tokens += 1
        ticket.last_nanos = due_nanos
        ticket.next_index = index + 1
        ticket.sink.on_tokens(index, 1, due_nanos + self._wall_offset)
        if not ticket.is_open:  # the sink gave it up
            return False
        if index + 1 < ticket.token_count:
            return True
        self._close(ticket, "length" if ticket.generation.finish_reason == "length" else "stop")
        statistics.request_latency.observe(due_nanos - ticket.arrival_nanos)
        ticket.sink.on_end(None)
        return False

    def fail(self, ticket: Ticket, failure: str) -> None:
        """Give up on a request."""
        if ticket.is_open:
            self._close(ticket, "error")
            ticket.sink.on_end(failure)

    def _close(self, ticket: Ticket, reason: str) -> None:
        ticket.is_open = False
        self.statistics.finished[reason] += 1
        self._open_count -= 1
        if not self._open_count:
            self._idle.set()

    def _wake(self) -> None:
        now_nanos = self._clock.monotonic_nanos()
        self._wall_offset = self._clock.wall_nanos() - now_nanos
        due = list(self._wheel.take_due(now_nanos))
        self._is_firing = True
        fired = 0
        try:
            for appointment in due:
                fired += 1
                appointment.fire()
        finally:
            self._is_firing = False
            for appointment in due[fired:]:  # one of them raised: the others are still due
                self._wheel.add(now_nanos, appointment)
            self._set_alarm()

    def _set_alarm(self) -> None:
        self._alarm_nanos = self._wheel.next_nanos()
        self._alarm.set(self._alarm_nanos)
