"""Which stage comes next.

Invariant: the next stage follows from the results so far alone, so that a load test that was interrupted goes on as if
it had not been.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.slo_search import SloSearch
from llmpilot_loadtester.domain.spec import LoadTestSpec, Stage, stages_of


class StagePlan(Protocol):
    """The stages of a load test."""

    @property
    def stage_count(self) -> int:
        """Stages at most."""

    def next_stage(self, results: Sequence[StageResult]) -> Stage | None:
        """Return the stage after these results, one per stage so far in order; None: there is none."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Stages that are known beforehand."""

    stages: tuple[Stage, ...]

    @property
    def stage_count(self) -> int:
        """Stages in all."""
        return len(self.stages)

    def next_stage(self, results: Sequence[StageResult]) -> Stage | None:
        """Return the one after as many as were measured."""
        return self.stages[len(results)] if len(results) < len(self.stages) else None


def plan_of(spec: LoadTestSpec) -> StagePlan:
    """Return the plan of a load test without violations."""
    if spec.search is not None:
        return SloSearch(search=spec.search, service_level=spec.service_level)
    return Ladder(tuple(stages_of(spec)))
