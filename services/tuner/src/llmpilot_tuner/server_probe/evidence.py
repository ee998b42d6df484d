"""Which lower weight to start a server with, after it ran out of memory and died of it or cannot be asked any more.

Invariant: the weight is below the one that failed, and depends on nothing but what was seen.
"""

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.search import Problem, largest_weight

_MISSING_FACTOR = 1.25
"""What one allocation lacked may not be all: others would have come after it."""
_UNKNOWN_SHARE = 0.3
"""Of the memory beside the weights, what is not counted on where nothing says how much was lacking."""


def lower_weight(
    problem: Problem, failed: int, *, missing_bytes: int | None = None, room_tokens: int | None = None
) -> int:
    """Return what the server says it has room for, else the largest weight whose cases need enough less than before.

    missing_bytes: what the allocation that failed lacked. room_tokens: what the server says it has room for.
    """
    high = max(problem.lowest, failed - problem.granule)
    if room_tokens is not None:
        return max(problem.lowest, min(high, problem.down(room_tokens)))
    predict = problem.predict
    if predict is None:
        return max(problem.lowest, min(high, problem.middle(problem.lowest, failed)))
    needed = min(problem.capacity_bytes, max(predict(batch) for batch in problem.cases(failed)))
    if missing_bytes:
        capacity = needed - _MISSING_FACTOR * missing_bytes
    else:
        capacity = needed - _UNKNOWN_SHARE * max(0.0, needed - problem.weight_bytes)

    def fits(weight: int) -> bool:
        return all(_predicted(problem, batch) <= capacity for batch in problem.cases(weight))

    return largest_weight(problem, high, fits) or problem.lowest


def _predicted(problem: Problem, batch: Batch) -> float:
    return problem.predict(batch) if problem.predict is not None else 0.0
