import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from llmpilot_loadtester.domain.binomial import chance_of_at_least, chance_of_at_most
from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import empty_records
from llmpilot_loadtester.domain.results import StageResult, Verdict
from llmpilot_loadtester.domain.slo_search import SloSearch
from llmpilot_loadtester.domain.spec import (
    DEFAULT_LADDER,
    LoadKind,
    LoadSearch,
    LoadTestSpec,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
)
from llmpilot_loadtester.domain.stage_plan import Ladder, plan_of
from llmpilot_loadtester.domain.window import Window

LEVEL = ServiceLevel(ttft_ms=500)
EMPTY = stage_metrics(empty_records(), Window(from_nanos=0, until_nanos=10**10), LEVEL, seed=0)
Measure = Callable[[float], tuple[int, int]]
"""Good requests and all, at a load."""


def search_of(
    kind: LoadKind = LoadKind.USERS, *, low: float = 1, high: float = 128, precision: float = 0.05
) -> SloSearch:
    search = LoadSearch(kind=kind, low=low, high=high, precision=precision, warm_up_seconds=1, measure_seconds=30)
    return SloSearch(search=search, service_level=LEVEL)


def load_of(stage: Stage) -> float:
    return stage.load.rate_per_second or float(stage.load.most_users or 0)


def result_of(
    stage: Stage, good: int, total: int, *, index: int = 0, is_valid: bool = True, ok: int = 1
) -> StageResult:
    share = good / total if total else None
    metrics = replace(EMPTY, request_count=total, ok_count=ok, good_share=share)
    reasons = () if is_valid else ("A worker used 99% of a core.",)
    return StageResult(
        stage_index=index,
        attempt=1,
        stage=stage,
        start_unix_nanos=0,
        metrics=metrics,
        verdict=Verdict(is_valid=is_valid, reasons=reasons),
    )


def run(search: SloSearch, measure: Measure) -> list[StageResult]:
    results: list[StageResult] = []
    while (stage := search.next_stage(results)) is not None:
        assert len(results) < search.stage_count
        results.append(result_of(stage, *measure(load_of(stage)), index=len(results)))
    return results


def loads(results: list[StageResult]) -> list[float]:
    return [load_of(result.stage) for result in results]


def clear_cut(capacity: float) -> Measure:
    return lambda load: (1_000, 1_000) if load <= capacity else (500, 1_000)


@pytest.mark.parametrize(("good", "total"), [(0, 10), (1, 1), (57, 59), (59, 59), (95, 100), (100, 100), (948, 1_000)])
@pytest.mark.parametrize("share", ["0.5", "0.9", "0.95", "0.999"])
def test_chances_are_those_of_the_binomial_distribution(good: int, total: int, share: str) -> None:
    """Added up in fractions."""
    wanted = Fraction(share)
    terms = [math.comb(total, count) * wanted**count * (1 - wanted) ** (total - count) for count in range(total + 1)]
    assert chance_of_at_least(good, total, float(share)) == pytest.approx(float(sum(terms[good:])), rel=1e-9)
    assert chance_of_at_most(good, total, float(share)) == pytest.approx(float(sum(terms[: good + 1])), rel=1e-9)


def test_no_requests_tell_nothing() -> None:
    assert chance_of_at_least(0, 0, 0.95) == chance_of_at_most(0, 0, 0.95) == 1


def test_a_search_that_would_go_on_for_too_long_ends_and_says_so() -> None:
    """From 1e-300 to 1e6 there are a thousand doublings."""
    search = search_of(LoadKind.POISSON, low=1e-300, high=1e6)
    results = run(search, clear_cut(1e6))
    assert len(results) == search.stage_count == 100
    said = "The search ended early, after 100 stages: ask for less precision or narrower bounds."
    assert search.answer(results).endswith(said)
    assert said not in search.answer(results[:50])


@pytest.mark.parametrize(("low", "precision"), [(5e-324, 0.05), (1.0, 5e-324)])
def test_the_smallest_numbers_there_are_make_no_search_without_end(low: float, precision: float) -> None:
    assert search_of(LoadKind.POISSON, low=low, high=1e6, precision=precision).stage_count == 100


def test_loads_are_doubled_then_halved() -> None:
    search = search_of()
    results = run(search, clear_cut(21))
    assert loads(results) == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]
    assert search.found_load(results) == 21
    assert search.answer(results) == (
        "The service level is met by 21 users (1,000 of 1,000 requests); not met by 22 users (500 of 1,000 requests). "
        "Each decision, whether 95 % of the requests are within all limits, is 95 % sure."
    )


@pytest.mark.parametrize("capacity", range(1, 129))
def test_whole_users_are_found_exactly_or_within_the_precision(capacity: int) -> None:
    search = search_of()
    found = search.found_load(run(search, clear_cut(capacity)))
    assert found is not None
    assert found <= capacity <= max(found, 1.05 * found - 1)


