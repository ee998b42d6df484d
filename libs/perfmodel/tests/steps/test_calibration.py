from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.batching.simulation import simulate_arrivals
from llmpilot_perfmodel.steps.calibration import CONSTANT_NAMES, StepPrior, fit_steps, largest_batch_tokens
from llmpilot_perfmodel.steps.iterations import ServerSteps, TokenTimeline, rebuild_steps
from llmpilot_perfmodel.steps.step_time import StepConstants

# A server of the public records, llama-13b on 1 x H100.
TRUE = StepConstants(
    decode_seconds=12.66e-3,
    decode_seconds_per_sequence=0.321e-3,
    decode_seconds_per_cached_token=1.4e-6,
    prefill_seconds=15.3e-3,
    prefill_seconds_per_token=43.2e-6,
    prefill_seconds_per_request=4.15e-3,
    decode_seconds_per_moved_token=0.8e-6,
)


def _simulated(
    requests_per_second: float = 8.0, *, is_padded: bool = False, round_seconds: float = 0.0, request_count: int = 400
) -> ServerSteps:
    """Return the steps rebuilt from a simulated run in which all requests end; 8 a second keep a batch of 10 to 20."""
    generator = np.random.default_rng(7)
    records = simulate_arrivals(
        policy=TgisPolicy(max_batch_weight=10_000_000 if is_padded else 20_000, is_padded=is_padded),
        tables=TRUE.tables(),
        arrival_seconds=np.cumsum(generator.exponential(1 / requests_per_second, request_count)),
        input_tokens=generator.integers(6, 800, request_count),
        output_tokens=generator.geometric(1 / 20, request_count),
    )

    def rounded(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.round(seconds / round_seconds) * round_seconds if round_seconds else seconds

    timeline = TokenTimeline(
        arrival_seconds=rounded(records.send_seconds),
        end_seconds=rounded(records.end_seconds),
        input_tokens=records.input_tokens,
        output_tokens=records.output_tokens,
        is_ok=records.is_ok,
        token_starts=records.token_starts,
        token_seconds=rounded(records.token_seconds),
    )
    return rebuild_steps(timeline, is_padded=is_padded)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_fit_finds_the_constants_that_a_timeline_was_made_with(is_padded: bool) -> None:
    fit = fit_steps(_simulated(is_padded=is_padded))
    for name in CONSTANT_NAMES:
        assert getattr(fit.constants, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert fit.decode_error < 1e-4


def test_whole_milliseconds_move_no_constant_by_more_than_a_tenth() -> None:
    """The constants of cached tokens are .2 ms of a step of 15: they may move by a quarter."""
    fit = fit_steps(_simulated(2.0, round_seconds=1e-3), _simulated(8.0, round_seconds=1e-3))
    for name in CONSTANT_NAMES:
        tolerance = 0.25 if "cached" in name or "moved" in name else 0.1
        assert getattr(fit.constants, name) == pytest.approx(getattr(TRUE, name), rel=tolerance), name
    assert fit.decode_error < 0.03


def test_the_standard_errors_cover_the_true_constants_of_rounded_times() -> None:
    """Rounding is no normal noise; 6 standard errors leave room for that."""
    fit = fit_steps(_simulated(round_seconds=1e-3))
    for name in ("decode_seconds", "decode_seconds_per_sequence", "prefill_seconds_per_token"):
        deviation = abs(getattr(fit.constants, name) - getattr(TRUE, name))
        assert getattr(fit.standard_errors, name) > 0
        assert deviation < 6 * getattr(fit.standard_errors, name) + 1e-5


def test_one_decode_in_fifty_that_takes_ten_times_as_long_changes_the_decode_constants_by_less_than_3_percent() -> None:
    steps = _simulated()
    seconds = steps.seconds.copy()
    decodes = np.flatnonzero(steps.prefill_requests == 0)
    seconds[decodes[::50]] *= 10
    fit = fit_steps(replace(steps, seconds=seconds))
    assert fit.constants.decode_seconds == pytest.approx(TRUE.decode_seconds, rel=0.03)


def test_pauses_in_prefills_are_part_of_their_time() -> None:
    steps = _simulated()
    prefills = np.flatnonzero((steps.prefill_requests > 0) & (steps.decode_sequences == 0))
    seconds = steps.seconds.copy()
    seconds[prefills[::10]] += 0.05
    fit = fit_steps(replace(steps, seconds=seconds))
    fitted = (
        fit.constants.prefill_seconds
        + fit.constants.prefill_seconds_per_token * steps.prefill_tokens[prefills]
        + fit.constants.prefill_seconds_per_request * steps.prefill_requests[prefills]
    )
    assert fitted.sum() == pytest.approx(seconds[prefills].sum(), rel=0.01)


def test_a_constant_is_never_negative() -> None:
    """Decodes that get faster with the cache, as no server's do, leave that constant at 0."""
    steps = _simulated()
    fit = fit_steps(replace(steps, seconds=steps.seconds - 1.5e-6 * steps.decode_cached_tokens))
    assert min(getattr(fit.constants, name) for name in CONSTANT_NAMES) >= 0
    assert fit.constants.decode_seconds_per_cached_token == 0


def _times(factor: float) -> StepConstants:
    return StepConstants(**{name: factor * getattr(TRUE, name) for name in CONSTANT_NAMES})


def test_a_prior_tells_apart_what_batches_of_one_size_cannot() -> None:
    """Per step and per sequence: the prior is sure of the second alone."""
    steps = _simulated()
    sequences = int(np.bincount(steps.decode_sequences[steps.prefill_requests == 0]).argmax())
    kept = np.flatnonzero((steps.decode_sequences == sequences) | (steps.decode_sequences == 0))
    alike = replace(
        steps,
        **{name: getattr(steps, name)[kept] for name in ServerSteps.__dataclass_fields__ if name != "left_out_count"},
    )
    uncertainty = {"decode_seconds": 1.0, "decode_seconds_per_sequence": 0.01}
    fit = fit_steps(alike, prior=StepPrior(constants=replace(TRUE, decode_seconds=0.03), uncertainty=uncertainty))
    assert fit.constants.decode_seconds == pytest.approx(TRUE.decode_seconds, rel=0.01)
    assert fit_steps(alike).constants.decode_seconds != pytest.approx(TRUE.decode_seconds, rel=0.1)


def test_steps_that_tell_every_constant_outweigh_a_wrong_prior() -> None:
    prior = StepPrior(constants=_times(1.5), uncertainty=dict.fromkeys(CONSTANT_NAMES, 0.3))
    fit = fit_steps(_simulated(), prior=prior)
    assert fit.constants.decode_seconds == pytest.approx(TRUE.decode_seconds, rel=0.02)
    assert fit.constants.prefill_seconds_per_token == pytest.approx(TRUE.prefill_seconds_per_token, rel=0.05)


@pytest.mark.parametrize(
    "prior",
    [
        StepPrior(constants=_times(1.5), uncertainty={}),
        StepPrior(constants=_times(0.0), uncertainty=dict.fromkeys(CONSTANT_NAMES, 0.1)),
    ],
)
def test_a_prior_that_knows_nothing_changes_nothing(prior: StepPrior) -> None:
    steps = _simulated(round_seconds=1e-3)
    assert fit_steps(steps, prior=prior) == fit_steps(steps)


def test_the_largest_batch_counts_the_tokens_after_the_decode() -> None:
    steps = _simulated()
    assert largest_batch_tokens(steps) == (steps.decode_cached_tokens + steps.decode_sequences).max()
    assert largest_batch_tokens() == 0


def test_too_few_steps_are_refused_with_their_number() -> None:
    steps = _simulated()
    few = replace(
        steps,
        **{name: getattr(steps, name)[:5] for name in ServerSteps.__dataclass_fields__ if name != "left_out_count"},
    )
    with pytest.raises(InvalidInputError, match=r"must have at least 20 decodes.*; give a longer load test"):
        fit_steps(few)


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="have 0"):
        fit_steps()
