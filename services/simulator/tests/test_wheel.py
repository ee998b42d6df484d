from hypothesis import given
from hypothesis import strategies as st

from llmpilot_simulator.wheel import TimerWheel

TICK = 250

dues = st.lists(st.integers(0, 20_000), max_size=50)


def test_an_item_is_due_at_the_end_of_its_tick_and_not_before() -> None:
    wheel: TimerWheel[str] = TimerWheel(TICK)
    wheel.add(251, "second tick")

    assert wheel.next_nanos() == 500
    assert list(wheel.take_due(499)) == []
    assert list(wheel.take_due(500)) == ["second tick"]
    assert wheel.next_nanos() is None


def test_an_item_on_the_edge_of_a_tick_is_not_late() -> None:
    wheel: TimerWheel[str] = TimerWheel(TICK)
    wheel.add(500, "edge")

    assert list(wheel.take_due(500)) == ["edge"]


def test_what_is_already_past_is_due_at_once() -> None:
    wheel: TimerWheel[str] = TimerWheel(TICK)
    wheel.add(10, "past")

    assert list(wheel.take_due(9_999)) == ["past"]


@given(dues, st.integers(0, 20_000))
def test_a_taking_returns_what_a_sorted_list_would(due: list[int], now: int) -> None:
    """The oracle: stable sort by the end of the tick, rounded up."""
    wheel: TimerWheel[int] = TimerWheel(TICK)
    for number, nanos in enumerate(due):
        wheel.add(nanos, number)
    ends = [-(-nanos // TICK) * TICK for nanos in due]
    order = sorted(range(len(due)), key=lambda number: ends[number])

    taken = list(wheel.take_due(now))

    assert taken == [number for number in order if ends[number] <= now]
    assert len(wheel) == len(due) - len(taken)
    assert wheel.next_nanos() == min((end for end in ends if end > now), default=None)


@given(dues, st.lists(st.integers(0, 3_000), max_size=20))
def test_nothing_is_early_or_a_tick_late_however_often_one_looks(due: list[int], pauses: list[int]) -> None:
    wheel: TimerWheel[int] = TimerWheel(TICK)
    for nanos in due:
        wheel.add(nanos, nanos)
    before, now, taken = -TICK, 0, []
    for pause in [*pauses, 30_000]:
        now += pause
        for nanos in wheel.take_due(now):
            assert nanos <= now
            assert nanos > before - TICK  # else the look before would have found it
            taken.append(nanos)
        before = now

    assert sorted(taken) == sorted(due)
