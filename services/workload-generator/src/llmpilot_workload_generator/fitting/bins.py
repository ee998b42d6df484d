"""Chooses bins that hold about as many requests each, where a value that is frequent enough has a bin of its own.

Invariant: no bin of several values holds more than the capacity, which is the smallest for which there are few enough
bins; it depends on nothing but the sketch, and only whole numbers are computed with.
Source: Lazuka et al., 2024, section III-B, which divides what the most frequent values leave; here they take nothing.
"""

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import MAX_BINS, Bins, Integers, Kind, Sketch

FEWEST_BINS = 2
MOST_BINS = 256
"""The bins of a cell are kept as bytes."""


def choose_bins(
    name: str, kind: Kind, sketch: Sketch, *, max_bins: int = MAX_BINS, categories: tuple[str, ...] = ()
) -> Bins:
    """Return at most `max_bins` bins for a parameter; one per value if there are no more different values.

    `categories`: what the values of a categorical parameter stand for, the most frequent first, so that those get bins
    of their own and the rest share some. Raises InvalidInputError unless `max_bins` is 2 to 256.
    """
    check_max_bins(max_bins)
    starts = np.arange(len(sketch.values))
    if len(starts) > max_bins:
        starts = np.array(_evenest_starts(sketch.counts, max_bins))
    return Bins(name=name, kind=kind, edges=sketch.values[starts], categories=categories)


def check_max_bins(max_bins: int) -> None:
    """Raise InvalidInputError where there cannot be so many bins."""
    if not FEWEST_BINS <= max_bins <= MOST_BINS:
        raise InvalidInputError([Violation("max_bins", f"must be {FEWEST_BINS} to {MOST_BINS}, is {max_bins}")])


def _evenest_starts(counts: Integers, max_bins: int) -> list[int]:
    """Return the first value of each bin under the smallest capacity that gives few enough bins."""
    ends = np.cumsum(counts)
    too_small, enough = 0, int(ends[-1])
    while enough - too_small > 1:
        capacity = (too_small + enough) // 2
        if _packed_starts(ends, capacity, max_bins) is None:
            too_small = capacity
        else:
            enough = capacity
    return _packed_starts(ends, enough, max_bins) or []


def _packed_starts(ends: Integers, capacity: int, max_bins: int) -> list[int] | None:
    """Return the first value of each bin when every bin takes all it can; None where those are too many bins.

    No other division within the capacity has fewer: what fits together still fits when it loses its first values.
    """
    starts: list[int] = []
    start, before = 0, 0
    while start < len(ends):
        if len(starts) == max_bins:
            return None
        starts.append(start)
        start = max(int(np.searchsorted(ends, before + capacity, side="right")), start + 1)
        before = int(ends[start - 1])
    return starts
