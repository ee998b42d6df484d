import math

import pytest

from llmpilot_recommender.decision import CurvePoint, LatencyLimits
from llmpilot_recommender.scores import (
    Curves,
    Deployment,
    Scenario,
    best_static_policy,
    cheapest,
    score,
    score_curves,
)

SCENARIO = Scenario(limits=LatencyLimits(nttft_ms=100, itl_ms=50), users_count=100)
PRICES = {"small": 1.0, "large": 3.0}


def serving(users_per_pod: int) -> list[CurvePoint]:
    """A curve that meets the limits up to this many users; 0: not even with one."""
    return [
        CurvePoint(users_count=users, nttft_ms=10, itl_ms=20 if users <= users_per_pod else 51, error_rate=None)
        for users in (1, 10, 20, 50, 100)
    ]


# Cheapest by hand: a: small 10 pods x 1 = 10, large 2 x 3 = 6 -> large, 6.
#                   b: small 2 pods x 1 = 2, large 1 x 3 = 3 -> small, 2.
#                   c: nothing meets the limits.
TRUTH: Curves = {
    "a": {"small": serving(10), "large": serving(50)},
    "b": {"small": serving(50), "large": serving(100)},
    "c": {"small": serving(0), "large": serving(0)},
}


def deployment(gpu_profile: str, pod_count: int) -> Deployment:
    return Deployment(gpu_profile=gpu_profile, pod_count=pod_count)


def test_cheapest_counts_all_pods() -> None:
    assert cheapest(TRUTH["a"], SCENARIO, PRICES) == deployment("large", 2)
    assert cheapest(TRUTH["b"], SCENARIO, PRICES) == deployment("small", 2)


def test_nothing_is_cheapest_where_nothing_meets_the_limits() -> None:
    assert cheapest(TRUTH["c"], SCENARIO, PRICES) is None
    assert cheapest({}, SCENARIO, PRICES) is None


def test_oracle_has_the_full_score() -> None:
    oracle = score_curves(TRUTH, TRUTH, SCENARIO, PRICES)
    assert (oracle.llm_count, oracle.success_rate, oracle.overspend, oracle.so, oracle.loss) == (2, 1, 0, 1, 0)


def test_llm_that_the_truth_cannot_serve_does_not_count() -> None:
    asked: list[str] = []

    def choose(llm: str) -> Deployment:
        asked.append(llm)
        return deployment("large", 2)

    assert score(choose, TRUTH, SCENARIO, PRICES).llm_count == 2
    assert asked == ["a", "b"]


def test_scores_by_hand() -> None:
    # 2 large pods: a succeeds at 6 of 6 -> 0; b succeeds at 6 instead of 2 -> 200 % overspend.
    # S = 1, O = (0 + 2) / 2 = 1, SO: max(0, 1 - 1) = 0 -> 0; loss = (0 + min(2, 1)) / 2.
    result = score(lambda _: deployment("large", 2), TRUTH, SCENARIO, PRICES)
    assert (result.success_rate, result.overspend, result.so, result.loss) == (1, 1, 0, 0.5)


def test_failure_lowers_the_success_rate_and_not_the_overspend() -> None:
    # 3 small pods: a serves 30 of 100 -> failure; b serves 150 at 3 instead of 2 -> 50 %.
    # S = 1/2, O = 0.5, SO = 2 x 0.5 x 0.5 / (0.5 + 0.5) = 0.5; loss = (1 + 0.5) / 2.
    result = score(lambda _: deployment("small", 3), TRUTH, SCENARIO, PRICES)
    assert (result.success_rate, result.overspend, result.so, result.loss) == (0.5, 0.5, 0.5, 0.75)


def test_harmonic_mean_by_hand() -> None:
    # a: large 3 x 3 = 9 instead of 6 -> 50 %; b: exact -> 0. S = 1, O = 0.25, SO = 2 x 0.75 / 1.75.
    choice = {"a": deployment("large", 3), "b": deployment("small", 2)}
    result = score(choice.__getitem__, TRUTH, SCENARIO, PRICES)
    assert result.overspend == pytest.approx(0.25)
    assert result.so == pytest.approx(2 * 1 * 0.75 / (1 + 0.75))


def test_exactly_enough_pods_are_a_success() -> None:
    assert score(lambda _: deployment("small", 10), TRUTH, SCENARIO, PRICES).success_rate == 1
    assert score(lambda _: deployment("small", 9), TRUTH, SCENARIO, PRICES).success_rate == 0.5


@pytest.mark.parametrize("choice", [None, deployment("never measured", 1000)])
def test_choosing_nothing_or_a_profile_without_truth_is_a_failure(choice: Deployment | None) -> None:
    result = score(lambda _: choice, TRUTH, SCENARIO, PRICES)
    assert (result.llm_count, result.success_rate, result.overspend, result.so, result.loss) == (2, 0, None, 0, 1)


def test_only_the_truth_decides_on_success() -> None:
    # Believes that a small pod serves 50 users of a: chooses 2 small pods, which truly serve 20.
    optimistic: Curves = {"a": {"small": serving(50), "large": serving(50)}}
    result = score_curves(optimistic, {"a": TRUTH["a"]}, SCENARIO, PRICES)
    assert (result.success_rate, result.loss) == (0, 1)


def test_llm_without_predictions_is_a_failure() -> None:
    assert score_curves({}, TRUTH, SCENARIO, PRICES).success_rate == 0


def test_scenario_that_no_llm_can_meet_counts_none() -> None:
    impossible = Scenario(limits=LatencyLimits(nttft_ms=1, itl_ms=1), users_count=1)
    result = score_curves(TRUTH, TRUTH, impossible, PRICES)
    assert (result.llm_count, result.success_rate, result.overspend, result.loss) == (0, 0, None, 0)


def test_failed_requests_count_by_the_limit_of_the_scenario() -> None:
    failing = [CurvePoint(users_count=100, nttft_ms=1, itl_ms=math.nextafter(50, 0), error_rate=0.5)]
    clean = Scenario(limits=LatencyLimits(nttft_ms=100, itl_ms=50, error_rate=0.01), users_count=100)
    published = Scenario(limits=LatencyLimits(nttft_ms=100, itl_ms=50, error_rate=1), users_count=100)
    assert cheapest({"small": failing}, clean, PRICES) is None
    assert cheapest({"small": failing}, published, PRICES) == deployment("small", 1)


def test_static_policy_is_the_best_of_all_by_brute_force() -> None:
    scores = {
        (profile, pods): score(lambda _, p=profile, n=pods: deployment(p, n), TRUTH, SCENARIO, PRICES).so  # type: ignore[misc]
        for profile in ("small", "large")
        for pods in range(1, 13)
    }
    policy, result = best_static_policy(TRUTH, SCENARIO, PRICES, largest_pod_count=12)
    assert result.so == max(scores.values()) == scores[policy.gpu_profile, policy.pod_count]
    assert policy == deployment("small", 2)  # serves b exactly: S = 1/2, O = 0, SO = 2/3
    assert result.so == pytest.approx(2 / 3)
