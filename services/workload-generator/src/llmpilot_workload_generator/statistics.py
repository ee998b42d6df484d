"""What a workload model says in numbers: marginals, correlations, entropy; and how far two models are apart.

Invariant: correlations and entropy are those of the joint histogram, over bins; values and distances are those of the
sketches, and exact where these are.
Source: Lazuka et al., 2024, section III-A; Spearman's correlation with mid-ranks for ties.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import (
    Floats,
    Integers,
    Kind,
    Parameter,
    Sketch,
    WorkloadModel,
    bin_centres,
)

KS_COEFFICIENT = float(np.sqrt(-np.log(0.05 / 2) / 2))
"""1.358: of the distance that two samples of one distribution pass in 5 % of all cases (Smirnov, 1948)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """The distribution of one parameter."""

    name: str
    kind: Kind
    lows: Floats
    """The smallest value in each bin."""
    highs: Floats
    """The largest value in each bin."""
    centres: Floats
    """The mean of the values in each bin."""
    counts: Integers
    """Requests in each bin."""
    entropy_bits: float
    """Over the bins."""
    distinct_count: int
    """Different values; where the sketch is not exact, at its precision."""
    low: float
    """The smallest value; this and what follows are of no meaning where the parameter is categorical."""
    high: float
    mean: float | None
    """None, as what follows: the parameter is categorical."""
    median: float | None
    p90: float | None
    p99: float | None
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model in numbers."""

    request_count: int
    cell_count: int
    marginals: tuple[Marginal, ...]
    spearman: tuple[tuple[float | None, ...], ...]
    """Of every two parameters; None where one is categorical or has one value only."""
    entropy_bits: float
    """Of the joint distribution over the cells."""

    @property
    def marginal_entropy_bits(self) -> float:
        """The sum of the entropies of all parameters."""
        return sum(marginal.entropy_bits for marginal in self.marginals)

    @property
    def total_correlation_bits(self) -> float:
        """What the parameters tell about each other; 0: they are independent."""
        return max(0.0, self.marginal_entropy_bits - self.entropy_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far the distributions of one parameter are apart."""

    name: str
    kind: Kind
    distance: float
    """Kolmogorov-Smirnov: the largest difference of the two CDFs; of categories, the total variation distance."""
    critical: float | None
    """What the distance of two samples of one distribution passes in 5 % of all cases. None: of categories."""
    means: tuple[float, float] | None
    """None: of categories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrelationDifference:
    """Spearman's correlation of two parameters in two models."""

    name: str
    other_name: str
    first: float
    second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models side by side."""

    request_counts: tuple[int, int]
    distances: tuple[Distance, ...]
    """Of the parameters that both have."""
    correlations: tuple[CorrelationDifference, ...]
    """Of every two parameters that are correlated in both."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def describe(model: WorkloadModel) -> Description:
    """Return a model in numbers."""
    marginals = tuple(_marginal(model, index) for index in range(len(model.parameters)))
    return Description(
        request_count=model.request_count,
        cell_count=len(model.keys),
        marginals=marginals,
        spearman=_spearman_matrix(model, marginals),
        entropy_bits=entropy_bits(model.counts),
    )


def compare(first: WorkloadModel, second: WorkloadModel) -> Comparison:
    """Return how far two models are apart; raises InvalidInputError where a parameter is categorical in one only."""
    shared = [name for name in first.names if name in second.names]
    columns = [tuple(model.parameters[model.index_of(name)] for model in (first, second)) for name in shared]
    violations = [
        Violation(
            one.name,
            f"must be of one kind, is {one.kind.value} in the first model and {other.kind.value} in the second",
        )
        for one, other in columns
        if (one.kind is Kind.CATEGORY) != (other.kind is Kind.CATEGORY)
    ]
    if violations:
        raise InvalidInputError(violations)
    return Comparison(
        request_counts=(first.request_count, second.request_count),
        distances=tuple(_distance(one, other) for one, other in columns),
        correlations=_correlation_differences(first, second, shared),
        only_first=tuple(name for name in first.names if name not in shared),
        only_second=tuple(name for name in second.names if name not in shared),
    )


def entropy_bits(counts: Integers) -> float:
    """Return the Shannon entropy of a distribution that is given by counts."""
    shares = counts[counts > 0] / counts.sum()
    return float((shares * -np.log2(shares)).sum()) + 0.0  # never -0


def quantile(sketch: Sketch, share: float) -> float:
    """Return the smallest value that at least this share of all values do not exceed."""
    below = np.cumsum(sketch.counts)
    return float(sketch.values[np.searchsorted(below, np.ceil(share * below[-1]))])


def mean(sketch: Sketch) -> float:
    """Return the mean of all values."""
    return float(sketch.values @ sketch.counts / sketch.total)


