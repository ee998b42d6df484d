"""Sketches: how often which values occur, exactly while there are few, on a grid when there are many.

Invariant: the sketch of all values depends on nothing but how often each occurs. Parts may be cut and merged in any way
and any order; every field comes out the same.
The grid keeps 9 bits of a double's mantissa, rounded down: 512 steps from one power of two to the next, so a value is
at most .2 % above the one that stands for it, and whole numbers up to 512, like round ones above, stand for themselves.
"""

from collections.abc import Sequence

import numpy as np

from llmpilot_workload_generator.fitting.counting import CountTable, Numbers, SmallCounts, sum_equal
from llmpilot_workload_generator.model import Floats, Integers, Sketch

EXACT_VALUES = 16_384
"""With more different values than this, all go onto the grid."""

_DROPPED_BITS = np.int64(52 - 9)
_SIGN = np.int64(np.iinfo(np.int64).min)
_LARGEST = np.finfo(np.float64).max


def round_down(values: Floats) -> Floats:
    """Return the largest value of the grid that is not above each value."""
    bits = (values + 0.0).view(np.int64)
    ordered = np.where(bits < 0, _SIGN - bits, bits)  # rises with the value
    ordered = ordered >> _DROPPED_BITS << _DROPPED_BITS
    rounded = np.where(ordered < 0, _SIGN - ordered, ordered).view(np.float64)
    return np.maximum(rounded, -_LARGEST)


def sketch_of(values: Floats, counts: Integers, *, low: float, high: float, exact: bool = True) -> Sketch:
    """Return the sketch of values, in any order and perhaps repeated, that occur so often; `exact` as they are."""
    values, counts = sum_equal(values, counts)
    if exact and len(values) > EXACT_VALUES:
        exact = False
    if not exact:
        values, counts = sum_equal(round_down(values), counts)
    return Sketch(values=values, counts=counts, exact=exact, low=low, high=high)


def merge_sketches(sketches: Sequence[Sketch]) -> Sketch:
    """Return the sketch of everything that went into some sketches, at least one."""
    return sketch_of(
        np.concatenate([sketch.values for sketch in sketches]),
        np.concatenate([sketch.counts for sketch in sketches]),
        low=min(sketch.low for sketch in sketches),
        high=max(sketch.high for sketch in sketches),
        exact=all(sketch.exact for sketch in sketches),
    )


class SketchBuilder:
    """Takes the values of a parameter batch by batch, in bounded memory."""

    def __init__(self) -> None:
        self._small = SmallCounts()
        self._other = CountTable()
        self._is_exact = True
        self._low = np.inf
        self._high = -np.inf

    def add(self, values: Numbers) -> None:
        """Take values as `counting.small_or_float` returns them."""
        if values.dtype != np.float64:
            self._small.add(values)
        elif len(values):
            self._low = min(self._low, float(values.min()))
            self._high = max(self._high, float(values.max()))
            self._other.add((values if self._is_exact else round_down(values)).view(np.uint64))
            if self._is_exact and len(self._other) > EXACT_VALUES:
                self._leave_exactness()

    def small_values(self) -> Floats:
        """Return the values that were small integers, rising; exact whatever the sketch is."""
        return self._small.items()[0]

    def sketch(self) -> Sketch:
        """Return the sketch of the values taken so far, at least one."""
        small_values, small_counts = self._small.items()
        keys, counts = self._other.items()
        return sketch_of(
            np.concatenate((small_values, keys.view(np.float64))),
            np.concatenate((small_counts, counts)),
            low=min([self._low, *small_values[:1].tolist()]),
            high=max([self._high, *small_values[-1:].tolist()]),
            exact=self._is_exact,
        )

    def _leave_exactness(self) -> None:
        keys, counts = self._other.items()
        rounded, counts = sum_equal(round_down(keys.view(np.float64)), counts)
        self._other = CountTable.of(rounded.view(np.uint64), counts)
        self._is_exact = False
