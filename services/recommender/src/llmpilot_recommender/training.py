"""Training the paper's predictor: XGBoost, limit-aimed sample weights, monotone in users, leave-one-LLM-out tuning.

Sec. IV-B, Lazuka et al., 2024. One booster predicts nTTFT and ITL (one tree per target and round).
Invariant: the same dataset, limits and seed give the same booster.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import xgboost
from numpy.typing import NDArray

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import LatencyLimits
from llmpilot_recommender.features import FeatureSchema
from llmpilot_recommender.sample_weights import sample_weights

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What cross-validation chooses."""

    tree_count: int
    max_depth: int
    learning_rate: float
    subsample: float
    colsample_bytree: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The hyperparameters to choose from. All tree counts are scored by one training, as prefixes of the longest."""

    tree_counts: tuple[int, ...] = (5, 10, 20, 50)
    max_depths: tuple[int, ...] = (4, 6, 8, 10)
    learning_rates: tuple[float, ...] = (0.1, 0.5)
    subsamples: tuple[float, ...] = (0.5, 0.8, 1.0)
    colsamples_bytree: tuple[float, ...] = (0.8, 1.0)

    def longest(self) -> Iterator[Hyperparameters]:
        """Yield every combination with the largest tree count."""
        for depth, rate, rows, columns in product(
            self.max_depths, self.learning_rates, self.subsamples, self.colsamples_bytree
        ):
            yield Hyperparameters(
                tree_count=max(self.tree_counts),
                max_depth=depth,
                learning_rate=rate,
                subsample=rows,
                colsample_bytree=columns,
            )

    def all(self) -> tuple[Hyperparameters, ...]:
        """Return every combination, in the order in which `scores_on` scores them."""
        return tuple(
            Hyperparameters(**{**asdict(longest), "tree_count": trees})
            for longest in self.longest()
            for trees in self.tree_counts
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """The dataset as a regression problem. n rows, one per measurement with both latencies."""

    schema: FeatureSchema
    features: NDArray[np.float32]
    """(n, features), missing as NaN."""
    latencies_ms: Floats
    """(n, 2): nTTFT and ITL."""
    llms: NDArray[np.str_]
    """(n,): LLM name of each row."""
    curve_ids: NDArray[np.int64]
    """(n,): rows of one (LLM, GPU profile) share an id."""

    @property
    def llm_names(self) -> list[str]:
        """The LLMs, sorted."""
        return sorted(set(self.llms.tolist()))

    def weights(self, limits: LatencyLimits) -> Floats:
        """Return the sample weights of Eq. (4) for these limits, shape (n,)."""
        return sample_weights(self.latencies_ms, np.array([limits.nttft_ms, limits.itl_ms]), self.curve_ids)


def training_set(dataset: Dataset, specs: Mapping[str, LlmSpec], profiles: Mapping[str, GpuProfile]) -> TrainingSet:
    """Return the rows of the dataset that have both latencies and whose LLM and GPU profile are described."""
    rows = [
        (measurement, measurement.nttft.median_ms, measurement.itl.median_ms)
        for measurement in dataset.measurements
        if measurement.llm in specs and measurement.gpu_profile in profiles
    ]
    complete = [(row, nttft, itl) for row, nttft, itl in rows if nttft is not None and itl is not None]
    if len({row.llm for row, _, _ in complete}) < 2:  # noqa: PLR2004 leave-one-LLM-out needs one to leave out
        raise PreconditionError("training needs measurements of at least two LLMs whose architecture is known")
    curves = {
        key: index for index, key in enumerate(dict.fromkeys((row.llm, row.gpu_profile) for row, _, _ in complete))
    }
    schema = FeatureSchema.covering(
        [specs[llm] for llm in dict.fromkeys(row.llm for row, _, _ in complete)],
        [profiles[name] for name in dict.fromkeys(row.gpu_profile for row, _, _ in complete)],
    )
    return TrainingSet(
        schema=schema,
        features=np.concatenate(
            [schema.encode(specs[row.llm], [profiles[row.gpu_profile]], [row.users_count]) for row, _, _ in complete]
        ),
        latencies_ms=np.array([(nttft, itl) for _, nttft, itl in complete], dtype=np.float64),
        llms=np.array([row.llm for row, _, _ in complete]),
        curve_ids=np.array([curves[row.llm, row.gpu_profile] for row, _, _ in complete], dtype=np.int64),
    )


def fit(
    data: TrainingSet, rows: NDArray[np.bool_], weights: Floats, parameters: Hyperparameters, seed: int
) -> xgboost.Booster:
    """Train one booster on some rows."""
    matrix = xgboost.DMatrix(
        data.features[rows], label=data.latencies_ms[rows], weight=weights[rows], missing=np.nan, nthread=1
    )
    return xgboost.train(
        {
            "objective": "reg:squarederror",
            "tree_method": "hist",
            "max_bin": 256,
            "max_depth": parameters.max_depth,
            "learning_rate": parameters.learning_rate,
            "subsample": parameters.subsample,
            "colsample_bytree": parameters.colsample_bytree,
            "monotone_constraints": data.schema.monotone_constraints(),
            "seed": seed,
            "nthread": 1,
        },
        matrix,
        num_boost_round=parameters.tree_count,
    )


def weighted_mape(truth_ms: Floats, predicted_ms: Floats, weights: Floats) -> float:
    """Return the weighted mean absolute percentage error, averaged over both latencies; 1.0 is 100 %."""
    errors = np.abs(truth_ms - predicted_ms) / np.maximum(np.abs(truth_ms), np.finfo(np.float64).eps)
    total = float(weights.sum())
    return float((errors.mean(axis=1) * weights).sum() / total) if total > 0 else float(errors.mean())


def scores_on(
    data: TrainingSet,
    weights: Floats,
    *,
    left_out: Sequence[str],
    scored: Sequence[str],
    grid: Grid,
    seed: int,
) -> Iterator[Floats]:
    """Train without `left_out`, once per `grid.longest()`, and yield (tree_counts, scored) weighted MAPEs each time."""
    training_rows = ~np.isin(data.llms, left_out)
    for parameters in grid.longest():
        booster = fit(data, training_rows, weights, parameters, seed)
        scores = np.empty((len(grid.tree_counts), len(scored)))
        for row, trees in enumerate(grid.tree_counts):
            for column, llm in enumerate(scored):
                rows = data.llms == llm
                predicted = booster.inplace_predict(data.features[rows], iteration_range=(0, trees))
                scores[row, column] = weighted_mape(data.latencies_ms[rows], predicted, weights[rows])
        yield scores


def select_hyperparameters(
    data: TrainingSet, limits: LatencyLimits, *, grid: Grid, seed: int, progress: Progress
) -> tuple[Hyperparameters, float]:
    """Return the combination with the lowest weighted MAPE over leave-one-LLM-out splits, and that error."""
    weights = data.weights(limits)
    llms = data.llm_names
    steps = len(llms) * len(grid.all()) // len(grid.tree_counts)
    totals = np.zeros(len(grid.all()))
    done = 0
    for llm in llms:
        split: list[Floats] = []
        for scores in scores_on(data, weights, left_out=[llm], scored=[llm], grid=grid, seed=seed):
            split.append(scores[:, 0])
            done += 1
            progress(done, steps)
        totals += np.concatenate(split)
    best = int(np.argmin(totals))
    return grid.all()[best], float(totals[best] / len(llms))


def train_all(data: TrainingSet, limits: LatencyLimits, parameters: Hyperparameters, seed: int) -> xgboost.Booster:
    """Train on every row."""
    return fit(data, np.ones(len(data.llms), dtype=np.bool_), data.weights(limits), parameters, seed)
