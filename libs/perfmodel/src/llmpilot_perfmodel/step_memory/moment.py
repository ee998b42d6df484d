"""The moments of a step that can be its peak."""

from collections.abc import Iterable
from typing import NamedTuple

from llmpilot_perfmodel.step_memory.batch import StepMemory

INDEX_BYTES = 8
"""Of a token id, a position, an attention mask's number."""
SCORE_BYTES = 4
"""Of a score while scores are normalized."""


class Moment(NamedTuple):
    """What is alive at one moment."""

    phase: str
    working_bytes: float
    cache_bytes: float


def step_peak(weight_bytes: float, moments: Iterable[Moment]) -> StepMemory:
    """Return the moment with the most bytes."""
    peak = max(moments, key=_bytes, default=Moment("idle", 0, 0))
    return StepMemory(
        weight_bytes=weight_bytes, cache_bytes=peak.cache_bytes, working_bytes=peak.working_bytes, phase=peak.phase
    )


def _bytes(moment: Moment) -> float:
    return moment.working_bytes + moment.cache_bytes
