import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import LatencyLimits
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.model_store import BUNDLED_MODEL, load_model, load_predictor, save_model
from llmpilot_recommender.training import Hyperparameters, train_all, training_set

SPECS = {name: llm.spec for name, llm in load_measured_llms().items()}
PARAMETERS = Hyperparameters(tree_count=3, max_depth=3, learning_rate=0.5, subsample=1, colsample_bytree=1)

EditManifest = Callable[[Callable[[dict[str, Any]], object]], Path]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


@pytest.fixture
def edit_manifest(model: Path) -> EditManifest:
    """Changes the manifest of the copy; gives the copy."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        path = model / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        return model

    return edit


def refusal(model: Path) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        load_predictor(model)
    return caught.value


def test_bundled_model_is_what_training_on_the_bundled_data_gives(bundled_knowledge: Knowledge) -> None:
    """So that it was trained on the features that it is asked with."""
    manifest, bundled = load_model(BUNDLED_MODEL)
    profiles = {profile.name: profile for profile in bundled_knowledge.catalogue.profiles()}
    data = training_set(bundled_knowledge.dataset, SPECS, profiles)
    limits = LatencyLimits(nttft_ms=manifest.limits.nttft_ms, itl_ms=manifest.limits.itl_ms)
    again = train_all(data, limits, manifest.hyperparameters, manifest.seed)
    # n = 1056 predictions; another CPU may sum in another order, so float32's 1e-7 with room.
    np.testing.assert_allclose(
        bundled.inplace_predict(data.features), again.inplace_predict(data.features), rtol=1e-4, atol=1e-3
    )
    assert manifest.dataset_version == bundled_knowledge.dataset.version


def test_model_that_was_saved_predicts_the_same_when_loaded(tmp_path: Path, small_dataset: Dataset) -> None:
    profiles = {profile.name: profile for profile in load_catalogue().profiles()}
    data = training_set(small_dataset, SPECS, profiles)
    booster = train_all(data, LatencyLimits(nttft_ms=100, itl_ms=50), PARAMETERS, 3)
    saved = save_model(
        tmp_path / "new" / "folder",
        booster,
        create_time=datetime(2024, 1, 2, tzinfo=UTC),
        software_version="1.2.3",
        dataset_version=small_dataset.version,
        limits={"nttft_ms": 100, "itl_ms": 50},
        seed=3,
        hyperparameters=PARAMETERS,
        features=data.schema.names,
        users_counts=small_dataset.users_counts,
        training_llms=small_dataset.llms,
        metrics={"error": 0.25},
    )
    manifest, predictor = load_predictor(tmp_path / "new" / "folder")
    assert manifest == saved
    assert (manifest.seed, manifest.hyperparameters, manifest.metrics) == (3, PARAMETERS, {"error": 0.25})
    assert predictor.users_counts == (1, 8, 32, 128)
    written = (tmp_path / "new" / "folder" / "booster.ubj").read_bytes()
    assert manifest.booster_sha256 == hashlib.sha256(written).hexdigest()
    assert manifest.name == f"models/xgboost-{manifest.booster_sha256[:12]}"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["booster.ubj", "manifest.json"]
    spec, profile = SPECS["llama-7b"], profiles["1xA100-40GB"]
    features = data.schema.encode(spec, [profile], (1, 8, 32, 128))
    assert np.array_equal(predictor.predict(spec, [profile])[0], booster.inplace_predict(features))


def test_bundled_model_loads_and_knows_ten_llms() -> None:
    manifest, predictor = load_predictor(BUNDLED_MODEL)
    assert manifest.training_llms == tuple(sorted(SPECS))
    assert predictor.users_counts == (1, 2, 4, 8, 16, 32, 64, 128)


def test_bundled_model_was_trained_on_the_bundled_dataset(bundled_knowledge: Knowledge) -> None:
    assert bundled_knowledge.manifest.dataset_version == bundled_knowledge.dataset.version


def test_missing_folder_is_named_with_the_cure(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert len(error.violations) == 1
    assert "nowhere" in str(error)
    assert "llm-pilot train" in str(error)


@pytest.mark.parametrize("name", ["manifest.json", "booster.ubj"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    error = refusal(model)
    assert len(error.violations) == 1
    assert name in error.violations[0].field


@pytest.mark.parametrize("name", ["manifest.json", "booster.ubj"])
def test_folder_in_place_of_a_file_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    assert name in refusal(model).violations[0].field


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_model_file_of_another_version_is_refused(edit_manifest: EditManifest, version: object) -> None:
    error = refusal(edit_manifest(lambda manifest: manifest.update(format_version=version)))
    assert [violation.field for violation in error.violations] == ["manifest.json.format_version"]
    assert "train again" in str(error)


def test_all_wrong_fields_of_a_manifest_are_named_at_once(edit_manifest: EditManifest) -> None:
    def damage(manifest: dict[str, Any]) -> None:
        manifest["colour"] = "blue"
        manifest["kind"] = "pickle"
        manifest["limits"]["nttft_ms"] = "fast"
        del manifest["seed"]

    fields = {violation.field for violation in refusal(edit_manifest(damage)).violations}
    assert fields == {f"manifest.json.{name}" for name in ("colour", "kind", "limits.nttft_ms", "seed")}


@pytest.mark.parametrize("users_counts", [[], [0, 1], [1, 1], [8, 4]])
def test_users_that_do_not_ascend_from_one_are_refused(edit_manifest: EditManifest, users_counts: list[int]) -> None:
    error = refusal(edit_manifest(lambda manifest: manifest.update(users_counts=users_counts)))
    assert "manifest.json.users_counts" in error.violations[0].field


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"null"])
def test_manifest_that_is_no_json_object_is_refused_by_its_name(model: Path, content: bytes) -> None:
    (model / "manifest.json").write_bytes(content)
    error = refusal(model)
    assert [violation.field for violation in error.violations] == ["manifest.json"]
    assert "train again" in str(error)


def test_booster_of_another_manifest_is_refused(model: Path) -> None:
    path = model / "booster.ubj"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "SHA-256" in str(refusal(model))


def _with_booster(model: Path, edit_manifest: EditManifest, content: bytes) -> Path:
    (model / "booster.ubj").write_bytes(content)
    return edit_manifest(lambda manifest: manifest.update(booster_sha256=hashlib.sha256(content).hexdigest()))


@pytest.mark.parametrize("kept_share", [0, 0.001, 0.25, 0.5, 0.75, 0.999])
def test_truncated_booster_is_refused_even_if_the_hash_is_right(
    model: Path, edit_manifest: EditManifest, kept_share: float
) -> None:
    whole = (model / "booster.ubj").read_bytes()
    error = refusal(_with_booster(model, edit_manifest, whole[: int(kept_share * len(whole))]))
    assert "booster.ubj" in error.violations[0].field
    assert "train again" in str(error)


@pytest.mark.parametrize("content", [b"\x80\x04\x95pickle.", b"{}", b"garbage" * 100, b"{garbage}"])
def test_file_that_is_no_booster_is_refused_even_if_the_hash_is_right(
    model: Path, edit_manifest: EditManifest, content: bytes
) -> None:
    assert "train again" in str(refusal(_with_booster(model, edit_manifest, content)))


def test_manifest_with_another_number_of_features_is_refused(edit_manifest: EditManifest) -> None:
    error = refusal(edit_manifest(lambda manifest: manifest["features"].append("model_type=falcon")))
    assert "46 features, its manifest names 47" in str(error)


def test_manifest_with_features_nobody_can_make_is_refused(edit_manifest: EditManifest) -> None:
    error = refusal(edit_manifest(lambda manifest: manifest.update(features=[*manifest["features"][1:], "colour"])))
    assert "'colour' is unknown" in str(error)
    assert "'parameter_count' is missing" in str(error)


def test_booster_runs_on_one_thread_so_that_calls_do_not_fight_for_cores() -> None:
    _, booster = load_model(BUNDLED_MODEL)
    assert json.loads(booster.save_config())["learner"]["generic_param"]["nthread"] == "1"
