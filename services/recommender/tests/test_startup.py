"""What a recommender says of settings and files it cannot start with."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_recommender.app import load_knowledge
from llmpilot_recommender.dataset_file import BUNDLED_DATASET
from llmpilot_recommender.model_store import BUNDLED_MODEL
from llmpilot_recommender.settings import RecommenderSettings
from llmpilot_servicekit.settings import load_settings

DEADLINE_SECONDS = 60


def refused_start(**variables: object) -> str:
    """Start the process, see it end with code 2 and without a traceback; give its stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
    ended = subprocess.run(
        [sys.executable, "-m", "llmpilot_recommender"],
        env=inherited | {"LLMPILOT_LISTEN": "127.0.0.1:0"} | {name: str(value) for name, value in variables.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def mistyped(path: Path) -> None:
    path.write_text(path.read_text().replace("llama-7b,1xA100-40GB,64", "llama-7b,1xA100-40GB,many"))


def empty(path: Path) -> None:
    path.write_text("")


def binary(path: Path) -> None:
    path.write_bytes(b"\xfd7zXZ\x00\xff")


def of_another_version(path: Path) -> None:
    path.write_text(path.read_text().replace("# schema: 1", "# schema: 2"))


def removed(path: Path) -> None:
    path.unlink()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A copy of the bundled dataset."""
    return Path(shutil.copy(BUNDLED_DATASET, tmp_path / "dataset.csv"))


def model_of_another_version(folder: Path) -> Path:
    model = Path(shutil.copytree(BUNDLED_MODEL, folder / "model"))
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    return model


@pytest.mark.parametrize("damage", [truncated, mistyped, empty, binary, of_another_version, removed])
def test_damaged_dataset_is_refused_by_its_name(dataset: Path, damage: Callable[[Path], None]) -> None:
    damage(dataset)
    with pytest.raises(InvalidInputError) as caught:
        load_knowledge(load_settings(RecommenderSettings, {"LLMPILOT_DATASET": str(dataset)}))
    assert caught.value.violations
    for violation in caught.value.violations:
        assert "dataset.csv" in str(violation)


def test_mistyped_cell_is_named_with_its_row_and_column(dataset: Path) -> None:
    mistyped(dataset)
    with pytest.raises(InvalidInputError, match=r"row \d+, column users_count: must be a whole number, is 'many'"):
        load_knowledge(load_settings(RecommenderSettings, {"LLMPILOT_DATASET": str(dataset)}))


def test_damaged_model_dataset_gpus_and_prices_are_all_named_at_once(dataset: Path, tmp_path: Path) -> None:
    truncated(dataset)
    environ = {
        "LLMPILOT_DATASET": str(dataset),
        "LLMPILOT_MODEL": str(model_of_another_version(tmp_path)),
        "LLMPILOT_GPUS": str(tmp_path / "no-gpus.csv"),
        "LLMPILOT_PRICES": str(tmp_path / "no-prices.csv"),
    }
    with pytest.raises(InvalidInputError) as caught:
        load_knowledge(load_settings(RecommenderSettings, environ))
    assert len(caught.value.violations) == 4
    for name in ("dataset.csv", "manifest.json.format_version", "no-gpus.csv", "no-prices.csv"):
        assert name in str(caught.value)


def test_process_with_bad_files_ends_with_code_2_and_says_every_problem(dataset: Path, tmp_path: Path) -> None:
    truncated(dataset)
    stderr = refused_start(LLMPILOT_DATASET=dataset, LLMPILOT_MODEL=model_of_another_version(tmp_path))
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert any("dataset.csv" in line and "cut off" in line for line in lines)
    assert any("format_version" in line and "train again" in line for line in lines)


def test_process_with_bad_settings_ends_with_code_2_and_names_every_variable() -> None:
    stderr = refused_start(
        LLMPILOT_LISTEN="nowhere",
        LLMPILOT_NATS_URL="http://x",
        LLMPILOT_LOG_LEVEL="loud",
        LLMPILOT_MAX_REQUEST_BYTES="-1",
    )
    for name in ("LISTEN", "NATS_URL", "LOG_LEVEL", "MAX_REQUEST_BYTES"):
        assert f"error: LLMPILOT_{name}: " in stderr
