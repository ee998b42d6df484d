"""LLMs of which no measurement is used: constants from their sizes, with factors fitted on the other measured LLMs.

From the LLM's own load tests come only the server's largest batch weight, which first tokens have no text, and how long
the client takes between a reply and the next request; none of them says how fast the server is.
"""

import json
from pathlib import Path

import pytest

from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import precision_named
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.steps.fitted import bundled_constants, measured_name
from llmpilot_perfmodel.steps.roofline import MeasuredConstants, bundled_factors, fit_factors, roofline_constants
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, errors_with, mean_absolute_percent

CONFIGS = Path(__file__).parents[2] / "libs" / "perfmodel" / "tests" / "data" / "known_llms.json"


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], MeasuredConstants]:
    """The bundled constants of the flash decoder LLMs, with the sizes of the LLMs in 16 bits."""
    configs = {measured_name(name): known["config"] for name, known in json.loads(CONFIGS.read_text()).items()}
    gpus = load_catalogue()
    samples = {}
    for (llm, profile_name), fitted in bundled_constants().items():
        if not fitted.is_padded:
            profile = gpus.require(profile_name)
            samples[llm, profile_name] = MeasuredConstants(
                llm=llm,
                work=llm_work(parse_llm(json.dumps(configs[llm])), profile.gpu_count, precision_named("fp16")),
                profile=profile,
                constants=fitted.constants,
            )
    return samples


def test_latencies_of_an_unmeasured_llm(
    servers: tuple[MeasuredServer, ...], requests: FixedList, measured: dict[tuple[str, str], MeasuredConstants]
) -> None:
    """Reached 8.2 % ITL, 11.5 % nTTFT, 12.3 % throughput; the aim was 10 and 20."""
    errors = []
    for server in servers:
        sample = measured.get((server.llm, server.gpu_profile))
        if sample is not None:
            factors = fit_factors(other for other in measured.values() if other.llm != server.llm)
            errors += errors_with(
                server,
                requests,
                roofline_constants(sample.work, sample.profile, factors),
                known=[server.tests[users] for users in server.clean_users],
                tested_users=server.clean_users,
            )
    mean = mean_absolute_percent(errors)
    assert len(errors) == 235
    assert mean["itl_ms"] < 9
    assert mean["nttft_ms"] < 12.7
    assert mean["throughput_tokens_per_second"] < 13.5


def test_the_bundled_factors_are_those_of_the_bundled_constants(
    measured: dict[tuple[str, str], MeasuredConstants],
) -> None:
    fitted = fit_factors(measured.values()).factors
    for constant, by_part in bundled_factors().factors.items():
        assert by_part == pytest.approx(fitted[constant], rel=1e-3)
