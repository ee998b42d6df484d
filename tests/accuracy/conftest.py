from pathlib import Path

import pytest

from llmpilot_recommender.calibration_source import load_tests
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, measured_servers


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
