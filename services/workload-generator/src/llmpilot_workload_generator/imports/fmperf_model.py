"""The workload model that was published with fmperf: a pickle of a joint histogram of 8,497,715 requests.

It keeps of each bin where it begins and the mean of its values, and of each cell its share of the requests. All counts
follow from the shares, all sums from the means; inside a bin values are spread as `max_entropy.py` says.
Invariant: cells, counts, and the sum of the values in each bin are those of the published model, exactly.
Source: Lazuka et al., 2024, section III-B; fmperf, Apache-2.0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.imports.allowed_pickle import read_attributes
from llmpilot_workload_generator.imports.max_entropy import spread
from llmpilot_workload_generator.model import (
    BATCH_SIZE,
    INPUT_TOKENS,
    IS_GREEDY,
    OUTPUT_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Arrivals,
    Bins,
    Floats,
    Integers,
    Kind,
    Parameter,
    Provenance,
    Sketch,
    WorkloadModel,
    encode_keys,
)

SOURCE = "fmperf all_nbins_64.pkl, the workload model of Lazuka et al., 2024"
LICENCE = "Apache-2.0"
CLASS_NAME = "custom_histogram_model.CustomHistogram"
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "generated_token_count": OUTPUT_TOKENS,
        "input_token_count": INPUT_TOKENS,
        "params.temperature": TEMPERATURE,
        "params.top_p": TOP_P,
        "params.top_k": TOP_K,
        "batch_size": BATCH_SIZE,
        "is_greedy": IS_GREEDY,
    }
)
"""What its parameters are called here."""
LARGEST_VALUES: Mapping[str, int] = MappingProxyType({INPUT_TOKENS: 4093, OUTPUT_TOKENS: 1500})
"""The largest values seen: range of tokens, Table II of Lazuka et al., 2024."""
NUMBER_STEPS = 100
"""Temperature and top_p are multiples of 1/100: so are all edges, and the sum of the values in each bin."""
_NUMBERS = frozenset({TEMPERATURE, TOP_P})
_TOLERANCE = 1e-3
"""How far a share times the number of requests, or a mean times a count, may be from a whole number."""
_LARGEST_REQUEST_COUNT = 10**9
"""More than this, and rounding errors of the shares would pass the tolerance."""
_LARGEST_RAREST_COUNT = 1000
_MOST_POINTS = 1 << 20
"""Of a bin."""


def read_fmperf(content: bytes, *, label: str, command: str = "") -> WorkloadModel:
    """Return the model in the pickle. Raises InvalidInputError where it is not such a pickle."""
    attributes = read_attributes(content, class_name=CLASS_NAME, label=label)
    try:
        return _model(_published(attributes), command)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = f"must be a workload model as fmperf publishes it: {type(error).__name__}: {error}"
        raise InvalidInputError([Violation(label, problem)]) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """The arrays of the pickle."""

    names: tuple[str, ...]
    edges: tuple[Floats, ...]
    labels: tuple[Floats, ...]
    """The mean of each bin."""
    cells: Floats
    """The label of every parameter (rows) in every cell (columns), rounded where the parameter is an integer."""
    shares: Floats


def _published(attributes: Mapping[str, Any]) -> _Published:
    names = attributes["columns_"]
    if not set(names) <= set(NAMES):
        raise ValueError(f"parameters must be of {', '.join(NAMES)}, are {', '.join(map(str, names))}")
    cells = np.array(attributes["indices_flat_"], np.float64).T
    shares = np.array(attributes["probs_flat_"], np.float64)
    if cells.shape != (len(names), len(shares)) or not (np.isfinite(cells).all() and np.isfinite(shares).all()):
        raise ValueError("must have a share, and a bin of every parameter, for each cell")
    return _Published(
        names=tuple(NAMES[name] for name in names),
        edges=tuple(_numbers(attributes["bin_edges_"][name]) for name in names),
        labels=tuple(_numbers(attributes["bin_labels_"][name]) for name in names),
        cells=cells,
        shares=shares,
    )


def _numbers(values: Sequence[float]) -> Floats:
    numbers = np.array(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("edges and labels must be lists of numbers")
    return numbers


def _model(published: _Published, command: str) -> WorkloadModel:
    counts = request_counts(published.shares)
    codes = np.array([_find(*row) for row in zip(published.names, published.cells, published.labels, strict=True)])
    keys = encode_keys(codes, [len(edges) for edges in published.edges])
    order = np.argsort(keys)
    if not (np.diff(keys[order]) > 0).all():
        raise ValueError("two cells are in the same bins")
    columns = zip(published.names, published.edges, published.labels, codes, strict=True)
    return WorkloadModel(
        parameters=tuple(
            _parameter(name, edges, labels, np.bincount(row, counts, len(edges)).astype(np.int64))
            for name, edges, labels, row in columns
        ),
        keys=keys[order],
        counts=counts[order],
        provenance=Provenance(source=SOURCE, licence=LICENCE, command=command, row_count=int(counts.sum())),
        arrivals=Arrivals(),
    )


def request_counts(shares: Floats) -> Integers:
    """Return the smallest counts of which these are the shares, by trying how often the rarest cell was seen.

    Raises ValueError where no number of requests up to 10^9, a thousand in the rarest cell, makes all of them whole.
    """
    if not len(shares) or shares.min() <= 0:
        raise ValueError("shares must be > 0")
    smallest = float(shares.min())
    for rarest in range(1, 1 + min(_LARGEST_RAREST_COUNT, int(_LARGEST_REQUEST_COUNT * smallest))):
        request_count = round(rarest / smallest)
        scaled = shares * request_count
        counts = np.rint(scaled)
        if np.abs(scaled - counts).max() <= _TOLERANCE and counts.sum() == request_count:
            return counts.astype(np.int64)
    raise ValueError("shares must be whole numbers of requests")


def _find(name: str, values: Floats, labels: Floats) -> npt.NDArray[np.intp]:
    """Return the bin of every cell, which is named by its label."""
    known = labels if name in _NUMBERS else np.rint(labels)
    found: npt.NDArray[np.intp] = np.abs(values[:, None] - known).argmin(axis=1)
    if (values != known[found]).any() or len(np.unique(known)) < len(known):
        raise ValueError(f"{name}: a cell must be in exactly one bin")
    return found


def _parameter(name: str, edges: Floats, labels: Floats, counts: Integers) -> Parameter:
    steps = NUMBER_STEPS if name in _NUMBERS else 1
    ranges = _ranges(name, edges, labels, steps)
    found = [
        _inside(low, high, count, label * steps, largest=LARGEST_VALUES.get(name))
        for (low, high), count, label in zip(ranges, counts.tolist(), labels.tolist(), strict=True)
    ]
    values = np.concatenate([points for points, _ in found]) / steps
    return Parameter(
        bins=Bins(
            name=name, kind=Kind.NUMBER if name in _NUMBERS else Kind.INTEGER, edges=np.rint(edges * steps) / steps
        ),
        sketch=Sketch(
            values=values,
            counts=np.concatenate([counts for _, counts in found]),
            exact=True,
            low=float(values[0]),
            high=float(values[-1]),
        ),
        lows=np.array([points[0] for points, _ in found]) / steps,
        highs=np.array([points[-1] for points, _ in found]) / steps,
    )


def _ranges(name: str, edges: Floats, labels: Floats, steps: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last point of each bin; of a last bin whose end is unknown the points around its mean."""
    points = np.rint(edges * steps).astype(np.int64).tolist()
    for low, beyond in pairwise(points):
        yield low, beyond - 1
    mean = labels[-1] * steps
    if name in LARGEST_VALUES:
        yield points[-1], LARGEST_VALUES[name]
    elif abs(mean - np.rint(mean)) < _TOLERANCE:
        yield round(mean), round(mean)
    else:
        yield int(np.floor(mean)), int(np.ceil(mean))


def _inside(low: int, high: int, count: int, mean: float, *, largest: int | None) -> tuple[Integers, Integers]:
    """Return the points of a bin that have values, and how many: they add up to what the mean says.

    Where the bin ends with the largest value of all, that was seen once at least.
    """
    total = round(mean * count)
    if abs(total - mean * count) > _TOLERANCE:
        raise ValueError(f"{count} values with the mean {mean} must add up to a whole number")
    if not 0 <= high - low < _MOST_POINTS:
        raise ValueError(f"a bin must have 1 to {_MOST_POINTS:,} points, {low} to {high} has not")
    known = int(high == largest)
    counts = spread(high - low + 1, count - known, total - low * (count - known) - high * known)
    counts[-1] += known
    (found,) = np.nonzero(counts)
    return found + low, counts[found]
