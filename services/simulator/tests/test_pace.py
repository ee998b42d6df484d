"""When tokens leave, in virtual time: a timeline fires appointments, on time or late, and keeps what is delivered."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import TgisPolicy, Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.generation import Generation
from llmpilot_simulator.pace import OUT_OF_MEMORY, BatchedPace, FixedPace
from llmpilot_simulator.realtime import Appointment, Pace, Ticket

MILLISECOND = 1_000_000
START = 1_000_000 * 1_000 * MILLISECOND
"""A machine that has been up for eleven days."""

Delivered = list[tuple[str, int, float]]
"""Request, token, milliseconds since the start at which it was due."""


class Silent:
    """A sink that needs nothing."""

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Ignore them."""

    def on_end(self, failure: str | None) -> None:
        """Ignore it."""


class Timeline:
    """An Outlet in virtual time. lag_ms: how late the process is for every appointment."""

    def __init__(self, pace: Pace, *, lag_ms: float = 0) -> None:
        self.pace = pace
        self.lag_nanos = round(lag_ms * MILLISECOND)
        self.delivered: Delivered = []
        self.failures: dict[str, str] = {}
        self._now_nanos = START
        self._appointments: list[tuple[int, int, Appointment]] = []
        self._numbers = count()
        self._names: dict[Ticket, str] = {}
        pace.attach(self)

    def now_nanos(self) -> int:
        """Return the virtual time."""
        return self._now_nanos

    def at(self, due_nanos: int, appointment: Appointment) -> None:
        """Keep an appointment."""
        heappush(self._appointments, (due_nanos, next(self._numbers), appointment))

    def deliver(self, ticket: Ticket, due_nanos: int) -> bool:
        """Keep when a token was due."""
        assert due_nanos <= self._now_nanos, "a token left early"
        self.delivered.append((self._names[ticket], ticket.next_index, (due_nanos - START) / MILLISECOND))
        ticket.next_index += 1
        ticket.is_open = ticket.next_index < ticket.token_count
        return ticket.is_open

    def fail(self, ticket: Ticket, failure: str) -> None:
        """Keep why a request failed."""
        ticket.is_open = False
        self.failures[self._names[ticket]] = failure

    def run(self, until_ms: float = float("inf")) -> None:
        """Fire what is due until then."""
        while self._appointments and self._appointments[0][0] <= START + until_ms * MILLISECOND:
            due_nanos, _, appointment = heappop(self._appointments)
            self._now_nanos = max(self._now_nanos, due_nanos + self.lag_nanos)
            appointment.fire()

    def submit(self, name: str, at_ms: float, *, tokens: int, input_tokens: int = 8) -> Ticket:
        """Take a request in at a time that has come."""
        self._now_nanos = max(self._now_nanos, START + round(at_ms * MILLISECOND))
        generation = Generation(
            input_tokens=input_tokens,
            tokens=("x",) * tokens,
            pieces=("x",) * tokens,
            finish_reason="length",
            stop_sequence=None,
            block_hashes=np.empty(0, np.int64),
        )
        arrival_nanos = START + round(at_ms * MILLISECOND)
        ticket = Ticket(generation, Silent(), max_tokens=None, arrival_nanos=arrival_nanos)
        self._names[ticket] = name
        self.pace.submit(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Do what the server does for a client that leaves."""
        ticket.is_open = False
        self.pace.cancel(ticket)


def engine(**changes: object) -> Engine:
    """Steps of 10 ms that decode, of 20 ms that have a prompt in them, whatever else is in them."""
    constants = StepConstants(
        decode_seconds=0.010,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=0.020,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    )
    policy = Vllm1Policy(block_count=64, enable_prefix_caching=False)
    return Engine(**({"policy": policy, "tables": constants.tables(), "capacity": 16} | changes))  # type: ignore[arg-type]


def of(delivered: Delivered, name: str) -> list[float]:
    return [due for request, _, due in delivered if request == name]


def test_at_a_fixed_pace_token_i_is_due_ttft_and_i_itl_after_arrival() -> None:
    line = Timeline(FixedPace(ttft_seconds=0.050, itl_seconds=0.010))
    line.submit("a", 0, tokens=4)
    line.submit("b", 3, tokens=2)
    line.run()

    assert of(line.delivered, "a") == [50, 60, 70, 80]
    assert of(line.delivered, "b") == [53, 63]


def test_at_a_fixed_pace_a_late_process_does_not_move_later_tokens() -> None:
    line = Timeline(FixedPace(ttft_seconds=0.050, itl_seconds=0.010), lag_ms=37)
    line.submit("a", 0, tokens=4)
    line.run()

    assert of(line.delivered, "a") == [50, 60, 70, 80]


def test_at_a_fixed_pace_requests_run_until_their_end_or_cancellation() -> None:
    pace = FixedPace(ttft_seconds=0.050, itl_seconds=0.010)
    line = Timeline(pace)
    line.submit("a", 0, tokens=1)
    leaving = line.submit("b", 0, tokens=9)
    assert pace.running_count == 2

    line.run(until_ms=65)
    assert pace.running_count == 1
    line.cancel(leaving)
    line.run()

    assert pace.running_count == 0
    assert of(line.delivered, "b") == [50, 60]


def test_the_tokens_of_a_batch_leave_at_the_ends_of_its_steps() -> None:
    """A: prompt 0-20, token 30; B arrives at 25, so its prompt makes the next step 30-50; then 10 ms steps."""
    line = Timeline(BatchedPace(engine()))
    line.submit("a", 0, tokens=4)
    line.run(until_ms=25)
    line.submit("b", 25, tokens=2)
    line.run()

    assert of(line.delivered, "a") == [20, 30, 50, 60]
    assert of(line.delivered, "b") == [50, 60]


def test_steps_follow_one_another_however_late_the_process_is() -> None:
    """The same load with every appointment 7 ms late: B still arrives before the step that ends at 30 has ended."""
    line = Timeline(BatchedPace(engine()), lag_ms=7)
    line.submit("a", 0, tokens=4)
    line.run(until_ms=20)
    line.submit("b", 27.5, tokens=2)
    line.run()

    assert of(line.delivered, "a") == [20, 30, 50, 60]
    assert of(line.delivered, "b") == [50, 60]


def test_a_request_is_not_served_by_a_step_that_began_before_it_arrived() -> None:
    """The process has slept through the end at 30: the step 30-40 began without B, which arrives at 32."""
    line = Timeline(BatchedPace(engine()), lag_ms=100)
    line.submit("a", 0, tokens=4)
    line.run(until_ms=20)
    line.submit("b", 132, tokens=1)
    line.run()

    assert of(line.delivered, "a") == [20, 30, 40, 50]
    assert of(line.delivered, "b") == [152]


def test_an_idle_server_starts_when_a_request_arrives() -> None:
    line = Timeline(BatchedPace(engine()))
    line.submit("a", 0, tokens=1)
    line.run()
    line.submit("b", 1000, tokens=1)
    line.run()

    assert line.delivered == [("a", 0, 20), ("b", 0, 1020)]


def test_a_request_that_was_read_while_the_last_step_ended_waits_for_that_end() -> None:
    """It arrived at 19, but was parsed only after the step that ended at 20."""
    line = Timeline(BatchedPace(engine()))
    line.submit("a", 0, tokens=1)
    line.run(until_ms=21)
    line.submit("b", 19, tokens=1)
    line.run()

    assert of(line.delivered, "b") == [40]


def test_an_api_server_sends_the_tokens_of_a_step_one_after_the_other() -> None:
    """4 ms each. A's prompt ends at 20; those of B and C with A's last token at 40, three tokens to send.

    The next step ends at 50, but the API server has sent those three only at 52.
    """
    line = Timeline(BatchedPace(engine(), frontend_seconds_per_token=0.004))
    for name in "abc":
        line.submit(name, 0, tokens=2)
    line.run()

    assert of(line.delivered, "a") == [24, 44]
    assert of(line.delivered, "b") == [48, 56]
    assert of(line.delivered, "c") == [52, 60]


def test_a_cancelled_request_leaves_its_place_to_the_next_step() -> None:
    """One sequence at a time: B waits for A to end, which is when A's client leaves."""
    pace = BatchedPace(engine(policy=Vllm1Policy(block_count=64, max_num_seqs=1, enable_prefix_caching=False)))
    line = Timeline(pace)
    leaving = line.submit("a", 0, tokens=1000)
    line.submit("b", 0, tokens=1)
    line.run(until_ms=25)
    assert (pace.running_count, pace.waiting_count) == (1, 1)
    line.cancel(leaving)
    line.run()

    assert of(line.delivered, "a") == [20]
    assert of(line.delivered, "b") == [50]
    assert (pace.running_count, pace.waiting_count) == (0, 0)
    assert pace.used_memory_share == 0


def test_a_request_cancelled_before_it_was_scheduled_takes_no_step() -> None:
    line = Timeline(BatchedPace(engine()))
    line.submit("a", 0, tokens=2)
    line.cancel(line.submit("b", 1, tokens=5))
    line.run()

    assert of(line.delivered, "a") == [20, 30]
    assert of(line.delivered, "b") == []


def test_a_batch_beyond_the_memory_fails_and_the_server_goes_on() -> None:
    """24 tokens of prompt do not fit 20; the 8 of the next request do."""
    line = Timeline(BatchedPace(engine(out_of_memory_tokens=20)))
    line.submit("big", 0, tokens=2, input_tokens=24)
    line.run()
    line.submit("small", 100, tokens=1)
    line.run()

    assert line.failures == {"big": OUT_OF_MEMORY}
    assert line.delivered == [("small", 0, 120)]


def test_a_request_that_can_never_be_scheduled_is_refused() -> None:
    line = Timeline(BatchedPace(engine(policy=TgisPolicy(max_batch_weight=10))))

    with pytest.raises(InvalidInputError):
        line.submit("a", 0, tokens=5, input_tokens=8)
    assert line.pace.waiting_count == 0


arrivals = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 6)), min_size=1, max_size=12).map(sorted)
lags = st.sampled_from([0.0, 3.0, 50.0])


