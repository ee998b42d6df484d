"""The search against truths that its prediction knows well, badly or not at all."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.probing import CaseRun, NoSafeWeightError, Outcome, Probe
from llmpilot_tuner.domain.search import Problem, Search, belongs, plain_probe_count

CAPACITY = 10**9
WEIGHTS = 10**8
LOWEST, HIGHEST = 8_000, 1_000_000


def cases(weight: int) -> tuple[Batch, ...]:
    """One case whose tokens are the weight."""
    return (Batch(case="only", decode=(Rows(request_count=1, input_tokens=weight),)),)


def problem(
    predict: Callable[[Batch], float] | None,
    *,
    lowest: int = LOWEST,
    highest: int = HIGHEST,
    granule: int = 1,
    precision: float = 0.01,
) -> Problem:
    return Problem(
        lowest=lowest,
        highest=highest,
        granule=granule,
        precision=precision,
        capacity_bytes=CAPACITY,
        cases=cases,
        predict=predict,
        weight_bytes=WEIGHTS,
    )


def probe_of(weight: int, peak: float) -> Probe:
    (batch,) = cases(weight)
    passed = peak <= CAPACITY
    run = CaseRun(
        batch=batch,
        outcome=Outcome.PASSED if passed else Outcome.OUT_OF_MEMORY,
        peak_bytes=int(peak) if passed else None,
    )
    return Probe(weight=weight, runs=(run,))


def linear(largest: int) -> Callable[[int], float]:
    """Peaks that reach the capacity at a weight."""
    return lambda weight: WEIGHTS + (CAPACITY - WEIGHTS) * weight / largest


def found(search: Search, peak: Callable[[int], float]) -> int:
    while (following := search.next()) is not None:
        search.record(probe_of(following.weight, peak(following.weight)))
        assert len(search.probes) <= 100
    assert search.passed is not None
    return search.passed


def plain_count(largest: int, given_problem: Problem) -> int:
    """Halve [lowest, highest] until the precision is reached, by hand."""
    low, high, count = given_problem.lowest, given_problem.highest + 1, 0
    while high - low > 1 and low < 0.99 * (high - 1):
        middle = (low + high) // 2
        count += 1
        low, high = (middle, high) if middle <= largest else (low, middle)
    return count


def test_an_exact_prediction_takes_two_probes() -> None:
    search = Search(problem(lambda batch: linear(123_456)(batch.token_count)))
    weight = found(search, linear(123_456))
    assert (weight, len(search.probes)) == (123_456, 2)


@pytest.mark.parametrize("error", [0.6, 0.8, 0.95, 0.99, 1.01, 1.05, 1.2, 2.0])
def test_a_prediction_that_is_off_takes_few_probes(error: float) -> None:
    """Predicted working memory is `error` times the true one."""
    true = linear(123_456)
    search = Search(problem(lambda batch: WEIGHTS + error * (true(batch.token_count) - WEIGHTS)))
    weight = found(search, true)
    assert 123_456 * 0.99 <= weight <= 123_456
    assert len(search.probes) <= 6, [(p.weight, p.passed) for p in search.probes]


@settings(max_examples=300)
@example(largest=198_290, power=2.0, ratio=12.0, offset=1.0, jitter=0)
@given(
    largest=st.integers(LOWEST, 2 * HIGHEST),
    power=st.floats(0.3, 3),
    ratio=st.floats(0.05, 20),
    offset=st.floats(-0.5, 2),
    jitter=st.integers(0, 10),
)
def test_no_prediction_is_so_bad_that_it_costs_more_than_plain_search(
    largest: int, power: float, ratio: float, offset: float, jitter: int
) -> None:
    """Truth is a power law with steps; the prediction is linear with any slope and offset."""

    def peak(weight: int) -> float:
        stepped = weight + (weight * 2654435761 % 97) * jitter * largest / 10**6 / 97
        return WEIGHTS + (CAPACITY - WEIGHTS) * math.pow(stepped / largest, power)

    def predict(batch: Batch) -> float:
        return WEIGHTS + (CAPACITY - WEIGHTS) * (offset + ratio * batch.token_count / largest)

    search = Search(problem(predict))
    try:
        weight = found(search, peak)
    except NoSafeWeightError:
        assert peak(LOWEST) > CAPACITY
        return
    assert peak(weight) <= CAPACITY
    assert len(search.probes) <= plain_probe_count(search.problem) + (weight == LOWEST)
    if jitter == 0:
        assert weight >= 0.99 * min(largest, HIGHEST) - 1


@settings(max_examples=200)
@given(largest=st.integers(LOWEST, 2 * HIGHEST))
def test_without_a_prediction_it_bisects(largest: int) -> None:
    search = Search(problem(None))
    weight = found(search, linear(largest))
    assert 0.99 * min(largest, HIGHEST) - 1 <= weight <= largest
    assert len(search.probes) <= plain_probe_count(search.problem) + (weight == LOWEST)


def test_plain_search_takes_fourteen_probes_over_a_range_of_a_million() -> None:
    counted = max(plain_count(largest, problem(None)) for largest in range(LOWEST, 12_000, 7))
    assert plain_probe_count(problem(None)) == counted == 14


@settings(max_examples=100)
@given(lowest=st.integers(1, 50), size=st.integers(0, 400), granule=st.sampled_from([1, 16]), share=st.floats(0.0, 1.2))
def test_small_ranges_are_settled_exactly(lowest: int, size: int, granule: int, share: float) -> None:
    low = lowest * granule
    high = low + size * granule
    largest = low + int(share * size) * granule
    given_problem = problem(
        lambda batch: linear(2 * largest)(batch.token_count), lowest=low, highest=high, granule=granule, precision=0.0
    )
    weight = found(Search(given_problem), linear(largest))
    assert weight == min(largest, high)


def test_the_lowest_weight_failing_is_said() -> None:
    with pytest.raises(NoSafeWeightError, match=r"8,000, one longest request, .* case only"):
        found(Search(problem(None)), linear(LOWEST - 1))


def test_all_that_the_limits_allow_is_one_probe() -> None:
    search = Search(problem(lambda batch: linear(10 * HIGHEST)(batch.token_count)))
    assert (found(search, linear(10 * HIGHEST)), len(search.probes)) == (HIGHEST, 1)


def test_a_search_goes_on_from_kept_probes_as_it_would_have() -> None:
    def predict(batch: Batch) -> float:
        return WEIGHTS + 0.7 * (linear(200_000)(batch.token_count) - WEIGHTS)

    whole = Search(problem(predict))
    found(whole, linear(200_000))
    resumed = Search(problem(predict), whole.probes[:2])
    found(resumed, linear(200_000))
    assert resumed.probes == whole.probes


def test_a_weight_that_passed_above_one_that_failed_does_not_count() -> None:
    search = Search(problem(None), [probe_of(50_000, 0.5 * CAPACITY), probe_of(40_000, 2 * CAPACITY)])
    assert (search.passed, search.failed) == (None, 40_000)
    assert search.notes == ["weight 40,000 failed although 50,000 passed: only what is below counts"]


def test_a_peak_that_falls_is_noted() -> None:
    search = Search(problem(None), [probe_of(50_000, 0.5 * CAPACITY), probe_of(60_000, 0.4 * CAPACITY)])
    assert "its memory does not only grow" in search.notes[0]


def test_a_case_of_another_regime_has_no_vote() -> None:
    """Above 100,000 the steep case no longer exists; its slope must not hold the search back."""

    def two_cases(weight: int) -> tuple[Batch, ...]:
        name = "steep" if weight <= 100_000 else "flat"
        return (Batch(case=name, decode=(Rows(request_count=1, input_tokens=weight),)),)

    def peak(batch: Batch) -> float:
        per_token = 8_000 if batch.case == "steep" else 1_000
        return WEIGHTS + per_token * batch.token_count

    base = problem(lambda batch: WEIGHTS + 2_000 * batch.token_count)
    search = Search(Problem(**{name: getattr(base, name) for name in Problem.__slots__} | {"cases": two_cases}))
    while (following := search.next()) is not None:
        (batch,) = two_cases(following.weight)
        passed = peak(batch) <= CAPACITY
        run = CaseRun(
            batch=batch,
            outcome=Outcome.PASSED if passed else Outcome.OUT_OF_MEMORY,
            peak_bytes=int(peak(batch)) if passed else None,
        )
        search.record(Probe(weight=following.weight, runs=(run,)))
    assert search.passed is not None
    assert 0.99 * 900_000 <= search.passed <= 900_000
    assert len(search.probes) <= 6, [(p.weight, p.passed) for p in search.probes]


def test_cases_that_are_expected_to_fail_come_first() -> None:
    small, large = (
        Batch(case=name, decode=(Rows(request_count=1, input_tokens=tokens),)) for name, tokens in (("a", 5), ("b", 9))
    )
    base = problem(lambda batch: WEIGHTS + float(batch.token_count))
    search = Search(
        Problem(**{name: getattr(base, name) for name in Problem.__slots__} | {"cases": lambda _: (small, large)})
    )
    assert search.ordered_cases(10) == (large, small)
    assert math.isclose(search.predicted_bytes(large) or 0, WEIGHTS + 9)


@pytest.mark.parametrize("value", [0.0, -1e30, float("nan"), float("inf"), WEIGHTS / 2])
def test_a_prediction_that_makes_no_sense_costs_no_more_than_plain_search(value: float) -> None:
    search = Search(problem(lambda _: value))
    weight = found(search, linear(123_456))
    assert 0.99 * 123_456 <= weight <= 123_456
    assert len(search.probes) <= plain_probe_count(search.problem)


def test_a_probe_of_another_problem_does_not_belong() -> None:
    """Another range, another granule, no case, another case; a probe that failed may have left cases out."""
    own = problem(None, granule=10)
    passed, failed = probe_of(50_000, 0.5 * CAPACITY), probe_of(50_000, 2 * CAPACITY)
    assert belongs(own, passed)
    assert belongs(own, failed)
    others = [
        probe_of(LOWEST - 10, 0.1 * CAPACITY),
        probe_of(HIGHEST + 10, 0.1 * CAPACITY),
        probe_of(50_001, 0.5 * CAPACITY),
        replace(passed, runs=()),
        replace(passed, weight=60_000),
    ]
    assert [belongs(own, probe) for probe in others] == [False] * 5
