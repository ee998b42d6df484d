"""LLMs of which no measurement is used: constants from their sizes, with factors fitted on the others of their kind.

From the LLM's own load tests come only the server's largest batch weight, which first tokens have no text, and how long
the client takes between a reply and the next request; none of them says how fast the server is.
"""

from types import ModuleType

import pytest

from llmpilot_perfmodel.steps.roofline import MeasuredConstants, ServerKind, bundled_factors, fit_factors
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import MeasuredServer, ReplayError, mean_absolute_percent


@pytest.mark.parametrize(
    ("group", "test_count", "itl", "nttft", "throughput"),
    [("all decoders", 256, 9.4, 12.6, 12.4), ("encoder-decoders", 211, 15, 20, 21.5)],
)
def test_latencies_of_an_unmeasured_llm(
    simulator_accuracy: ModuleType,
    servers: tuple[MeasuredServer, ...],
    requests: FixedList,
    measured: dict[tuple[str, str], MeasuredConstants],
    *,
    group: str,
    test_count: int,
    itl: float,
    nttft: float,
    throughput: float,
) -> None:
    """Reached 8.5 % ITL, 11.4 % nTTFT, 11.2 % throughput of decoders (aim 10, 20); 13.6, 18.1, 19.5 of T5."""
    errors: list[ReplayError] = []
    for server in simulator_accuracy.groups(servers)[group]:
        errors += simulator_accuracy.unmeasured(server, requests, measured)
    mean = mean_absolute_percent(errors)
    assert len(errors) == test_count
    assert mean["itl_ms"] < itl
    assert mean["nttft_ms"] < nttft
    assert mean["throughput_tokens_per_second"] < throughput


def test_the_bundled_factors_are_those_of_the_bundled_constants(
    simulator_accuracy: ModuleType, measured: dict[tuple[str, str], MeasuredConstants]
) -> None:
    kinds = simulator_accuracy.by_kind(measured.values())
    flash = fit_factors(kinds[ServerKind.FLASH])
    for kind, bundled in bundled_factors().items():
        fitted = fit_factors(kinds[kind], otherwise=flash).factors
        for constant, by_part in bundled.factors.items():
            assert by_part == pytest.approx(fitted[constant], rel=1e-3)
