import json
from pathlib import Path

import pytest

from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import precision_named
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.steps.calibration import StepPrior
from llmpilot_perfmodel.steps.fitted import bundled_constants, measured_name
from llmpilot_perfmodel.steps.roofline import MeasuredConstants, priors_from_others
from llmpilot_recommender.calibration_source import load_tests
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, measured_servers

CONFIGS = Path(__file__).parents[2] / "libs" / "perfmodel" / "tests" / "data" / "known_llms.json"


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
def measured() -> dict[tuple[str, str], MeasuredConstants]:
    """The bundled constants, with the sizes of their LLMs in 16 bits."""
    configs = {measured_name(name): known["config"] for name, known in json.loads(CONFIGS.read_text()).items()}
    gpus = load_catalogue()
    samples = {}
    for (llm, profile_name), fitted in bundled_constants().items():
        profile = gpus.require(profile_name)
        samples[llm, profile_name] = MeasuredConstants(
            llm=llm,
            work=llm_work(parse_llm(json.dumps(configs[llm])), profile.gpu_count, precision_named("fp16")),
            profile=profile,
            constants=fitted.constants,
        )
    return samples


@pytest.fixture(scope="session")
def flash_decoders(
    measured: dict[tuple[str, str], MeasuredConstants],
) -> dict[tuple[str, str], MeasuredConstants]:
    """Those of the LLMs whose servers do not pad."""
    return {key: sample for key, sample in measured.items() if not sample.work.is_padded}


@pytest.fixture(scope="session")
def priors(
    measured: dict[tuple[str, str], MeasuredConstants], flash_decoders: dict[tuple[str, str], MeasuredConstants]
) -> dict[tuple[str, str], StepPrior]:
    """What the other LLMs of the same kind say of a server; of the padded decoders there are too few."""
    encoder_decoders = [sample for sample in measured.values() if sample.work.encoder_layer_count]
    return priors_from_others(flash_decoders.values()) | priors_from_others(encoder_decoders)
