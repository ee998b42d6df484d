import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llmpilot_perfmodel.steps.calibration import StepPrior
from llmpilot_perfmodel.steps.roofline import MeasuredConstants
from llmpilot_recommender.calibration_source import load_tests
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, measured_servers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load_benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """Load a benchmark by name, so that it prints what is tested here."""
    return _load_benchmark


@pytest.fixture(scope="session")
def simulator_accuracy() -> ModuleType:
    """The benchmark."""
    return _load_benchmark("simulator_accuracy")


@pytest.fixture(scope="session")
def raw_archive(public_data: Path) -> Path:
    """The public raw records."""
    return public_data / "llm-pilot" / "performance_characterization_data_raw.tar.xz"


@pytest.fixture(scope="session")
def servers(raw_archive: Path) -> tuple[MeasuredServer, ...]:
    """Every LLM on every GPU profile of the raw records, with the steps rebuilt from its load tests."""
    return measured_servers(load_tests(raw_archive))


@pytest.fixture(scope="session")
def requests(servers: tuple[MeasuredServer, ...]) -> FixedList:
    """The list of requests that all load tests draw from."""
    return FixedList.of(test for server in servers for test in server.tests.values())


@pytest.fixture(scope="session")
def measured(simulator_accuracy: ModuleType) -> dict[tuple[str, str], MeasuredConstants]:
    """The bundled constants, with the sizes of their LLMs in 16 bits."""
    constants: dict[tuple[str, str], MeasuredConstants] = simulator_accuracy.measured_constants()
    return constants


@pytest.fixture(scope="session")
def priors(
    simulator_accuracy: ModuleType,
    servers: tuple[MeasuredServer, ...],
    measured: dict[tuple[str, str], MeasuredConstants],
) -> dict[tuple[str, str], StepPrior]:
    """What the other LLMs of the same kind say of a server; of the padded decoders there are too few."""
    known: dict[tuple[str, str], StepPrior] = simulator_accuracy.priors_of(servers, measured)
    return known
