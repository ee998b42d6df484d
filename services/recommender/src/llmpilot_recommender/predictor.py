"""The seam between a recommendation and whatever predicts latencies."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec


class Predictor(Protocol):
    """Predicts the latencies of an LLM nobody measured."""

    @property
    def users_counts(self) -> tuple[int, ...]:
        """The numbers of concurrent users per pod it predicts for, ascending: the set U of Eq. (3)."""
        ...

    def predict(self, spec: LlmSpec, profiles: Sequence[GpuProfile]) -> NDArray[np.float64]:
        """Return median nTTFT and ITL in milliseconds, shape (profiles, users_counts, 2)."""
        ...
