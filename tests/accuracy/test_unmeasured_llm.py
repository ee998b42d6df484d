"""LLMs of which no measurement is used: constants from their sizes, with factors fitted on the other measured LLMs.

From the LLM's own load tests come only the server's largest batch weight, which first tokens have no text, and how long
the client takes between a reply and the next request; none of them says how fast the server is.
"""

import pytest

from llmpilot_perfmodel.steps.roofline import MeasuredConstants, bundled_factors, fit_factors, roofline_constants
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, errors_with, mean_absolute_percent


def test_latencies_of_an_unmeasured_llm(
    servers: tuple[MeasuredServer, ...], requests: FixedList, flash_decoders: dict[tuple[str, str], MeasuredConstants]
) -> None:
    """Reached 8.2 % ITL, 11.5 % nTTFT, 12.3 % throughput; the aim was 10 and 20."""
    errors = []
    for server in servers:
        sample = flash_decoders.get((server.llm, server.gpu_profile))
        if sample is not None:
            factors = fit_factors(other for other in flash_decoders.values() if other.llm != server.llm)
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
    flash_decoders: dict[tuple[str, str], MeasuredConstants],
) -> None:
    fitted = fit_factors(flash_decoders.values()).factors
    for constant, by_part in bundled_factors().factors.items():
        assert by_part == pytest.approx(fitted[constant], rel=1e-3)