@pytest.mark.parametrize("precision", [0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [0.21, 0.5, 3.3333333, 17.7, 99.999])
def test_rate_is_found_within_the_precision(capacity: float, precision: float) -> None:
    search = search_of(LoadKind.POISSON, low=0.2, high=100, precision=precision)
    results = run(search, clear_cut(capacity))
    found = search.found_load(results)
    assert found is not None
    assert found <= capacity <= found * (1 + precision) * (1 + 1e-9)
    assert all(result.stage.load.kind is LoadKind.POISSON for result in results)


def test_largest_load_that_was_asked_for_ends_the_search() -> None:
    search = search_of(low=3, high=20)
    results = run(search, clear_cut(1_000))
    assert loads(results) == [3, 6, 12, 20]
    assert search.found_load(results) == 20
    assert "met by 20 users (1,000 of 1,000 requests); more was not asked for." in search.answer(results)


def test_smallest_load_that_fails_ends_the_search() -> None:
    search = search_of()
    results = run(search, clear_cut(0))
    assert loads(results) == [1]
    assert search.found_load(results) is None
    assert "not met by 1 user (500 of 1,000 requests)." in search.answer(results)


def test_nothing_measured_is_nothing_found() -> None:
    assert search_of().found_load([]) is None
    assert search_of().answer([]) == "No load was decided."


def test_few_requests_are_measured_again_and_added_up() -> None:
    """40 of 40 good ones prove nothing at 5 % / 3 per look: .95^40 = .13; .95^80 = .0165 <= .0167 does."""
    search = search_of(high=2)
    results = run(search, lambda _: (40, 40))
    assert loads(results) == [1, 1, 2, 2]
    assert search.found_load(results) == 2


def test_undecided_load_counts_as_not_met_after_three_measurements() -> None:
    search = search_of()
    results = run(search, lambda load: (400, 400) if load < 4 else (95, 100))
    assert loads(results) == [1, 2, 4, 4, 4, 3]
    assert search.found_load(results) == 3
    assert (
        "met by 3 users (400 of 400 requests); not met by 4 users (285 of 300 requests); "
        "3 measurements left that undecided, which counts as not met."
    ) in search.answer(results)


def test_numbers_that_do_not_count_end_the_search_with_what_is_known() -> None:
    search = search_of()
    results = run(search, clear_cut(1_000))[:3]
    stage = search.next_stage(results)
    assert stage is not None
    results.append(result_of(stage, 1_000, 1_000, index=3, is_valid=False))
    assert search.next_stage(results) is None
    assert search.found_load(results) == 4
    assert search.answer(results).endswith("The search ended early, as the numbers of its last stage do not count.")


def test_server_that_fails_every_request_does_not_meet_the_level() -> None:
    """The verdict says that there are no latencies; it is the server's fault."""
    search = search_of()
    first = search.next_stage([])
    assert first is not None
    results = [result_of(first, 1_000, 1_000)]
    second = search.next_stage(results)
    assert second is not None
    results.append(result_of(second, 0, 200, index=1, is_valid=False, ok=0))
    assert search.found_load(results) == 1
    assert "not met by 2 users (0 of 200 requests)" in search.answer(results)

    also_slow = Verdict(is_valid=False, reasons=("None of 200 requests succeeded.", "A worker used 99% of a core."))
    results[1] = replace(results[1], verdict=also_slow)
    assert search.next_stage(results) is None
    assert "not met" not in search.answer(results)


def logistic(capacity: float, steepness: float) -> Callable[[float], float]:
    """A share of good requests that is 95 % at the capacity."""
    return lambda load: 1 / (1 + math.exp(steepness * (load / capacity - 1) - math.log(19)))


@pytest.mark.parametrize("steepness", [3.0, 20.0])
@pytest.mark.parametrize("requests_per_load", [3, 40])
def test_too_large_a_load_is_found_no_more_often_than_stated(steepness: float, requests_per_load: int) -> None:
    """At least 95 % sure: of 200 searches at most 10 + 3 sqrt(9.5) = 19 are beyond the capacity.

    A search decides several loads, but only one or two are so near to the capacity that it may be mistaken, and doubled
    loads beyond one that fails are not tried.
    """
    random = np.random.default_rng(int(steepness) + requests_per_load)
    search = search_of(LoadKind.POISSON, low=1, high=200)
    wrong = 0
    for _ in range(200):
        capacity = random.uniform(5, 100)
        share = logistic(capacity, steepness)

        def measure(load: float, share: Callable[[float], float] = share) -> tuple[int, int]:
            total = round(load * requests_per_load) + 30
            return int(random.binomial(total, share(load))), total

        found = search.found_load(run(search, measure))
        wrong += found is not None and found > capacity
    assert wrong <= 19


def test_steep_curve_is_found_within_the_precision() -> None:
    """A server that collapses at its capacity: 99 % good below, 50 % above; of 2,000 requests both are certain."""
    random = np.random.default_rng(8)
    search = search_of(LoadKind.CONSTANT, low=1, high=200)
    for _ in range(50):
        capacity = random.uniform(2, 150)

        def measure(load: float, capacity: float = capacity) -> tuple[int, int]:
            return int(random.binomial(2_000, 0.99 if load <= capacity else 0.5)), 2_000

        found = search.found_load(run(search, measure))
        assert found is not None
        assert found <= capacity <= found * 1.05 * (1 + 1e-9)


def test_search_that_was_interrupted_goes_on_as_if_it_had_not_been() -> None:
    results = run(search_of(), clear_cut(21))
    for count in range(len(results)):
        assert search_of().next_stage(results[:count]) == results[count].stage
    assert search_of().next_stage(results) is None


SPEC = LoadTestSpec(
    target=Target(url="http://server"), requests=SyntheticRequests(input_tokens=1, output_tokens=1), service_level=LEVEL
)


def test_plan_without_stages_is_the_ladder_of_the_paper() -> None:
    plan = plan_of(SPEC)
    assert plan == Ladder(DEFAULT_LADDER)
    assert plan.stage_count == 8
    results: list[StageResult] = []
    while (stage := plan.next_stage(results)) is not None:
        results.append(result_of(stage, 1, 1, index=len(results)))
    assert loads(results) == [1, 2, 4, 8, 16, 32, 64, 128]


def test_plan_of_a_search_is_the_search() -> None:
    search = search_of()
    assert plan_of(replace(SPEC, search=search.search)) == search
