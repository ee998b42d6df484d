"""LLMs of which no measurement is used: constants from their sizes, with factors fitted on the other measured LLMs.

From the LLM's own load tests come only the server's largest batch weight, which first tokens have no text, and how long
the client takes between a reply and the next request; none of them says how fast the server is.
"""

from types import ModuleType

import pytest

from llmpilot_perfmodel.steps.roofline import MeasuredConstants, ServerKind, bundled_factors, fit_factors
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, ReplayError, mean_absolute_percent


def test_latencies_of_an_unmeasured_decoder(
    simulator_accuracy: ModuleType,
    servers: tuple[MeasuredServer, ...],
    requests: FixedList,
    measured: dict[tuple[str, str], MeasuredConstants],
) -> None:
    """Reached 8.5 % ITL, 11.4 % nTTFT, 11.2 % throughput; the aim was 10 and 20."""
    mean, count = _errors(simulator_accuracy, "all decoders", servers, requests, measured)
    assert count == 256
    assert mean["itl_ms"] < 9.4
    assert mean["nttft_ms"] < 12.6
    assert mean["throughput_tokens_per_second"] < 12.4


def test_latencies_of_an_unmeasured_encoder_decoder(
    simulator_accuracy: ModuleType,
    servers: tuple[MeasuredServer, ...],
    requests: FixedList,
    measured: dict[tuple[str, str], MeasuredConstants],
) -> None:
    """Reached 13.6 % ITL, 18.1 % nTTFT, 19.5 % throughput."""
    mean, count = _errors(simulator_accuracy, "encoder-decoders", servers, requests, measured)
    assert count == 211
    assert mean["itl_ms"] < 15
    assert mean["nttft_ms"] < 20
    assert mean["throughput_tokens_per_second"] < 21.5


def _errors(
    simulator_accuracy: ModuleType,
    group: str,
    servers: tuple[MeasuredServer, ...],
    requests: FixedList,
    measured: dict[tuple[str, str], MeasuredConstants],
) -> tuple[dict[str, float], int]:
    errors: list[ReplayError] = []
    for server in simulator_accuracy.groups(servers)[group]:
        errors += simulator_accuracy.unmeasured(server, requests, measured)
    return mean_absolute_percent(errors), len(errors)


def test_the_bundled_factors_are_those_of_the_bundled_constants(
    simulator_accuracy: ModuleType, measured: dict[tuple[str, str], MeasuredConstants]
) -> None:
    kinds = simulator_accuracy.by_kind(measured.values())
    flash = fit_factors(kinds[ServerKind.FLASH])
    for kind, bundled in bundled_factors().items():
        fitted = fit_factors(kinds[kind], otherwise=flash).factors
        for constant, by_part in bundled.factors.items():
            assert by_part == pytest.approx(fitted[constant], rel=1e-3)