@given(arrivals, lags, st.sampled_from([0.0, 0.0003]))
def test_every_token_leaves_once_in_order_after_its_request_whatever_the_lag(
    requests: list[tuple[int, int]], lag_ms: float, frontend_seconds: float
) -> None:
    line = Timeline(BatchedPace(engine(), frontend_seconds_per_token=frontend_seconds), lag_ms=lag_ms)
    arrived: dict[str, tuple[int, int]] = {}
    for number, (at_ms, tokens) in enumerate(requests):
        line.run(until_ms=at_ms - lag_ms)
        arrived[str(number)] = at_ms, tokens
        line.submit(str(number), at_ms, tokens=tokens)
    line.run()

    for name, (at_ms, tokens) in arrived.items():
        own = [(index, due) for request, index, due in line.delivered if request == name]
        assert [index for index, _ in own] == list(range(tokens))
        assert own[0][1] >= at_ms + 20
        gaps = [later - earlier for (_, earlier), (_, later) in pairwise(own)]
        assert min(gaps, default=10) >= (1000 * frontend_seconds or 10) - 1e-6
    assert line.pace.running_count == line.pace.waiting_count == 0


@given(arrivals, st.sampled_from([1.0, 9.0, 80.0]))
def test_a_late_process_sends_every_token_when_a_punctual_one_would(
    requests: list[tuple[int, int]], lag_ms: float
) -> None:
    def dues(lag: float, make: Callable[[], Pace]) -> Delivered:
        line = Timeline(make(), lag_ms=lag)
        for number, (at_ms, tokens) in enumerate(requests):
            line.run(until_ms=at_ms - lag)
            line.submit(str(number), at_ms, tokens=tokens)
        line.run()
        return sorted(line.delivered)

    assert dues(lag_ms, lambda: BatchedPace(engine())) == dues(0, lambda: BatchedPace(engine()))
