"""Trained predictors on disk: XGBoost's own UBJ beside a manifest. Nothing that executes is ever loaded.

Invariant: a model that loads was written by a compatible version and is the one its manifest describes.
"""

import hashlib
from pathlib import Path

import xgboost
from pydantic import ValidationError

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.features import FeatureSchema
from llmpilot_recommender.manifest import Manifest
from llmpilot_recommender.predictor_xgboost import XgboostPredictor
from llmpilot_servicekit.file_output import make_folder, write_whole

BUNDLED_MODEL = Path(__file__).parent / "data" / "model"
MANIFEST_NAME = "manifest.json"
BOOSTER_NAME = "booster.ubj"


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


def load_predictor(directory: Path) -> tuple[Manifest, XgboostPredictor]:
    """Read a trained model; raises InvalidInputError when it is not usable by this version."""
    manifest, booster = load_model(directory)
    schema = FeatureSchema.from_names(manifest.features)
    if booster.num_features() != len(schema.names):
        counts = f"{booster.num_features()} features, its manifest names {len(schema.names)}"
        raise InvalidInputError([Violation(str(directory), f"the booster takes {counts}; train again")])
    return manifest, XgboostPredictor(schema=schema, booster=booster, users_counts=manifest.users_counts)


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
