"""When tokens leave: by a model of the server, or at a fixed rate.

Invariant: the times depend on the requests alone, never on how late the process was, except for when a request arrives.
"""

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_simulator.clock import NANOS_PER_SECOND, nanos
from llmpilot_simulator.realtime import Outlet, Ticket

OUT_OF_MEMORY = "CUDA out of memory (simulated): the batch holds more tokens than the memory of the GPU"


class FixedPace:
    """Every request is alone: token i is due `ttft_seconds + i * itl_seconds` after arrival.

    What a load tester should report against this server is known by construction.
    """

    used_memory_share = 0.0
    waiting_count = preemption_count = prefix_hit_tokens = prefix_query_tokens = 0

    def __init__(self, *, ttft_seconds: float, itl_seconds: float) -> None:
        self._ttft_nanos = nanos(ttft_seconds)
        self._itl_nanos = nanos(itl_seconds)
        self._running: set[Ticket] = set()

    @property
    def running_count(self) -> int:
        """Requests that have tokens to come."""
        return len(self._running)

    def attach(self, outlet: Outlet) -> None:
        """Learn where tokens leave."""
        self._outlet = outlet

    def submit(self, ticket: Ticket) -> None:
        """Make the appointment of the first token."""
        self._running.add(ticket)
        due_nanos = ticket.arrival_nanos + self._ttft_nanos
        self._outlet.at(due_nanos, _FixedTurn(self, self._outlet, ticket, due_nanos, self._itl_nanos))

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its appointment will find it closed."""
        self._running.discard(ticket)


class _FixedTurn:
    """The appointment of a request's next token, one object for all of them."""

    __slots__ = ("_due_nanos", "_itl_nanos", "_outlet", "_pace", "_ticket")

    def __init__(self, pace: FixedPace, outlet: Outlet, ticket: Ticket, due_nanos: int, itl_nanos: int) -> None:
        self._pace = pace
        self._outlet = outlet
        self._ticket = ticket
        self._due_nanos = due_nanos
        self._itl_nanos = itl_nanos

    def fire(self) -> None:
        """Deliver the token and make the next appointment."""
        ticket, due_nanos = self._ticket, self._due_nanos
        if not ticket.is_open:
            return
        if self._outlet.deliver(ticket, due_nanos):
            self._due_nanos = due_nanos = due_nanos + self._itl_nanos
            self._outlet.at(due_nanos, self)
        else:
            self._pace.cancel(ticket)


class BatchedPace:
    """The steps of a modelled server in real time: the tokens of a step leave at its modelled end.

    frontend_seconds_per_token: what the API server in front of the model takes for a token, one after the other; 0 lets
    the tokens of a step leave at the same instant.
    """

    def __init__(self, engine: Engine, *, frontend_seconds_per_token: float = 0.0) -> None:
        self._engine = engine
        self._frontend_nanos = nanos(frontend_seconds_per_token)
        self._frontend_free_nanos = 0
        """When the API server has sent what the model has given it."""
        self._tickets: dict[int, Ticket] = {}
        """By slot."""
        self._step_end_nanos: int | None = None
        """Of the step in progress; None: idle."""
        self._free_nanos = 0
        """When the last step ended."""

    @property
    def running_count(self) -> int:
        """Requests in the batch."""
        return self._engine.running_count

    @property
    def waiting_count(self) -> int:
        """Requests in the queue."""
        return self._engine.waiting_count

    @property
    def used_memory_share(self) -> float:
        """Of the memory for the context of requests, how much is taken."""
        return self._engine.used_memory_share

    @property
    def preemption_count(self) -> int:
        """Since the start."""
        return self._engine.preemption_count

    @property
    def prefix_hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache since the start."""
        return self._engine.prefix_hit_tokens

    @property
    def prefix_query_tokens(self) -> int:
        """Prompt tokens looked up in the prefix cache since the start."""
        return self._engine.prefix_query_tokens

    def attach(self, outlet: Outlet) -> None:
        """Learn where tokens leave; the model's time starts at 0 now, where its seconds are exact."""
        self._outlet = outlet
        self._origin_nanos = outlet.now_nanos()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request; an idle server starts a step with it at once. Raises what `Engine.submit` raises."""
        while self._step_end_nanos is not None and self._step_end_nanos <= ticket.arrival_nanos:
            self._end_step(self._step_end_nanos)  # overdue: the next step began without this request
        generation = ticket.generation
        ticket.slot = self._engine.submit(
            arrival_seconds=self._seconds(ticket.arrival_nanos),
            input_tokens=generation.input_tokens,
            output_tokens=ticket.token_count,
            max_output_tokens=ticket.max_tokens,
            block_hashes=generation.block_hashes,
        )
        self._tickets[ticket.slot] = ticket
        if self._step_end_nanos is None:
            self._start_step(max(ticket.arrival_nanos, self._free_nanos))

    def cancel(self, ticket: Ticket) -> None:
        """Free a request's place before the next step."""
        if self._tickets.get(ticket.slot) is ticket:
            self._engine.cancel(ticket.slot)
            del self._tickets[ticket.slot]

    def fire(self) -> None:
        """End the step, if it is still the one that this appointment was made for."""
        end_nanos = self._step_end_nanos
        if end_nanos is not None and end_nanos <= self._outlet.now_nanos():
            self._end_step(end_nanos)

    def _end_step(self, end_nanos: int) -> None:
        """Send the step's tokens and start the next one where this one ended, however late it is now."""
        outcome = self._engine.finish_step()
        tickets = self._tickets
        emitted = [tickets[slot] for slot in outcome.token_slots.tolist()]
        failed = [tickets.pop(slot) for slot in outcome.failed_slots.tolist()]
        for slot in outcome.finished_slots.tolist():
            del tickets[slot]
        self._emit(emitted, end_nanos)
        for ticket in failed:
            self._outlet.fail(ticket, OUT_OF_MEMORY)
        self._free_nanos = end_nanos
        self._start_step(end_nanos)

    def _emit(self, emitted: list[Ticket], end_nanos: int) -> None:
        outlet = self._outlet
        if not self._frontend_nanos:
            for ticket in emitted:
                if ticket.is_open:
                    outlet.deliver(ticket, end_nanos)
            return
        due_nanos = max(self._frontend_free_nanos, end_nanos)
        for ticket in emitted:
            if ticket.is_open:
                due_nanos += self._frontend_nanos
                outlet.at(due_nanos, _FrontendTurn(outlet, ticket, due_nanos))
        self._frontend_free_nanos = due_nanos

    def _start_step(self, now_nanos: int) -> None:
        end_seconds = self._engine.start_step(self._seconds(now_nanos))
        if end_seconds is None:
            self._step_end_nanos = None
            return
        self._step_end_nanos = end_nanos = self._origin_nanos + nanos(end_seconds)
        self._outlet.at(end_nanos, self)

    def _seconds(self, monotonic_nanos: int) -> float:
        return (monotonic_nanos - self._origin_nanos) / NANOS_PER_SECOND


class _FrontendTurn:
    """The appointment of one token with the API server."""

    __slots__ = ("_due_nanos", "_outlet", "_ticket")

    def __init__(self, outlet: Outlet, ticket: Ticket, due_nanos: int) -> None:
        self._outlet = outlet
        self._ticket = ticket
        self._due_nanos = due_nanos

    def fire(self) -> None:
        """Send the token."""
        if self._ticket.is_open:
            self._outlet.deliver(self._ticket, self._due_nanos)
