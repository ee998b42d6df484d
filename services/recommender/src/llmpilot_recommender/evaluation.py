"""Nested leave-one-LLM-out evaluation of the paper's method, Sec. V-C, Lazuka et al., 2024.

For each LLM the hyperparameters are chosen on the other LLMs only, the booster is trained on the other LLMs only, and
its decisions are scored on the LLM's true latencies. A booster trained without the LLMs A and B serves both the split
that holds out A and the one that holds out B, so half of the trainings are enough.
Invariant: nothing measured on an LLM reaches the predictions for it.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import CurvePoint, LatencyLimits, measured_point, predicted_points
from llmpilot_recommender.predictor_xgboost import XgboostPredictor
from llmpilot_recommender.scores import Curves, Prices, Scenario, Score, score_curves
from llmpilot_recommender.training import Grid, Hyperparameters, Progress, fit, scores_on, training_set

PAPER_LIMITS = LatencyLimits(nttft_ms=100, itl_ms=50)
PAPER_USERS_COUNT = 200
GRID_NTTFT_MS = (25.0, 50.0, 100.0, 200.0, 400.0)
GRID_ITL_MS = (25.0, 35.0, 50.0, 75.0, 100.0)
GRID_USERS_COUNTS = (50, 200, 1000)
PUBLISHED_ERROR_RATE = 1.0
"""The truth as published: failed requests do not count."""
CLEAN_ERROR_RATE = 0.01
"""The clean truth: a load with more than 1 % failed requests does not serve its users."""

TRUTHS = {"published": PUBLISHED_ERROR_RATE, "clean": CLEAN_ERROR_RATE}
"""The largest error rate at which a load counts as served, by truth."""


def paper_scenario(error_rate: float) -> Scenario:
    """Return the paper's scenario under one of the two truths."""
    limits = LatencyLimits(nttft_ms=PAPER_LIMITS.nttft_ms, itl_ms=PAPER_LIMITS.itl_ms, error_rate=error_rate)
    return Scenario(limits=limits, users_count=PAPER_USERS_COUNT)


def grid_scenarios(error_rate: float) -> tuple[Scenario, ...]:
    """Return the 75 scenarios of the grid under one of the two truths."""
    return tuple(
        Scenario(limits=LatencyLimits(nttft_ms=nttft, itl_ms=itl, error_rate=error_rate), users_count=users)
        for nttft, itl, users in itertools.product(GRID_NTTFT_MS, GRID_ITL_MS, GRID_USERS_COUNTS)
    )


