"""What the tests of every member share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[1] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public data at {folder}; set LLMPILOT_DATA to the folder that holds llm-pilot/")
    return folder
