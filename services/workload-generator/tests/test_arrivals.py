import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Integers
from llmpilot_workload_generator.sampling.arrivals import BLOCK_GAPS, ArrivalTimes, arrival_times, arrival_violations

TRACE = np.array([0, 1_000, 1_000, 6_000])
OPEN = [
    Arrivals(kind=ArrivalKind.CONSTANT, rate_per_second=7),
    Arrivals(kind=ArrivalKind.POISSON, rate_per_second=7),
    Arrivals(kind=ArrivalKind.GAMMA, rate_per_second=7, burstiness=0.25),
    Arrivals(kind=ArrivalKind.TRACE, speed=3),
    Arrivals(kind=ArrivalKind.ALL_AT_ONCE),
]


def times_of(arrivals: Arrivals, seed: int = 0, trace_nanos: Integers = TRACE) -> ArrivalTimes:
    times = arrival_times(arrivals, seed=seed, trace_nanos=trace_nanos)
    assert times is not None
    return times


def test_a_closed_loop_has_no_times() -> None:
    assert arrival_times(Arrivals(), seed=0, trace_nanos=None) is None


@pytest.mark.parametrize("arrivals", OPEN, ids=lambda arrivals: arrivals.kind)
def test_the_first_request_arrives_at_zero_and_times_never_fall(arrivals: Arrivals) -> None:
    nanos = times_of(arrivals).nanos(0, 10_000)
    assert nanos.dtype == np.int64
    assert nanos[0] == 0
    assert (np.diff(nanos) >= 0).all()


@pytest.mark.parametrize("arrivals", OPEN, ids=lambda arrivals: arrivals.kind)
@given(
    start=st.integers(0, 3 * BLOCK_GAPS),
    sizes=st.lists(st.sampled_from([0, 1, 5, 1_000, BLOCK_GAPS]), min_size=1, max_size=5),
)
def test_times_are_the_same_however_the_stream_is_cut(arrivals: Arrivals, start: int, sizes: list[int]) -> None:
    whole = times_of(arrivals).nanos(0, start + sum(sizes))
    times = times_of(arrivals)
    for size in sizes:
        assert np.array_equal(times.nanos(start, size), whole[start : start + size])
        start += size


def test_constant_arrivals_are_evenly_spaced() -> None:
    arrivals = Arrivals(kind=ArrivalKind.CONSTANT, rate_per_second=8)
    assert times_of(arrivals).nanos(3, 2).tolist() == [375_000_000, 500_000_000]


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("rate", [7.0, 3e8])
def test_random_gaps_have_the_rate_and_the_variation_asked_for(rate: float, shape: float) -> None:
    """A gamma distribution has CV^2 = 1 / shape.

    Of n gaps the mean has a relative deviation of CV / sqrt(n), and the standard deviation, as the kurtosis is
    3 + 6 / shape, one of sqrt(1 / 2 + 3 / (2 shape)) / sqrt(n). CV has at most the sum of both; five of them.
    At 3e8 requests/s a mean gap is 3.3 ns, rounded to whole nanoseconds: there CV is not looked at.
    """
    count = 1_000_000
    arrivals = Arrivals(kind=ArrivalKind.GAMMA, rate_per_second=rate, burstiness=shape)
    gaps = np.diff(times_of(arrivals, seed=5).nanos(0, count + 1))
    variation = shape**-0.5
    assert gaps.mean() * rate / 1e9 == pytest.approx(1, abs=5 * variation / count**0.5)
    if rate < 1e6:
        deviation = np.sqrt(0.5 + 1.5 / shape) + variation
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=5 * deviation / count**0.5)


def test_poisson_gaps_are_exponential() -> None:
    """KS against 1 - exp(-x); n = 10^5, the critical value at .1 % is 1.95 / sqrt(n)."""
    count = 100_000
    arrivals = Arrivals(kind=ArrivalKind.POISSON, rate_per_second=2)
    gaps = np.sort(np.diff(times_of(arrivals, seed=1).nanos(0, count + 1))) * 2 / 1e9
    expected = 1 - np.exp(-gaps)
    places = np.arange(count)
    distance = max((expected - places / count).max(), ((places + 1) / count - expected).max())
    assert distance < 1.95 / count**0.5


def test_poisson_is_gamma_with_burstiness_one_and_seeds_differ() -> None:
    poisson = times_of(Arrivals(kind=ArrivalKind.POISSON, rate_per_second=2)).nanos(0, 100)
    gamma = times_of(Arrivals(kind=ArrivalKind.GAMMA, rate_per_second=2)).nanos(0, 100)
    other = times_of(Arrivals(kind=ArrivalKind.POISSON, rate_per_second=2), seed=1).nanos(0, 100)
    assert np.array_equal(poisson, gamma)
    assert not np.array_equal(poisson, other)


def test_a_trace_begins_again_a_mean_gap_after_its_end() -> None:
    """By hand: three gaps take 6,000 ns, so the next round begins at 8,000; twice as fast, everything is halved."""
    arrivals = Arrivals(kind=ArrivalKind.TRACE, speed=2)
    assert times_of(arrivals).nanos(2, 5).tolist() == [500, 3_000, 4_000, 4_500, 4_500]
    assert times_of(Arrivals(kind=ArrivalKind.TRACE)).nanos(4, 2).tolist() == [8_000, 9_000]


def test_everything_wrong_with_arrivals_is_said_at_once() -> None:
    gamma = Arrivals(kind=ArrivalKind.GAMMA, rate_per_second=-1, burstiness=float("nan"))
    assert [violation.field for violation in arrival_violations(gamma, None)] == [
        "arrivals.rate_per_second",
        "arrivals.burstiness",
    ]
    trace = Arrivals(kind=ArrivalKind.TRACE, speed=0)
    assert [violation.field for violation in arrival_violations(trace, None)] == ["arrivals.kind", "arrivals.speed"]
    assert not arrival_violations(Arrivals(kind=ArrivalKind.TRACE), TRACE)
    assert not arrival_violations(Arrivals(rate_per_second=-1), None)  # a closed loop has no rate


@pytest.mark.parametrize("arrivals", OPEN[:4], ids=lambda arrivals: arrivals.kind)
def test_times_beyond_what_nanoseconds_hold_are_refused(arrivals: Arrivals) -> None:
    slow = Arrivals(kind=arrivals.kind, rate_per_second=1e-6, burstiness=arrivals.burstiness, speed=1e-10)
    with pytest.raises(InvalidInputError, match="292 years"):
        times_of(slow).nanos(10_000, 1_000_000)


@pytest.mark.parametrize("kind", [ArrivalKind.POISSON, ArrivalKind.GAMMA])
def test_random_arrivals_far_beyond_what_was_drawn_are_refused_at_once(kind: ArrivalKind) -> None:
    """All gaps before them would be added up first: hours for 2^40."""
    times = times_of(Arrivals(kind=kind, rate_per_second=7))
    with pytest.raises(InvalidInputError, match="at most 1,000,000,000"):
        times.nanos(2**40, 2)
    assert len(times.nanos(3 * BLOCK_GAPS, 2)) == 2
