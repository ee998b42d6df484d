from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.batching.simulation import simulate_users
from llmpilot_perfmodel.steps.iterations import TokenTimeline, largest_batch_weight, rebuild_steps
from llmpilot_perfmodel.steps.step_time import StepConstants

CONSTANTS = StepConstants(
    decode_seconds=20e-3,
    decode_seconds_per_sequence=0.5e-3,
    decode_seconds_per_cached_token=2e-6,
    prefill_seconds=20e-3,
    prefill_seconds_per_token=0.1e-3,
    prefill_seconds_per_request=5e-3,
)


def _timeline(
    requests: Sequence[tuple[float, int, list[float]]], *, withheld: frozenset[int] = frozenset()
) -> TokenTimeline:
    """Return the timeline of requests given as arrival, input tokens and token times, all in ms."""
    counts = [len(times) for _, _, times in requests]
    return TokenTimeline(
        arrival_seconds=np.array([arrival for arrival, _, _ in requests]) / 1e3,
        end_seconds=np.array([times[-1] if times else np.nan for _, _, times in requests]) / 1e3,
        input_tokens=np.array([tokens for _, tokens, _ in requests]),
        output_tokens=np.array([count + (index in withheld) for index, count in enumerate(counts)]),
        is_ok=np.full(len(requests), True),
        token_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        token_seconds=np.concatenate([times for _, _, times in requests]) / 1e3,
    )


# A at 0 ms: prefill until 40, decodes until 60 and 80. B arrives at 70, is prefilled from 80 to 130 and decoded with A,
# whose last tokens are those at 155 and 180, and alone until 200.
TWO_REQUESTS = [(0, 100, [40.0, 60, 80, 155, 180]), (70, 30, [130.0, 156, 181, 200])]


def test_a_prefill_alone_starts_when_its_request_arrives_at_an_idle_server() -> None:
    steps = rebuild_steps(_timeline(TWO_REQUESTS), is_padded=False)
    first = np.flatnonzero(steps.prefill_requests)[0]
    assert steps.seconds[first] == pytest.approx(0.040)
    assert (steps.prefill_tokens[first], steps.prefill_pairs[first]) == (100, 5050)


def test_every_step_of_two_requests_is_rebuilt() -> None:
    steps = rebuild_steps(_timeline(TWO_REQUESTS), is_padded=False)
    assert steps.left_out_count == 0
    assert steps.seconds * 1e3 == pytest.approx([40, 20, 20, 50, 25, 25, 20])
    assert steps.prefill_requests.tolist() == [1, 0, 0, 1, 0, 0, 0]
    assert steps.prefill_tokens.tolist() == [100, 0, 0, 30, 0, 0, 0]
    assert steps.decode_sequences.tolist() == [0, 1, 1, 0, 2, 2, 1]
    assert steps.decode_cached_tokens.tolist() == [0, 101, 102, 0, 103 + 31, 104 + 32, 33]


def test_the_cache_is_moved_by_the_decode_after_a_request_has_joined_or_left() -> None:
    """B joins before the decode until 155, A leaves before the one until 200; nothing is moved for the first alone."""
    steps = rebuild_steps(_timeline(TWO_REQUESTS), is_padded=False)
    assert steps.moved_tokens.tolist() == [0, 0, 0, 0, 103 + 31, 0, 33]


def test_a_padding_server_pays_for_the_longest_sequence() -> None:
    steps = rebuild_steps(_timeline(TWO_REQUESTS), is_padded=True)
    assert steps.decode_cached_tokens.tolist() == [0, 101, 102, 0, 2 * 103, 2 * 104, 33]


def test_two_prompts_in_one_prefill_are_padded_to_the_longer() -> None:
    timeline = _timeline([(0, 10, [30.0, 50]), (0, 40, [30.0, 50])])
    plain, padded = (rebuild_steps(timeline, is_padded=is_padded) for is_padded in (False, True))
    assert (plain.prefill_tokens[0], padded.prefill_tokens[0]) == (50, 80)
    assert (plain.prefill_pairs[0], padded.prefill_pairs[0]) == (55 + 820, 2 * 820)


def test_a_withheld_first_token_hides_its_prefill_in_the_decode_that_follows() -> None:
    requests = [TWO_REQUESTS[0], (70.0, 30, [155.0, 180, 200])]
    steps = rebuild_steps(_timeline(requests, withheld=frozenset({1})), is_padded=False)
    shared = np.flatnonzero((steps.prefill_requests > 0) & (steps.decode_sequences > 0))
    assert steps.seconds[shared] * 1e3 == pytest.approx([75])
    assert steps.prefill_tokens[shared].tolist() == [30]
    assert steps.decode_cached_tokens[shared].tolist() == [103 + 31]


