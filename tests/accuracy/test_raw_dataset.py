"""Simulated load tests against the measured ones of Lazuka et al., 2024, that nothing was fitted on.

Every tolerance is what is reached now plus about a tenth. The errors are absolute relative ones of a median (TTFT over
requests, ITL over tokens) or of the throughput, their mean taken over load tests with less than 1 % of failed requests.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import pytest

from llmpilot_perfmodel.csv_table import bundled_table
from llmpilot_perfmodel.steps.calibration import StepPrior, fit_steps, largest_batch_tokens
from llmpilot_perfmodel.steps.fitted import bundled_constants
from llmpilot_perfmodel.steps.iterations import ServerSteps, largest_batch_weight
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import (
    MeasuredServer,
    errors_after_calibration,
    mean_absolute_percent,
)

FLASH_DECODERS = ("llama-7b", "llama-13b", "bigcode/starcoder", "EleutherAI/gpt-neox-20b")
PADDED_DECODERS = ("ibm/mpt-7b-instruct2", "Salesforce/codegen2-16B")
ENCODER_DECODERS = ("google/flan-t5-xl", "google/flan-t5-xxl", "google/flan-ul2", "bigscience/mt0-xxl")

QUEUED_SERVERS = (
    ("Salesforce/codegen2-16B", "1xH100-80GB"),
    ("ibm/mpt-7b-instruct2", "1xA100-40GB"),
    ("google/flan-t5-xxl", "1xA100-40GB"),
    ("google/flan-t5-xxl", "2xA10-24GB"),
    ("google/flan-ul2", "1xH100-80GB"),
    ("google/flan-ul2", "2xA100-40GB"),
)
"""Some padding servers at whose 16 users requests already waited for a place in the batch."""


def _errors(
    servers: Iterable[MeasuredServer],
    requests: FixedList,
    llms: tuple[str, ...],
    fitted_users: tuple[int, ...],
    priors: Mapping[tuple[str, str], StepPrior] = MappingProxyType({}),
) -> tuple[int, float, float, float]:
    errors = [
        error
        for server in servers
        if server.llm in llms
        for error in errors_after_calibration(
            server, requests, fitted_users=fitted_users, prior=priors.get((server.llm, server.gpu_profile))
        )
    ]
    mean = mean_absolute_percent(errors)
    return len(errors), mean["throughput_tokens_per_second"], mean["ttft_ms"], mean["itl_ms"]


def test_flash_decoders_from_the_8_user_run_alone(
    servers: tuple[MeasuredServer, ...], requests: FixedList, priors: Mapping[tuple[str, str], StepPrior]
) -> None:
    """Reached 4.8, 7.3, 3.9 (without what other LLMs say 5.3, 7.7, 5.4)."""
    count, throughput, ttft, itl = _errors(servers, requests, FLASH_DECODERS, (8,), priors)
    assert count == 202
    assert throughput < 5.3
    assert ttft < 8
    assert itl < 4.3


def test_all_decoders_from_the_8_user_run_alone(
    servers: tuple[MeasuredServer, ...], requests: FixedList, priors: Mapping[tuple[str, str], StepPrior]
) -> None:
    """Reached 4.5, 7.2, 3.7; the aim was 6, 9, 5. Of padded ones there are too few to say anything of each other."""
    count, throughput, ttft, itl = _errors(servers, requests, FLASH_DECODERS + PADDED_DECODERS, (8,), priors)
    assert count == 220
    assert throughput < 5
    assert ttft < 8
    assert itl < 4.1


def test_all_decoders_from_the_8_and_64_user_runs(servers: tuple[MeasuredServer, ...], requests: FixedList) -> None:
    """The aim; reached 3.3, 6.6, 2.8."""
    count, throughput, ttft, itl = _errors(servers, requests, FLASH_DECODERS + PADDED_DECODERS, (8, 64))
    assert count == 191
    assert throughput < 4
    assert ttft < 7
    assert itl < 3


def test_padded_decoders_from_the_8_and_64_user_runs(servers: tuple[MeasuredServer, ...], requests: FixedList) -> None:
    """Reached 1.7, 8.6, 2.0."""
    count, throughput, ttft, itl = _errors(servers, requests, PADDED_DECODERS, (8, 64))
    assert count == 16
    assert throughput < 2
    assert ttft < 9.5
    assert itl < 2.3


def test_encoder_decoders_from_the_8_and_64_user_runs(servers: tuple[MeasuredServer, ...], requests: FixedList) -> None:
    """Reached 4.2, 7.4, 6.2; the aim was 15."""
    count, throughput, ttft, itl = _errors(servers, requests, ENCODER_DECODERS, (8, 64))
    assert count == 158
    assert throughput < 4.7
    assert ttft < 8.2
    assert itl < 6.9


def test_encoder_decoders_from_the_8_user_run_alone(
    servers: tuple[MeasuredServer, ...], requests: FixedList, priors: Mapping[tuple[str, str], StepPrior]
) -> None:
    """Reached 6.7, 8.2, 11.3 (without what other LLMs say 7.9, 8.7, 15.1); the aim was 15."""
    _, throughput, ttft, itl = _errors(servers, requests, ENCODER_DECODERS, (8,), priors)
    assert throughput < 7.5
    assert ttft < 9.1
    assert itl < 12.5


def test_the_weight_that_padding_servers_limit_is_that_of_the_longest_length_squared(
    servers: tuple[MeasuredServer, ...],
) -> None:
    """Whoever is in the batch, its weight comes to the same limit, within .2 %; tokens are 7 to 48 % apart."""
    apart: dict[bool, list[float]] = {False: [], True: []}
    for server in servers:
        if (server.llm, server.gpu_profile) in QUEUED_SERVERS:
            for is_squared, worst in apart.items():
                weights = [
                    largest_batch_weight(server.tests[users].timeline, is_padded=is_squared) for users in (16, 32, 64)
                ]
                worst.append(max(weights) / min(weights) - 1)
    assert len(apart[True]) == len(QUEUED_SERVERS)
    assert max(apart[True]) < 0.003
    assert min(apart[False]) > 0.06


def test_replies_under_way_had_ten_seconds_when_the_test_had_ended(servers: tuple[MeasuredServer, ...]) -> None:
    """What was later counts as failed."""
    last = [
        np.nanmax(test.timeline.end_seconds[test.timeline.is_ok]) - test.test_seconds
        for server in servers
        for users in server.clean_users
        for test in [server.tests[users]]
    ]
    assert 9.99 < max(last) < 10.01


def _seconds_over_fitted(steps: ServerSteps, constants: StepConstants) -> float:
    fitted = (
        (steps.decode_sequences > 0) * constants.decode_seconds
        + steps.decode_sequences * constants.decode_seconds_per_sequence
        + steps.decode_cached_tokens * constants.decode_seconds_per_cached_token
        + steps.moved_tokens * constants.decode_seconds_per_moved_token
        + (steps.prefill_requests > 0) * constants.prefill_seconds
        + steps.prefill_tokens * constants.prefill_seconds_per_token
        + steps.prefill_requests * constants.prefill_seconds_per_request
    )
    return float(steps.seconds.sum() / fitted.sum())


def test_at_128_users_the_steps_themselves_are_slower_where_the_cache_is_large(
    servers: tuple[MeasuredServer, ...],
) -> None:
    """Why the simulation is optimistic there: starcoder has one key/value head, and so 1/40 of the cache to move."""
    excess: dict[bool, list[float]] = {True: [], False: []}
    for server in servers:
        if server.llm in FLASH_DECODERS and 128 in server.clean_users and len(server.steps[128]) >= 100:
            constants = fit_steps(server.steps[8], server.steps[64]).constants
            excess[server.llm == "bigcode/starcoder"].append(_seconds_over_fitted(server.steps[128], constants))
    assert len(excess[True]) >= 4
    assert len(excess[False]) >= 8
    assert np.mean(excess[True]) == pytest.approx(1, abs=0.06)
    assert np.mean(excess[False]) > 1.1


def test_the_bundled_constants_are_those_of_the_raw_records(servers: tuple[MeasuredServer, ...]) -> None:
    """Bit for bit but for rounding, from the clean levels."""
    for server in servers:
        bundled = bundled_constants()[server.llm, server.gpu_profile]
        users = server.clean_users or tuple(sorted(server.tests))
        fit = fit_steps(*(server.steps[level] for level in users))
        assert bundled.users == users
        assert bundled.is_padded == server.is_padded
        assert bundled.largest_batch_tokens == largest_batch_tokens(*server.steps.values())
        assert bundled.constants.decode_seconds == pytest.approx(fit.constants.decode_seconds, rel=1e-4)
        assert bundled.constants.prefill_seconds_per_token == pytest.approx(
            fit.constants.prefill_seconds_per_token, rel=1e-4
        )


def test_the_bundled_requests_are_the_fixed_list(requests: FixedList) -> None:
    rows = [
        line.split(",") for line in bundled_table("characterization_requests.csv").splitlines() if line[0].isdigit()
    ]
    lengths = sorted(zip(requests.input_tokens.tolist(), requests.output_tokens.tolist(), strict=True))
    assert lengths == sorted((int(i), int(o)) for i, o, count in rows for _ in range(int(count)))


def test_iterations_of_a_clean_run_are_nearly_all_known(servers: tuple[MeasuredServer, ...]) -> None:
    """Of 33 flash decoder servers at 8 users less than 1 % of the steps cannot be rebuilt."""
    known = sum(len(s.steps[8]) for s in servers if s.llm in FLASH_DECODERS and 8 in s.clean_users)
    lost = sum(s.steps[8].left_out_count for s in servers if s.llm in FLASH_DECODERS and 8 in s.clean_users)
    assert known > 100_000
    assert lost / (known + lost) < 0.05
