import json
from pathlib import Path

import pytest

from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec

KNOWN_LLMS = json.loads((Path(__file__).parent / "data" / "known_llms.json").read_text())


@pytest.fixture(params=KNOWN_LLMS)
def known_llm(request: pytest.FixtureRequest) -> tuple[LlmSpec, int]:
    """The spec of a public LLM from its config.json, and its parameter count as published on its model card."""
    known = KNOWN_LLMS[request.param]
    return parse_config(json.dumps(known["config"])), known["parameter_count"]


@pytest.fixture
def known_specs() -> dict[str, LlmSpec]:
    return {name: parse_config(json.dumps(known["config"])) for name, known in KNOWN_LLMS.items()}