def true_curves(dataset: Dataset) -> Curves:
    """Return the measured latencies and error rates."""
    curves: dict[str, dict[str, list[CurvePoint]]] = defaultdict(lambda: defaultdict(list))
    for row in dataset.measurements:
        curves[row.llm][row.gpu_profile].append(measured_point(row))
    return {llm: dict(by_profile) for llm, by_profile in curves.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """What one seed gave, per truth."""

    seed: int
    hyperparameters: Mapping[str, Hyperparameters]
    """By held-out LLM, chosen at the paper's limits."""
    paper: Mapping[str, Score]
    """By truth ("published", "clean"): the paper's scenario."""
    grid: Mapping[str, Sequence[Score]]
    """By truth: every scenario of the grid, boosters trained for its limits with the same hyperparameters."""
    grid_single: Mapping[str, Sequence[Score]]
    """By truth: every scenario of the grid, boosters trained for the paper's limits, as a running service has one."""


class Evaluation:
    """The nested evaluation on one dataset; every seed is a run of its own.

    InvalidInputError: something was measured of which no architecture, no GPU or no price is known.
    """

    def __init__(
        self,
        dataset: Dataset,
        specs: Mapping[str, LlmSpec],
        profiles: Mapping[str, GpuProfile],
        prices: Prices,
        *,
        grid: Grid,
        worker_count: int,
    ) -> None:
        if violations := tuple(_unknown(dataset, specs, profiles, prices)):
            raise InvalidInputError(violations)
        self._data = training_set(dataset, specs, profiles)
        self._specs = specs
        self._profiles = profiles
        self._prices = prices
        self._grid = grid
        self._worker_count = worker_count
        self._truth = true_curves(dataset)
        self._llms = self._data.llm_names
        if len(self._llms) < 3:  # noqa: PLR2004 one to predict, one to choose hyperparameters on, one to learn from
            raise PreconditionError("a nested evaluation needs measurements of at least three LLMs")
        self._users_counts = dataset.users_counts

    def run(self, seed: int, progress: Progress) -> SeedResult:
        """Evaluate with one seed; `progress` counts trainings."""
        limit_pairs = [
            LatencyLimits(nttft_ms=nttft, itl_ms=itl) for nttft, itl in itertools.product(GRID_NTTFT_MS, GRID_ITL_MS)
        ]
        pairs = list(itertools.combinations(self._llms, 2))
        counter = _Counter(progress, len(pairs) + len(limit_pairs))
        with ThreadPoolExecutor(self._worker_count) as pool:
            try:
                chosen = self._choose(pool, pairs, seed, counter)
                predicted: dict[tuple[float, float], Curves] = {}
                all_curves = pool.map(lambda limits: self._predict(chosen, limits, seed), limit_pairs)
                for limits, curves in zip(limit_pairs, all_curves, strict=True):
                    predicted[limits.nttft_ms, limits.itl_ms] = curves
                    counter.step()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._scored(seed, chosen, predicted)

    def _scored(
        self, seed: int, chosen: Mapping[str, Hyperparameters], predicted: Mapping[tuple[float, float], Curves]
    ) -> SeedResult:
        def scored(scenario: Scenario, limits: LatencyLimits) -> Score:
            curves = predicted[limits.nttft_ms, limits.itl_ms]
            return score_curves(curves, self._truth, scenario, self._prices)

        return SeedResult(
            seed=seed,
            hyperparameters=chosen,
            paper={truth: scored(paper_scenario(rate), PAPER_LIMITS) for truth, rate in TRUTHS.items()},
            grid={
                truth: [scored(entry, entry.limits) for entry in grid_scenarios(rate)] for truth, rate in TRUTHS.items()
            },
            grid_single={
                truth: [scored(entry, PAPER_LIMITS) for entry in grid_scenarios(rate)] for truth, rate in TRUTHS.items()
            },
        )

    def _choose(
        self, pool: ThreadPoolExecutor, pairs: Sequence[tuple[str, str]], seed: int, counter: "_Counter"
    ) -> dict[str, Hyperparameters]:
        """Return, for each held-out LLM, the hyperparameters with the lowest mean error on the others."""
        weights = self._data.weights(PAPER_LIMITS)
        totals = {llm: np.zeros(len(self._grid.all())) for llm in self._llms}

        def errors(pair: tuple[str, str]) -> NDArray[np.float64]:
            scores = scores_on(self._data, weights, left_out=pair, scored=pair, grid=self._grid, seed=seed)
            return np.concatenate(list(scores))

        for (first, second), scores in zip(pairs, pool.map(errors, pairs), strict=True):
            on_first, on_second = scores.T
            totals[first] += on_second
            totals[second] += on_first
            counter.step()
        return {llm: self._grid.all()[int(np.argmin(total))] for llm, total in totals.items()}

    def _predict(self, chosen: Mapping[str, Hyperparameters], limits: LatencyLimits, seed: int) -> Curves:
        """Return what a predictor trained without the LLM says of each."""
        data, weights = self._data, self._data.weights(limits)
        curves = {}
        for llm in self._llms:
            booster = fit(data, data.llms != llm, weights, chosen[llm], seed)
            predictor = XgboostPredictor(schema=data.schema, booster=booster, users_counts=self._users_counts)
            names = list(self._truth[llm])
            latencies = predictor.predict(self._specs[llm], [self._profiles[name] for name in names]).tolist()
            curves[llm] = {
                name: predicted_points(self._users_counts, rows) for name, rows in zip(names, latencies, strict=True)
            }
        return curves


def _unknown(
    dataset: Dataset, specs: Mapping[str, LlmSpec], profiles: Mapping[str, GpuProfile], prices: Prices
) -> Iterator[Violation]:
    for names, known, missing in (
        (dataset.llms, specs, "its architecture is not known"),
        (dataset.gpu_profiles, profiles, "the GPU is not in the catalogue; add it with --gpus"),
        (dataset.gpu_profiles, prices, "has no price; add one with --prices"),
    ):
        yield from (Violation(f"dataset {name}", missing) for name in names if name not in known)


class _Counter:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def step(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (of a sample; 0 for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def grid_means(scores: Sequence[Score]) -> Iterator[tuple[str, float]]:
    """Yield the mean of each score over the scenarios in which it is known."""
    counted = [score for score in scores if score.llm_count]
    for name in ("success_rate", "overspend", "so", "loss"):
        values = [value for score in counted if (value := getattr(score, name)) is not None]
        yield name, float(np.mean(values)) if values else float("nan")
