"""Trained predictors on disk: XGBoost's own UBJ beside a manifest. Nothing that executes is ever loaded.

Invariant: a model that loads was written by a compatible version and is the one its manifest describes.
"""

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import xgboost
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.file_output import make_folder, write_whole
from llmpilot_recommender.training import Hyperparameters

FORMAT_VERSION: Literal[1] = 1
BUNDLED_MODEL = Path(__file__).parent / "data" / "model"
MANIFEST_NAME = "manifest.json"
BOOSTER_NAME = "booster.ubj"


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


def save_model(directory: Path, booster: xgboost.Booster, **facts: object) -> Manifest:
    """Write booster and manifest; `facts` are the manifest's fields that are not derived from the booster."""
    content = bytes(booster.save_raw("ubj"))
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest.model_validate(
        {
            **facts,
            "name": f"models/xgboost-{digest[:12]}",
            "xgboost_version": xgboost.__version__,
            "booster_sha256": digest,
        }
    )
    make_folder(directory)
    write_whole(directory / BOOSTER_NAME, content)
    write_whole(directory / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest


def load_model(directory: Path) -> tuple[Manifest, xgboost.Booster]:
    """Read a model; raises InvalidInputError that names the file and what is wrong with it."""
    manifest = _load_manifest(directory / MANIFEST_NAME)
    path = directory / BOOSTER_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror}); train a model with `llm-pilot train`") from error
    if hashlib.sha256(content).hexdigest() != manifest.booster_sha256:
        raise _refusal(path, f"is not the booster that {MANIFEST_NAME} describes (its SHA-256 differs); train again")
    if not (content.startswith(b"{") and content.endswith(b"}")):  # XGBoost crashes on some half files
        raise _refusal(path, "is not a whole UBJ file; train again")
    try:
        booster = xgboost.Booster(model_file=bytearray(content))
    except (xgboost.core.XGBoostError, UnicodeDecodeError) as error:  # its messages quote bytes of the file
        raise _refusal(path, f"XGBoost {xgboost.__version__} cannot read it; train again") from error
    booster.set_param({"nthread": 1})
    return manifest, booster


def _load_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror}); train a model with `llm-pilot train`") from error
    except ValidationError as error:
        raise InvalidInputError(
            Violation(".".join(map(str, (path.name, *problem["loc"]))), f"{problem['msg']}; train again")
            for problem in error.errors()
        ) from error


def _refusal(path: Path, description: str) -> InvalidInputError:
    return InvalidInputError([Violation(str(path), description)])
