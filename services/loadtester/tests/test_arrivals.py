import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_loadtester.domain.arrivals import BLOCK_GAPS, arrival_offsets, shares
from llmpilot_loadtester.domain.spec import Load, LoadKind, UserStep

RATED = [
    Load(kind=LoadKind.CONSTANT, rate_per_second=7),
    Load(kind=LoadKind.POISSON, rate_per_second=7),
    Load(kind=LoadKind.GAMMA, rate_per_second=7, burstiness=0.25),
    Load(kind=LoadKind.GAMMA, rate_per_second=7, burstiness=4.0),
]


def offsets(load: Load, *, block_count: int = 10, seed: int = 1, until_seconds: float | None = None) -> np.ndarray:
    blocks: Iterator[np.ndarray] = arrival_offsets(load, seed=seed, until_seconds=until_seconds)
    return np.concatenate([np.zeros(0, np.int64), *islice(blocks, block_count)])


def label(load: Load) -> str:
    return f"{load.kind.value} {load.burstiness}"


@pytest.mark.parametrize("load", RATED, ids=label)
def test_first_request_arrives_at_zero_and_times_never_fall(load: Load) -> None:
    nanos = offsets(load)
    assert nanos.dtype == np.int64
    assert nanos[0] == 0
    assert (np.diff(nanos) >= 0).all()


@pytest.mark.parametrize("load", RATED, ids=label)
def test_every_block_has_exactly_the_rate_asked_for(load: Load) -> None:
    """Request 1,000 k is sent at 1,000 k / rate, so 10,000 requests are within .5 % of any rate."""
    nanos = offsets(load)
    expected = [round(Fraction(index * BLOCK_GAPS * 10**9, 7)) for index in range(10)]
    assert np.abs(nanos[::BLOCK_GAPS] - expected).max() <= 1


def test_constant_arrivals_are_evenly_spaced() -> None:
    load = Load(kind=LoadKind.CONSTANT, rate_per_second=8)
    assert offsets(load)[997:1003].tolist() == [125_000_000 * index for index in range(997, 1003)]


@pytest.mark.parametrize("shape", [0.1, 0.25, 1.0, 4.0])
def test_random_gaps_vary_as_asked(shape: float) -> None:
    """CV^2 of gaps of which n have a given sum: (n - 1) / (n shape + 1), as their shares are Dirichlet's.

    The standard deviation of N gaps has a relative one of sqrt(1 / 2 + 3 / (2 shape)) / sqrt(N), as the kurtosis is
    3 + 6 / shape; the mean is exact. Four of them.
    """
    load = Load(kind=LoadKind.GAMMA, rate_per_second=100, burstiness=shape)
    gaps = np.diff(offsets(load, block_count=200))
    expected = math.sqrt((BLOCK_GAPS - 1) / (BLOCK_GAPS * shape + 1))
    tolerance = 4 * math.sqrt(0.5 + 1.5 / shape) / math.sqrt(len(gaps))
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=tolerance)


def test_poisson_gaps_are_exponential_and_independent() -> None:
    """KS against 1 - exp(-x): n = 10^5, the critical value at .1 % is 1.95 / sqrt(n). Correlation: 4 / sqrt(n)."""
    gaps = np.diff(offsets(Load(kind=LoadKind.POISSON, rate_per_second=2), block_count=100)) * 2 / 1e9
    count = len(gaps)
    expected = 1 - np.exp(-np.sort(gaps))
    distance = np.abs(expected - np.arange(1, count + 1) / count).max()
    assert distance < 1.95 / math.sqrt(count)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("load", RATED[1:], ids=label)
def test_seed_decides_random_times(load: Load) -> None:
    assert np.array_equal(offsets(load, seed=5), offsets(load, seed=5))
    assert not np.array_equal(offsets(load, seed=5), offsets(load, seed=6))


