"""The analytic probe: batches are run by arithmetic."""

import math
from collections.abc import AsyncGenerator, Sequence
from typing import Self

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.plan import Prediction
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeFacts, ProbeKind


class AnalyticProber:
    """Says of every batch what the formulas say."""

    def __init__(self, capacity_bytes: int, predict: Prediction) -> None:
        self._capacity_bytes = capacity_bytes
        self._predict = predict

    async def __aenter__(self) -> Self:
        """Return itself: there is nothing to load."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Leave nothing behind."""

    @property
    def facts(self) -> ProbeFacts:
        """What the formulas are of."""
        return ProbeFacts(
            kind=ProbeKind.ANALYTIC,
            device="formulas",
            capacity_bytes=self._capacity_bytes,
            weight_bytes=round(self._predict.weight_bytes),
            versions=(("formulas", "1"),),
            notes=("nothing was run: workspaces inside kernels and pieces of the allocator are not in the formulas",),
        )

    async def run(self, batches: Sequence[Batch], *, soak: bool = False) -> AsyncGenerator[CaseRun, None]:  # noqa: ARG002 formulas do not change
        """Yield a run for each batch, and end after the first that is too large."""
        for batch in batches:
            peak_bytes = math.ceil(self._predict(batch))
            passed = peak_bytes <= self._capacity_bytes
            yield CaseRun(
                batch=batch,
                outcome=Outcome.PASSED if passed else Outcome.OUT_OF_MEMORY,
                peak_bytes=peak_bytes,
                live_before_bytes=round(self._predict.weight_bytes),
                message="" if passed else f"{peak_bytes:,} bytes are more than {self._capacity_bytes:,}",
            )
            if not passed:
                return
