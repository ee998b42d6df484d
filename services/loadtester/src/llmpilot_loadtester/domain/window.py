"""The part of a stage that counts.

Invariant: it holds the moments from its begin up to, not including, its end, in nanoseconds since the stage's start.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.records import Integers
from llmpilot_loadtester.domain.spec import Stage

NANOS_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When requests count that are sent, relative to the start of the stage."""

    from_nanos: int
    until_nanos: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.until_nanos - self.from_nanos) / NANOS_PER_SECOND

    def holds(self, nanos: Integers) -> npt.NDArray[np.bool_]:
        """Whether each moment is in the window."""
        return np.asarray((nanos >= self.from_nanos) & (nanos < self.until_nanos))


def window_of(stage: Stage) -> Window:
    """Return the measured window of a stage."""
    from_nanos = round(stage.warm_up_seconds * NANOS_PER_SECOND)
    return Window(from_nanos=from_nanos, until_nanos=from_nanos + round(stage.measure_seconds * NANOS_PER_SECOND))