@pytest.mark.parametrize("load", RATED, ids=label)
@pytest.mark.parametrize("until_seconds", [0.0, 0.3, 400.0])
def test_requests_end_before_the_given_moment(load: Load, until_seconds: float) -> None:
    everything = offsets(load, block_count=5)
    expected = everything[everything < until_seconds * 1e9]
    assert np.array_equal(offsets(load, until_seconds=until_seconds), expected)


@pytest.mark.parametrize("count", [1, 999, 1_000, 1_001, 2_500])
def test_requests_end_with_their_number(count: int) -> None:
    load = Load(kind=LoadKind.POISSON, rate_per_second=7, request_count=count)
    assert np.array_equal(offsets(load), offsets(RATED[1])[:count])


def test_all_at_once_is_at_zero() -> None:
    assert offsets(Load(kind=LoadKind.ALL_AT_ONCE, request_count=3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [LoadKind.USERS, LoadKind.TRACE])
def test_load_without_arrival_times_is_refused(kind: LoadKind) -> None:
    with pytest.raises(ValueError, match="has no arrival times of its own"):
        next(arrival_offsets(Load(kind=kind), seed=0, until_seconds=None))


def closed(*steps: tuple[float, int], ramp: bool = False) -> Load:
    user_steps = tuple(UserStep(at_seconds=at, users_count=count) for at, count in steps)
    return Load(kind=LoadKind.USERS, user_steps=user_steps, ramp=ramp, request_count=77)


def users_then(load: Load, seconds: Fraction) -> int:
    """By the definition in loadtest.proto: steps, or a straight line whose passed whole numbers count."""
    now = before = load.user_steps[0]
    for step in load.user_steps:
        if Fraction(step.at_seconds) <= seconds:
            now = before = step
        elif load.ramp and Fraction(before.at_seconds) <= seconds:
            span = Fraction(step.at_seconds) - Fraction(before.at_seconds)
            way = (step.users_count - before.users_count) * (seconds - Fraction(before.at_seconds)) / span
            return before.users_count + int(way)
    return now.users_count


@st.composite
def closed_loads(draw: st.DrawFn) -> Load:
    times = draw(st.lists(st.integers(1, 1_000), unique=True, max_size=4).map(sorted))
    counts = draw(st.lists(st.integers(1, 40), min_size=len(times) + 1, max_size=len(times) + 1))
    steps = zip([0.0, *(at / 8 for at in times)], counts, strict=True)
    return closed(*steps, ramp=draw(st.booleans()))


@given(load=closed_loads(), worker_count=st.integers(1, 9), moment=st.integers(0, 10**6))
def test_users_of_all_workers_add_up_at_every_moment(load: Load, worker_count: int, moment: int) -> None:
    """At a moment between the changes; 7,919 is prime, so that none falls on one of them."""
    seconds = Fraction(moment * 130 + 1, 7_919 * 130 * 8)
    parts = shares(load, worker_count)
    assert len(parts) == worker_count
    assert all(part.user_steps[0].at_seconds == 0 and not part.ramp for part in parts)
    counts = [users_then(part, seconds) for part in parts]
    assert sum(counts) == users_then(load, seconds)
    assert max(counts) - min(counts) <= 1


@given(load=closed_loads(), worker_count=st.integers(1, 9))
def test_no_worker_is_without_users_where_there_are_enough(load: Load, worker_count: int) -> None:
    busy = sum((part.most_users or 0) > 0 for part in shares(load, worker_count))
    assert busy == min(worker_count, load.most_users or 0)


def test_ramp_is_split_as_documented() -> None:
    """1 to 4 users in 3 s: one more at 1, 2 and 3 s, in turn to each worker."""
    first, second = shares(closed((0.0, 1), (3.0, 4), ramp=True), 2)
    assert first.user_steps == closed((0.0, 1), (2.0, 2)).user_steps
    assert second.user_steps == closed((0.0, 0), (1.0, 1), (3.0, 2)).user_steps


def test_scheduled_load_is_not_split() -> None:
    assert shares(RATED[1], 2) == [RATED[1], RATED[1]]
