"""The manifest of a trained predictor: what a model file does not say of itself.

Invariant: a manifest that parses names its features, its loads and the data it was trained on.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from llmpilot_recommender.training import Hyperparameters

FORMAT_VERSION: Literal[1] = 1


def _ascending(users_counts: tuple[int, ...]) -> tuple[int, ...]:
    if list(users_counts) != sorted(set(users_counts)):
        raise ValueError("must ascend")
    return users_counts


class ManifestLimits(BaseModel):
    """The limits that the sample weights aim at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nttft_ms: float
    itl_ms: float


class Manifest(BaseModel):
    """What a model file does not say of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    kind: Literal["xgboost"] = "xgboost"
    name: str
    """"models/{id}"; the id is taken from the booster's own bytes."""
    create_time: datetime
    software_version: str
    xgboost_version: str
    dataset_version: str
    limits: ManifestLimits
    seed: int
    hyperparameters: Hyperparameters
    features: tuple[str, ...]
    users_counts: Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_ascending)]
    training_llms: tuple[str, ...]
    metrics: dict[str, float]
    booster_sha256: str
