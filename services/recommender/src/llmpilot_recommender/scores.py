"""How good recommendations are: success rate, overspend and their harmonic mean, Eqs. (5)-(7), Lazuka et al., 2024.

Invariant: only the true latencies decide whether a recommendation succeeds, and only those LLMs count for which the
truth holds a deployment that meets the limits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmpilot_recommender.decision import CurvePoint, LatencyLimits, pod_count, users_per_pod

Curves = Mapping[str, Mapping[str, Sequence[CurvePoint]]]
"""LLM -> GPU profile -> latencies ascending in users."""
Prices = Mapping[str, float]
"""GPU profile -> price of a pod per hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What every LLM is asked to do."""

    limits: LatencyLimits
    users_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Pods of one GPU profile."""

    gpu_profile: str
    pod_count: int

    def price_per_hour(self, prices: Prices) -> float:
        """Return the price of all pods."""
        return self.pod_count * prices[self.gpu_profile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The scores of one method in one scenario."""

    llm_count: int
    """LLMs for which the truth holds a deployment."""
    success_rate: float
    """S, Eq. (5)."""
    overspend: float | None
    """O, Eq. (6): mean over the successes; 0.2 is 20 % more than the cheapest. None: nothing succeeded."""
    loss: float
    """Mean over LLMs of the overspend, capped at 1; a failure counts 1."""

    @property
    def so(self) -> float:
        """SO, Eq. (7): harmonic mean of S and max(0, 1 - O)."""
        if self.overspend is None:
            return 0.0
        frugality = max(0.0, 1 - self.overspend)
        return 2 * self.success_rate * frugality / (self.success_rate + frugality)


def cheapest(curves: Mapping[str, Sequence[CurvePoint]], scenario: Scenario, prices: Prices) -> Deployment | None:
    """Return the cheapest deployment that these latencies allow, Eqs. (1)-(3); None if there is none."""
    options = [
        Deployment(gpu_profile=profile, pod_count=pod_count(scenario.users_count, served))
        for profile, curve in curves.items()
        if (served := users_per_pod(curve, scenario.limits))
    ]
    return min(options, key=lambda option: option.price_per_hour(prices), default=None)


def score(choose: Callable[[str], Deployment | None], truth: Curves, scenario: Scenario, prices: Prices) -> Score:
    """Score a method that chooses a deployment for each LLM. Choosing none is a failure."""
    overspends: list[float | None] = []
    for llm, curves in truth.items():
        best = cheapest(curves, scenario, prices)
        if best is not None:
            overspends.append(_overspend(choose(llm), best, curves, scenario, prices))
    successes = [overspend for overspend in overspends if overspend is not None]
    count = len(overspends)
    return Score(
        llm_count=count,
        success_rate=len(successes) / count if count else 0.0,
        overspend=sum(successes) / len(successes) if successes else None,
        loss=sum(1.0 if overspend is None else min(overspend, 1.0) for overspend in overspends) / count
        if count
        else 0.0,
    )


def _overspend(
    chosen: Deployment | None,
    best: Deployment,
    curves: Mapping[str, Sequence[CurvePoint]],
    scenario: Scenario,
    prices: Prices,
) -> float | None:
    """Return the relative overspend of a success, None for a failure."""
    if chosen is None or chosen.gpu_profile not in curves:
        return None
    served = chosen.pod_count * users_per_pod(curves[chosen.gpu_profile], scenario.limits)
    if served < scenario.users_count:
        return None
    spent, needed = chosen.price_per_hour(prices), best.price_per_hour(prices)
    return (spent - needed) / needed


def score_curves(predicted: Curves, truth: Curves, scenario: Scenario, prices: Prices) -> Score:
    """Score the decisions that predicted latencies lead to."""
    return score(lambda llm: cheapest(predicted.get(llm, {}), scenario, prices), truth, scenario, prices)


def best_static_policy(
    truth: Curves, scenario: Scenario, prices: Prices, *, largest_pod_count: int
) -> tuple[Deployment, Score]:
    """Return the one deployment for every LLM that scores the highest SO, and its score."""
    policies = [
        Deployment(gpu_profile=profile, pod_count=pods)
        for profile in sorted({profile for curves in truth.values() for profile in curves})
        for pods in range(1, largest_pod_count + 1)
    ]
    scored = [(policy, score(lambda _, policy=policy: policy, truth, scenario, prices)) for policy in policies]  # type: ignore[misc]
    return max(scored, key=lambda entry: entry[1].so)