def test_a_withheld_first_token_belongs_to_the_prefill_that_others_show() -> None:
    requests = [(0, 100, [40.0, 60]), (0, 50, [60.0])]
    steps = rebuild_steps(_timeline([(-50.0, 5, [-30.0]), *requests], withheld=frozenset({2})), is_padded=False)
    assert steps.prefill_requests.tolist() == [1, 2, 0]
    assert steps.decode_sequences.tolist() == [0, 0, 2]
    assert steps.decode_cached_tokens[2] == 101 + 51


def test_steps_that_a_failed_request_shared_are_left_out() -> None:
    timeline = _timeline(TWO_REQUESTS)
    failed = replace(timeline, is_ok=np.array([True, False]))
    steps = rebuild_steps(failed, is_padded=False)
    assert steps.seconds * 1e3 == pytest.approx([40, 20])
    assert steps.left_out_count == 5


def test_a_decode_in_which_a_sequence_got_no_token_is_left_out() -> None:
    requests = [(0, 100, [40.0, 60, 80, 100]), (0, 30, [40.0, 80, 100])]
    steps = rebuild_steps(_timeline(requests), is_padded=False)
    assert steps.decode_sequences.tolist() == [0, 2, 2]
    assert steps.left_out_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, is_ok=np.array([False, False])), "all 2 requests failed"),
        (lambda t: replace(t, input_tokens=np.array([100])), "must have 2 entries"),
        (lambda t: replace(t, token_starts=np.array([0, 9, 5])), "must rise from 0 to the 9 token times"),
        (lambda t: replace(t, token_seconds=t.token_seconds[::-1].copy()), "has token times that fall"),
        (lambda t: replace(t, arrival_seconds=np.array([0.0, 0.2])), "request 1: has a token before its arrival"),
        (lambda t: replace(t, output_tokens=np.array([4, 4])), "request 0: has more token times than output tokens"),
        (lambda t: replace(t, input_tokens=np.array([100, 0])), "request 1: must have at least one input token"),
        (lambda t: replace(t, token_seconds=np.full(9, np.nan)), "has a token time that is no number"),
    ],
)
def test_what_no_server_can_have_sent_is_refused(
    change: Callable[[TokenTimeline], TokenTimeline], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        rebuild_steps(change(_timeline(TWO_REQUESTS)), is_padded=False)


def test_an_empty_run_is_refused() -> None:
    nothing = np.empty(0)
    counts = np.empty(0, np.int64)
    empty = TokenTimeline(
        arrival_seconds=nothing,
        end_seconds=nothing,
        input_tokens=counts,
        output_tokens=counts,
        is_ok=np.empty(0, np.bool_),
        token_starts=np.zeros(1, np.int64),
        token_seconds=nothing,
    )
    with pytest.raises(InvalidInputError, match="has no requests"):
        rebuild_steps(empty, is_padded=False)


def test_the_batch_weight_is_the_most_that_a_batch_could_come_to() -> None:
    """When B has joined, A has 103 tokens and 2 to come, B 30 and 4: 105 + 32 when A ends, 34 when B does."""
    timeline = _timeline(TWO_REQUESTS)
    assert largest_batch_weight(timeline, is_padded=False) == 105 + 32
    assert largest_batch_weight(timeline, is_padded=True) == 2 * 105**2
    assert largest_batch_weight(is_padded=False) == 0


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_ok", [[False, False], [False, True]])
def test_tokens_of_requests_that_failed_show_no_batch_weight(*, is_ok: list[bool], is_padded: bool) -> None:
    """B has no tokens, whether it failed or not."""
    timeline = replace(_timeline([(0, 100, [40.0, 60]), (70, 30, [])]), is_ok=np.array(is_ok))
    assert largest_batch_weight(timeline, is_padded=is_padded) == 0


@pytest.mark.parametrize("withholds", [False, True])
@pytest.mark.parametrize(("is_padded", "weight"), [(False, 3_000), (True, 2_000_000)])
def test_the_batch_weight_of_a_busy_server_is_its_setting(*, is_padded: bool, weight: int, withholds: bool) -> None:
    """Whether or not it withholds first tokens."""
    generator = np.random.default_rng(3)
    records = simulate_users(
        policy=TgisPolicy(max_batch_weight=weight, is_padded=is_padded),
        tables=CONSTANTS.tables(),
        input_tokens=generator.integers(6, 800, 400),
        output_tokens=generator.integers(2, 300, 400),
        users_count=32,
        duration_seconds=300.0,
        draining_seconds=300.0,
        seed=5,
    )
    is_sent = np.full(len(records.token_seconds), True)
    is_sent[records.token_starts[:-1]] = not withholds
    found = largest_batch_weight(
        TokenTimeline(
            arrival_seconds=records.send_seconds,
            end_seconds=records.end_seconds,
            input_tokens=records.input_tokens,
            output_tokens=records.output_tokens,
            is_ok=records.is_ok,
            token_starts=np.concatenate([[0], np.cumsum(is_sent)])[records.token_starts],
            token_seconds=records.token_seconds[is_sent],
        ),
        is_padded=is_padded,
    )
    assert 0.97 * weight < found <= weight
