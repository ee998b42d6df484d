import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmpilot_contracts.errors import NotFoundError
from llmpilot_workload_generator.files.model_file import model_to_bytes
from llmpilot_workload_generator.model import ArrivalKind
from llmpilot_workload_generator.profile_making import gamma_shape, make_profile
from llmpilot_workload_generator.profiles import FOLDER, PROFILE_NAMES, load_profile, profile_path
from llmpilot_workload_generator.statistics import describe


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_profile_is_what_the_public_data_make(public_data: Path, name: str) -> None:
    """Compared as models: another release of zstd may write other bytes."""
    kept, made = load_profile(name), make_profile(name, public_data)
    assert np.array_equal(kept.keys, made.keys)
    assert np.array_equal(kept.counts, made.counts)
    assert (kept.provenance, kept.arrivals) == (made.provenance, made.arrivals)
    for one, other in zip(kept.parameters, made.parameters, strict=True):
        assert one.bins.same_as(other.bins)
        assert np.array_equal(one.sketch.values, other.sketch.values)
        assert np.array_equal(one.sketch.counts, other.sketch.counts)
        assert np.array_equal(one.lows, other.lows)
        assert np.array_equal(one.highs, other.highs)


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_profile_is_small_and_says_where_it_comes_from(name: str) -> None:
    model = load_profile(name)
    assert profile_path(name).stat().st_size <= 100_000
    assert len(model_to_bytes(model)) <= 100_000
    assert model.provenance.source
    assert model.provenance.licence
    assert f"{model.provenance.licence.split(',')[0]} |" in (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    assert {"input_tokens", "output_tokens"} <= set(model.names)


def test_no_other_file_ships() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*(f"{name}.workload" for name in PROFILE_NAMES), "LICENSES.md"}


@pytest.mark.parametrize(
    ("name", "requests", "means"),
    [
        ("code", 8_819, (2047.848, 27.883)),
        ("conversation", 19_366, (1154.697, 211.126)),
        ("long-context", 12_031, (12035.06, 342.619)),
    ],
)
def test_trace_is_counted_whole(name: str, requests: int, means: tuple[float, float]) -> None:
    """Rows and means of the CSV and JSONL files, computed with pandas."""
    model = load_profile(name)
    assert model.request_count == requests
    assert [marginal.mean for marginal in describe(model).marginals] == pytest.approx(means, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "rate", "burstiness"),
    [
        ("production", ArrivalKind.CLOSED, 0, 1),
        ("code", ArrivalKind.GAMMA, 2.566, 0.2286),
        ("conversation", ArrivalKind.GAMMA, 5.530, 0.8621),
        ("summarization", ArrivalKind.POISSON, 1, 1),
        ("long-context", ArrivalKind.POISSON, 3.401, 1),
    ],
)
def test_arrivals_are_those_of_the_trace(name: str, kind: ArrivalKind, rate: float, burstiness: float) -> None:
    """Mean gap and the most likely gamma shape of the gaps of the sorted times, computed with pandas."""
    arrivals = load_profile(name).arrivals
    assert (arrivals.kind, arrivals.rate_per_second, arrivals.burstiness) == (kind, rate, burstiness)


@pytest.mark.parametrize("shape", [0.2, 1.0, 3.0])
def test_gamma_shape_is_found_again(shape: float) -> None:
    """100,000 gaps give the shape to .5 %, the formula is good to 1.5 %."""
    gaps = np.random.default_rng(1).gamma(shape, 1 / shape, 100_000)
    assert gamma_shape(gaps[gaps > 0]) == pytest.approx(shape, rel=0.02)


def test_unknown_profile_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="there are production, code, conversation, "):
        load_profile("chat")


def test_profiles_are_made_by_the_documented_command(public_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmpilot_workload_generator.profile_making", str(public_data), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    assert {path.stem for path in tmp_path.iterdir()} == set(PROFILE_NAMES)
