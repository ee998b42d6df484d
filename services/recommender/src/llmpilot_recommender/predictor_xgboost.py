"""The paper's predictor: one XGBoost booster over LLM features, GPU features and the number of users."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xgboost
from numpy.typing import NDArray

from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.features import FeatureSchema

SMALLEST_LATENCY_MS = 1e-3
"""Trees fitted on squared errors may undershoot zero; a latency does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XgboostPredictor:
    """A trained booster that knows how its columns are made."""

    schema: FeatureSchema
    booster: xgboost.Booster
    users_counts: tuple[int, ...]

    def predict(self, spec: LlmSpec, profiles: Sequence[GpuProfile]) -> NDArray[np.float64]:
        """Return median nTTFT and ITL in milliseconds, shape (profiles, users_counts, 2)."""
        features = self.schema.encode(spec, profiles, self.users_counts)
        latencies = self.booster.inplace_predict(features, validate_features=False)
        return np.maximum(latencies.astype(np.float64), SMALLEST_LATENCY_MS).reshape(
            len(profiles), len(self.users_counts), 2
        )
