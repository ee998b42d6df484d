"""The final verdict on a weight: every kind of batch it allows, in random order, in a process of its own.

Invariant: the margin taken off a weight is what was seen to grow, never a flat share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.corners import corner_batches, sweep_batches
from llmpilot_tuner.domain.corners_dearest import Costs
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import CaseRun
from llmpilot_tuner.domain.result import CaseHeadroom, CurvePoint, Soak
from llmpilot_tuner.domain.search import Search

_CURVE_POINTS = 25
_BEYOND = 1.15
"""How far beyond the weight that was found the curves go."""


def soak_batches(
    limits: Limits, weight: int, *, step_count: int, seed: int, costs: Costs | None = None
) -> tuple[Batch, ...]:
    """Return the steps of a soak: every corner and the sweep between them once, then again in other orders.

    costs: of the LLM, see `corner_batches`.
    """
    batches = tuple(
        {
            replace(batch, case=""): batch
            for batch in (*sweep_batches(limits, weight), *corner_batches(limits, weight, costs))
        }.values()
    )
    generator = np.random.default_rng(seed)
    steps: list[Batch] = []
    while len(steps) < max(step_count, len(batches)):
        steps += [batches[index] for index in generator.permutation(len(batches))]
    return tuple(steps[: max(step_count, len(batches))])


def soak_of(runs: Sequence[CaseRun], *, batch_count: int, lowered_from: Iterable[int]) -> Soak:
    """Return what a soak showed; batch_count: its different batches, all of which the first so many steps ran."""
    held = [run.reserved_bytes for run in runs if run.reserved_bytes is not None]
    live = [run.live_before_bytes for run in runs if run.live_before_bytes is not None]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Soak(
        step_count=len(runs),
        largest_peak_bytes=max(peaks, default=None),
        largest_reserved_bytes=max(held, default=None),
        growth_bytes=max(held) - max(held[:batch_count]) if held else 0,
        drift_bytes=max(live) - live[0] if live else 0,
        lowered_from=tuple(lowered_from),
    )


def lacking_bytes(soak: Soak, capacity_bytes: int) -> int:
    """Return how much less the batches must need so that what grew could grow once more; 0: there is room."""
    largest = max(soak.largest_peak_bytes or 0, soak.largest_reserved_bytes or 0)
    return max(0, largest + soak.growth_bytes + soak.drift_bytes - capacity_bytes)


def headroom(search: Search, weight: int, runs: Iterable[CaseRun]) -> tuple[CaseHeadroom, ...]:
    """Return how near each corner case comes to the capacity, the nearest first."""
    seen: dict[Batch, CaseRun] = {}
    for run in runs:
        if run.batch not in seen or _needed_bytes(run) > _needed_bytes(seen[run.batch]):
            seen[run.batch] = run
    found = [_case_headroom(search, batch, seen.get(batch)) for batch in search.problem.cases(weight)]
    return tuple(sorted(found, key=lambda case: case.headroom_bytes))


def _needed_bytes(run: CaseRun | None) -> int:
    return max(run.peak_bytes or 0, run.reserved_bytes or 0) if run else 0


def _case_headroom(search: Search, batch: Batch, run: CaseRun | None) -> CaseHeadroom:
    predicted = search.predicted_bytes(batch) or 0.0
    return CaseHeadroom(
        batch=batch,
        predicted_bytes=predicted,
        peak_bytes=run.peak_bytes if run else None,
        reserved_bytes=run.reserved_bytes if run else None,
        headroom_bytes=search.problem.capacity_bytes - (_needed_bytes(run) or predicted),
    )


def curve(search: Search, weight: int) -> tuple[CurvePoint, ...]:
    """Return the predicted memory of each case from the lowest weight to a little beyond the one that was found."""
    problem = search.problem
    end = min(problem.highest, max(problem.down(weight * _BEYOND), problem.lowest + problem.granule))
    weights = sorted({max(problem.lowest, problem.down(w)) for w in np.linspace(problem.lowest, end, _CURVE_POINTS)})
    return tuple(
        CurvePoint(case=batch.case, weight=each, predicted_bytes=predicted)
        for each in weights
        for batch in problem.cases(each)
        if (predicted := search.predicted_bytes(batch)) is not None
    )
