"""Bootstrap replicates of the figures that load tests are compared by.

Requests are resampled whole, as the tokens of one are not independent; rates are resampled by blocks of the window.
Invariant: pure numpy, and the same generator gives the same replicates.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.records import Integers

Values = npt.NDArray[np.float64]

REPLICATE_COUNT = 400
BLOCK_COUNT = 20
"""Blocks of a window: their sums are nearly independent where a block is longer than a request."""
_LARGEST_COUNT = 1_000_000
"""Tokens that are resampled; of more, the requests drawn have so many, and the interval is wider for it. Also the
largest block of draws."""


def quantile_replicates(values: Values, share: float, generator: np.random.Generator) -> Values:
    """Return replicates of a quantile of values of which each belongs to another request."""
    at_once = max(1, _LARGEST_COUNT // len(values))
    rows = [min(at_once, REPLICATE_COUNT - done) for done in range(0, REPLICATE_COUNT, at_once)]
    drawn = (values[generator.integers(0, len(values), (row_count, len(values)))] for row_count in rows)
    return np.concatenate([np.quantile(block, share, axis=1) for block in drawn])


def grouped_quantile_replicates(
    values: Values, owners: Integers, shares: Sequence[float], generator: np.random.Generator
) -> Values:
    """Return replicates of quantiles over values of which each request has several: a column for each quantile.

    `owners` says which request each value belongs to, ascending.
    """
    if len(values) > _LARGEST_COUNT:
        values, owners = _some_requests(values, owners, generator)
    _, owners = np.unique(owners, return_inverse=True)
    order = np.argsort(values, kind="stable")
    ordered, owner_of = values[order], owners[order]
    request_count = int(owners.max()) + 1
    replicates = np.empty((REPLICATE_COUNT, len(shares)))
    for row in replicates:
        times_drawn = np.bincount(generator.integers(0, request_count, request_count), minlength=request_count)
        reached = np.cumsum(times_drawn[owner_of])
        places = np.searchsorted(reached, np.asarray(shares) * reached[-1])
        row[:] = ordered[np.minimum(places, len(ordered) - 1)]
    return replicates


def rate_replicates(
    moments: Integers, weights: Integers, window: tuple[int, int], generator: np.random.Generator
) -> Values:
    """Return replicates of a weight per second, of moments in a window of nanoseconds."""
    begin, end = window
    sums, _ = np.histogram(moments, np.linspace(begin, end, BLOCK_COUNT + 1), weights=weights)
    drawn = generator.integers(0, BLOCK_COUNT, (REPLICATE_COUNT, BLOCK_COUNT))
    return np.asarray(sums[drawn].sum(axis=1) / ((end - begin) / 1e9))


def share_replicates(are_true: npt.NDArray[np.bool_], generator: np.random.Generator) -> Values:
    """Return draws of a share of requests: from Jeffreys' posterior, as resampling no failures would be sure of 0."""
    true_count = int(are_true.sum())
    return np.asarray(generator.beta(true_count + 0.5, len(are_true) - true_count + 0.5, REPLICATE_COUNT))


def _some_requests(values: Values, owners: Integers, generator: np.random.Generator) -> tuple[Values, Integers]:
    requests = np.unique(owners)
    wanted = max(1, int(len(requests) * _LARGEST_COUNT / len(values)))
    chosen = np.isin(owners, generator.choice(requests, wanted, replace=False))
    return values[chosen], owners[chosen]
