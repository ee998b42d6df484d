"""Alias tables (Walker, 1977; Vose, 1991): draw one of many things by its weight with one look-up, or two.

A table has a power of two of slots. The top bits of a random 64-bit number name a slot; the slot's own thing is drawn
where the number's low 32 bits are below the slot's threshold, else the slot's alias. Threshold and alias share a word,
so a draw touches one cache line, multiplies nothing, and is off by at most 2^-32 of a slot.
Invariant: a thing of weight 0 is never drawn.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.compiled import compiled
from llmpilot_workload_generator.model import Floats, Integers, Keys

LARGEST_COUNT = 1 << 31
"""Aliases are 32 bits wide."""

_LARGEST_PRODUCT = 2**62
_THRESHOLDS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasTable:
    """What compiled code needs to draw."""

    slots: Keys
    """Of each slot: the threshold in the high 32 bits, the alias in the low ones."""
    shift: np.uint64
    """Slot of a random number: (number >> 1) >> shift; in two steps, for a table of one slot would shift by 64."""


def build_alias(weights: npt.NDArray[np.integer[Any]] | Floats) -> AliasTable:
    """Return the table that draws number i with probability weights[i] / sum; each slot is exact to 2^-32 of it.

    Weights are >= 0 and finite, and one of them at least is > 0. Whole numbers are taken as they are.
    """
    bits = max(len(weights) - 1, 0).bit_length()
    slots = np.empty(1 << bits, np.uint64)
    whole = _whole_weights(weights, len(slots))
    _fill(whole, slots, np.empty(len(slots), np.int64), np.empty(len(slots), np.int64))
    return AliasTable(slots=slots, shift=np.uint64(63 - bits))


def _whole_weights(weights: npt.NDArray[np.integer[Any]] | Floats, slot_count: int) -> Integers:
    """Return whole weights, of which the sum times the slots is not too large for 64 bits."""
    total = float(weights.sum(dtype=np.float64))
    if weights.dtype.kind in "iu" and total * slot_count < _LARGEST_PRODUCT:
        return weights.astype(np.int64)  # a copy: read-only arrays would be compiled for anew
    scaled = weights / weights.max()  # a sum of tiny weights would not do as a divisor
    whole: Integers = np.floor(scaled * (_LARGEST_PRODUCT / 2 / slot_count / float(scaled.sum()))).astype(np.int64)
    return whole


@compiled
def _fill(weights: Integers, slots: Keys, shares: Integers, stack: Integers) -> None:
    """Fill the slots: whatever has less than a slot's share gets the rest of the slot from one that has more.

    Shares are counted in units of which a slot holds the sum of all weights, so nothing is rounded but the thresholds.
    """
    slot_count = len(slots)
    full = weights.sum()
    small_count, large_start = 0, slot_count  # the stack has the small ones at its begin, the others at its end
    for i in range(slot_count):
        shares[i] = weights[i] * slot_count if i < len(weights) else 0
        if shares[i] < full:
            stack[small_count] = i
            small_count += 1
        else:
            large_start -= 1
            stack[large_start] = i
    while small_count > 0 and large_start < slot_count:
        small_count -= 1
        small, large = stack[small_count], stack[large_start]
        threshold = min(np.uint64(float(shares[small]) / float(full) * _THRESHOLDS), np.uint64(_THRESHOLDS - 1))
        slots[small] = (threshold << np.uint64(32)) | np.uint64(large)
        shares[large] -= full - shares[small]
        if shares[large] < full:
            large_start += 1
            stack[small_count] = large
            small_count += 1
    for place in range(large_start, slot_count):  # what is left is full, exactly
        slots[stack[place]] = (np.uint64(_THRESHOLDS - 1) << np.uint64(32)) | np.uint64(stack[place])
