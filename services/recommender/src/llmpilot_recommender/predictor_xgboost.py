"""The paper's predictor: one XGBoost booster over LLM features, GPU features and the number of users."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xgboost
from numpy.typing import NDArray

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.features import FeatureSchema
from llmpilot_recommender.model_store import Manifest, load_model

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


def load_predictor(directory: Path) -> tuple[Manifest, XgboostPredictor]:
    """Read a trained model; raises InvalidInputError when it is not usable by this version."""
    manifest, booster = load_model(directory)
    schema = FeatureSchema.from_names(manifest.features)
    if booster.num_features() != len(schema.names):
        counts = f"{booster.num_features()} features, its manifest names {len(schema.names)}"
        raise InvalidInputError([Violation(str(directory), f"the booster takes {counts}; train again")])
    return manifest, XgboostPredictor(schema=schema, booster=booster, users_counts=manifest.users_counts)
