"""Table I of Lazuka et al., 2024: Llama-2-13b on one A100 80GB, foretold from the 40 GB card.

Constants: those of the 40 GB card's load tests of 1 to 8 users, the most that it served cleanly, and of what other LLMs
say of them, with everything that waits for memory faster by 2039 / 1555, the ratio of the
bandwidths; the host's .12 ms a layer stay. Largest batch weight: that of the other measured 80 GB card. Requests: the
fixed list.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.batching.simulation import simulate_users
from llmpilot_perfmodel.csv_table import bundled_table
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.steps.calibration import StepPrior, fit_steps
from llmpilot_perfmodel.steps.fitted import fitted_constants
from llmpilot_perfmodel.steps.roofline import ServerKind, bundled_factors
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_recommender.replay_accuracy import MeasuredServer

SMALL_CARD = ("llama-13b", "1xA100-40GB")
MEASURED = {1: 47.1, 2: 78.1, 4: 118.2, 8: 174.2, 16: 237.8, 32: 288.6, 64: 314.7, 128: 292.6}
"""Tokens per second of one pod by users, Table I."""
LAYERS = 40
TEST_SECONDS = 120
TURNAROUND_SECONDS = 0.015
"""Median of the 40 GB card's tests: 13 ms until a request is queued, and 2 ms for its user to send it."""
SEEDS = range(5)


def _lengths() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rows = [
        line.split(",") for line in bundled_table("characterization_requests.csv").splitlines() if line[0].isdigit()
    ]
    inputs, outputs, counts = np.array(rows, np.int64).T
    return np.repeat(inputs, counts), np.repeat(outputs, counts)


@pytest.fixture(scope="module")
def constants(servers: tuple[MeasuredServer, ...], priors: Mapping[tuple[str, str], StepPrior]) -> StepConstants:
    gpus = load_catalogue()
    ratio = (
        gpus.require("1xA100-40GB").gpu.memory_bandwidth_gb_per_second
        / gpus.require("1xA100-80GB").gpu.memory_bandwidth_gb_per_second
    )
    (server,) = (s for s in servers if (s.llm, s.gpu_profile) == SMALL_CARD)
    small = fit_steps(*(server.steps[users] for users in server.clean_users), prior=priors[SMALL_CARD]).constants
    host_seconds = LAYERS * bundled_factors()[ServerKind.FLASH].factors["decode_seconds"]["layer"]
    return replace(
        small,
        decode_seconds=host_seconds + (small.decode_seconds - host_seconds) * ratio,
        decode_seconds_per_cached_token=small.decode_seconds_per_cached_token * ratio,
        decode_seconds_per_moved_token=small.decode_seconds_per_moved_token * ratio,
    )


def _records(constants: StepConstants, users: int, seed: int, duration_seconds: float) -> RequestRecords:
    inputs, outputs = _lengths()
    return simulate_users(
        policy=TgisPolicy(max_batch_weight=fitted_constants("llama-2-13b", "1xH100-80GB").largest_batch_tokens),
        tables=constants.tables(),
        input_tokens=inputs,
        output_tokens=outputs,
        users_count=users,
        duration_seconds=duration_seconds,
        seed=seed,
        turnaround_seconds=TURNAROUND_SECONDS,
    )


def _throughput(constants: StepConstants, users: int) -> float:
    """Return tokens per second of the replies that were complete when the test ended."""
    return float(
        np.mean([len(_records(constants, users, seed, TEST_SECONDS).token_seconds) for seed in SEEDS]) / TEST_SECONDS
    )


@pytest.mark.parametrize("users", [1, 2, 4, 8, 16, 32, 64])
def test_each_cell_up_to_64_users_is_within_5_percent(constants: StepConstants, users: int) -> None:
    """The aim; up to 32 users within 2 %, at 64 -3.5 %."""
    assert _throughput(constants, users) == pytest.approx(MEASURED[users], rel=0.05)


def test_twice_64_users_bring_no_more_throughput(constants: StepConstants) -> None:
    """Measured -7 %, simulated -1 %."""
    assert _throughput(constants, 128) < 1.02 * _throughput(constants, 64)
    assert _throughput(constants, 128) == pytest.approx(MEASURED[128], rel=0.08)


def test_what_throughput_loses_at_128_users_are_the_replies_that_the_end_of_the_test_cuts_off(
    constants: StepConstants,
) -> None:
    """Counted to their ends, replies to what was sent in time have a quarter more tokens: the server is no slower."""
    cut_off = {}
    for users in (8, 128):
        records = _records(constants, users, seed=0, duration_seconds=2 * TEST_SECONDS)
        was_sent = records.send_seconds < TEST_SECONDS
        was_late = records.end_seconds > TEST_SECONDS
        cut_off[users] = records.output_tokens[was_sent & was_late].sum() / records.output_tokens[was_sent].sum()
    assert cut_off[8] < 0.06
    assert cut_off[128] > 0.18
