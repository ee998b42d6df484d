"""How values are spread inside a bin of which only the range, the count and the sum are known.

Invariant: the counts add up to the count, and the values to the sum, exactly.
Source: of all distributions on a range with a given mean, the truncated geometric one has the largest entropy and so
says the least beyond it (Jaynes, 1957).
"""

import numpy as np

from llmpilot_workload_generator.model import Floats, Integers

_STEPS = 200
"""Halvings of an interval of 2,000 down to the precision of a float."""
_STEEPEST = 1000.0
"""A distribution whose weights fall by e^1000 from one point to the next is a point."""


def spread(point_count: int, count: int, total: int) -> Integers:
    """Return how many of `count` values are 0, 1, ..., point_count - 1 if they add up to `total`.

    Needs 0 <= total <= count * (point_count - 1).
    """
    if count == 0:
        return np.zeros(point_count, np.int64)
    if not 0 <= total <= count * (point_count - 1):
        raise ValueError(f"{count} values of at most {point_count - 1} cannot add up to {total}")
    below = np.rint(np.cumsum(_weights(point_count, total / count)) * count).astype(np.int64)
    below[-1] = count
    counts = np.diff(below, prepend=0)
    _shift(counts, total - int(counts @ np.arange(point_count)))
    return counts


def _weights(point_count: int, mean: float) -> Floats:
    """Return the probabilities, proportional to exp(slope * point), that have the mean."""
    points = np.arange(point_count)
    low, high = -_STEEPEST, _STEEPEST
    weights: Floats = np.ones(point_count)
    for _ in range(_STEPS):
        slope = (low + high) / 2
        powers = slope * points
        weights = np.exp(powers - powers.max())
        weights /= weights.sum()
        if weights @ points < mean:
            low = slope
        else:
            high = slope
    return weights


def _shift(counts: Integers, distance: int) -> None:
    """Move single values, of where there are most, until the sum is larger by `distance`."""
    last = len(counts) - 1
    while distance > 0:
        start = int(counts[:-1].argmax())
        step = min(distance, last - start)
        counts[start] -= 1
        counts[start + step] += 1
        distance -= step
    while distance < 0:
        start = 1 + int(counts[1:].argmax())
        step = min(-distance, start)
        counts[start] -= 1
        counts[start - step] += 1
        distance += step
