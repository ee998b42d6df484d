"""The moments of a step that can be its peak.

Invariant: what computes them for one step does so for many in one go, where it is given arrays instead of numbers.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.step_memory.batch import StepMemory

INDEX_BYTES = 8
"""Of a token id, a position, an attention mask's number."""
SCORE_BYTES = 4
"""Of a score while scores are normalized."""

Floats: TypeAlias = npt.NDArray[np.float64]
Amount: TypeAlias = float | npt.NDArray[Any]
"""Bytes, requests or tokens of one step, or an array with those of many."""


class Moment(NamedTuple):
    """What is alive at one moment."""

    phase: str
    working_bytes: Amount
    cache_bytes: Amount


def larger(one: Amount, other: Amount) -> Amount:
    """Return the larger of two amounts, for each step."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.maximum(one, other)
    return max(one, other)


def step_peak(weight_bytes: float, moments: Iterable[Moment]) -> StepMemory:
    """Return the moment with the most bytes, of one step."""
    peak = max(moments, key=_bytes, default=Moment("idle", 0, 0))
    return StepMemory(
        weight_bytes=weight_bytes,
        cache_bytes=float(peak.cache_bytes),
        working_bytes=float(peak.working_bytes),
        phase=peak.phase,
    )


def most_bytes(moments: Iterable[Moment]) -> Floats:
    """Return the bytes at the moment with most of them, beside the weights, of each of many steps."""
    return np.asarray(reduce(larger, (moment.working_bytes + moment.cache_bytes for moment in moments)), np.float64)


def _bytes(moment: Moment) -> float:
    return float(moment.working_bytes + moment.cache_bytes)