def spearman(codes: npt.NDArray[np.integer], other_codes: npt.NDArray[np.integer], counts: Integers) -> float | None:
    """Return Spearman's correlation of two columns of ordered codes, each pair of which occurs so often.

    None where a column has one value only.
    """
    if codes.min() == codes.max() or other_codes.min() == other_codes.max():
        return None
    shares = counts / counts.sum()
    ranks, other_ranks = _mid_ranks(codes, shares), _mid_ranks(other_codes, shares)
    return float(shares @ (ranks * other_ranks) / np.sqrt((shares @ ranks**2) * (shares @ other_ranks**2)))


def ks_distance(first: Sketch, second: Sketch) -> float:
    """Return the largest difference of two CDFs."""
    values = np.union1d(first.values, second.values)
    return float(np.abs(_cdf(first, values) - _cdf(second, values)).max())


def _mid_ranks(codes: npt.NDArray[np.integer], shares: Floats) -> Floats:
    """Return the mean rank of each code's ties, as a share of all, less their mean of one half."""
    held = np.bincount(codes, weights=shares)
    ranks = np.cumsum(held) - held / 2 - 0.5
    found: Floats = ranks[codes]
    return found


def _marginal(model: WorkloadModel, index: int) -> Marginal:
    parameter = model.parameters[index]
    sketch = parameter.sketch
    counts = np.zeros(len(parameter.bins), np.int64)
    np.add.at(counts, model.codes[index], model.counts)
    has_values = parameter.kind is not Kind.CATEGORY
    return Marginal(
        name=parameter.name,
        kind=parameter.kind,
        lows=parameter.lows,
        highs=parameter.highs,
        centres=bin_centres(parameter),
        counts=counts,
        entropy_bits=entropy_bits(counts),
        distinct_count=len(sketch.values),
        low=sketch.low,
        high=sketch.high,
        mean=mean(sketch) if has_values else None,
        median=quantile(sketch, 0.5) if has_values else None,
        p90=quantile(sketch, 0.9) if has_values else None,
        p99=quantile(sketch, 0.99) if has_values else None,
        categories=parameter.bins.categories,
    )


def _spearman_matrix(model: WorkloadModel, marginals: tuple[Marginal, ...]) -> tuple[tuple[float | None, ...], ...]:
    size = len(marginals)
    matrix: list[list[float | None]] = [[None] * size for _ in range(size)]
    ordered = [index for index, marginal in enumerate(marginals) if marginal.kind is not Kind.CATEGORY]
    for row in ordered:
        for column in ordered:
            if column >= row:
                found = spearman(model.codes[row], model.codes[column], model.counts)
                matrix[row][column] = matrix[column][row] = found
    return tuple(map(tuple, matrix))


def _cdf(sketch: Sketch, values: Floats) -> Floats:
    below = np.concatenate([[0], np.cumsum(sketch.counts)]) / sketch.total
    return below[np.searchsorted(sketch.values, values, side="right")]


def _distance(first: Parameter, second: Parameter) -> Distance:
    if first.kind is Kind.CATEGORY:
        shares, other_shares = _category_shares(first), _category_shares(second)
        texts = shares.keys() | other_shares.keys()
        distance = sum(abs(shares.get(text, 0.0) - other_shares.get(text, 0.0)) for text in texts) / 2
        return Distance(name=first.name, kind=first.kind, distance=distance, critical=None, means=None)
    one, other = first.sketch, second.sketch
    return Distance(
        name=first.name,
        kind=first.kind,
        distance=ks_distance(one, other),
        critical=KS_COEFFICIENT * float(np.sqrt(1 / one.total + 1 / other.total)),
        means=(mean(one), mean(other)),
    )


def _category_shares(parameter: Parameter) -> dict[str, float]:
    sketch = parameter.sketch
    texts = [parameter.bins.categories[int(value)] for value in sketch.values]
    return dict(zip(texts, (sketch.counts / sketch.total).tolist(), strict=True))


def _correlation_differences(
    first: WorkloadModel, second: WorkloadModel, shared: list[str]
) -> tuple[CorrelationDifference, ...]:
    found = []
    for place, name in enumerate(shared):
        for other_name in shared[place + 1 :]:
            one, other = (_correlation(model, name, other_name) for model in (first, second))
            if one is not None and other is not None:
                found.append(CorrelationDifference(name=name, other_name=other_name, first=one, second=other))
    return tuple(found)


def _correlation(model: WorkloadModel, name: str, other_name: str) -> float | None:
    index, other_index = model.index_of(name), model.index_of(other_name)
    if Kind.CATEGORY in {model.parameters[index].kind, model.parameters[other_index].kind}:
        return None
    return spearman(model.codes[index], model.codes[other_index], model.counts)
