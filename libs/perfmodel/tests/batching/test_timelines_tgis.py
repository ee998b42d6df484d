"""Timelines by hand: a decode takes 1 + sequences / 2 seconds, a prefill 2 + tokens / 4 + requests / 2."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import TgiPolicy, TgisPolicy
from llmpilot_perfmodel.steps.step_time import StepConstants, StepTables

Drive = Callable[..., list[list[float]]]


def tgis(tables: StepTables, max_batch_weight: int, **settings: object) -> Engine:
    return Engine(policy=TgisPolicy(max_batch_weight=max_batch_weight, **settings), tables=tables)  # type: ignore[arg-type]


def tgi(tables: StepTables, max_batch_total_tokens: int, **settings: object) -> Engine:
    policy = TgiPolicy(max_batch_total_tokens=max_batch_total_tokens, **settings)  # type: ignore[arg-type]
    return Engine(policy=policy, tables=tables)


def test_requests_that_wait_together_are_prefilled_and_decoded_together(drive: Drive, tables: StepTables) -> None:
    """Prefill 2 + 12/4 + 2/2 = 6; decodes of 2 and then of 1: 2 and 1.5."""
    assert drive(tgis(tables, 100), [(0, 4, 3), (0, 8, 2)]) == [[6, 8, 9.5], [6, 8]]


def test_decode_after_a_request_has_left_or_joined_moves_the_cache(drive: Drive, constants: StepConstants) -> None:
    """A quarter of a second a token. One leaves at 8: the other's 4 + 2 tokens are moved, 1.5 + 6/4 = 3.

    Below, the first decodes at 5 and 6.5, the second is prefilled until 10; the decode of both moves 7 + 5 tokens.
    """
    tables = replace(constants, decode_seconds_per_moved_token=0.25).tables()
    assert drive(tgis(tables, 100), [(0, 4, 3), (0, 8, 2)]) == [[6, 8, 11], [6, 8]]
    requests = [(0, 4, 6), (5.5, 4, 2)]
    assert drive(tgis(tables, 100), requests)[1] == [10, 10 + 2 + 12 / 4]


def test_batch_that_is_about_to_complete_is_not_disturbed(drive: Drive, tables: StepTables) -> None:
    """At 8 one token is left, so the third request waits until 9.5; its prefill takes 3.5 and its decode 1.5."""
    requests = [(0, 4, 3), (0, 8, 2), (6.5, 4, 2)]
    assert drive(tgis(tables, 100), requests) == [[6, 8, 9.5], [6, 8], [13, 14.5]]


def test_prefill_preempts_decode_and_a_decode_of_all_follows(drive: Drive, tables: StepTables) -> None:
    """First alone: prefill 0-3.5, decodes end at 5, 6.5. The second: prefill 6.5-10, both decode until 12, it ends.

    The third came at 7 and still has to wait for that decode; its prefill takes until 15.5.
    """
    requests = [(0, 4, 6), (5.5, 4, 2), (7, 4, 1)]
    assert drive(tgis(tables, 100), requests) == [[3.5, 5, 6.5, 12, 17, 18.5], [10, 12], [15.5]]


def test_lone_request_waits_until_the_batch_has_decoded_half_of_the_waiting_tokens(
    drive: Drive, tables: StepTables
) -> None:
    """Four run: after d decodes 4 x (11 - d) // 12 must wait, which is 1 after six; each decode takes 3 from 8 on."""
    requests = [(0, 4, 9)] * 4 + [(8.5, 4, 1)]
    assert drive(tgis(tables, 100), requests)[4] == [8 + 6 * 3 + 3.5]


def test_request_is_let_in_when_the_sum_of_all_weights_is_too_large_but_never_at_one_time(
    drive: Drive, tables: StepTables
) -> None:
    """12 + 9 tokens; but when the second ends, after 3 tokens each, the batch holds 7 + 9 = 16."""
    assert drive(tgis(tables, 16), [(0, 4, 8), (0, 6, 3)])[1][0] == 5.5
    assert drive(tgis(tables, 15), [(0, 4, 8), (0, 6, 3)])[1][0] > 5.5


def test_smaller_request_overtakes_one_that_does_not_fit_if_it_came_within_a_second(
    drive: Drive, tables: StepTables
) -> None:
    """The first alone weighs 12 of 24; its prefill ends at 3.5. The second needs 20, the third 4."""
    soon = drive(tgis(tables, 24), [(0, 4, 8), (1, 10, 10), (2, 2, 2)])
    late = drive(tgis(tables, 24), [(0, 4, 8), (1, 10, 10), (2.25, 2, 2)])
    assert soon[2] == [3.5 + 3, 3.5 + 3 + 2]
    assert late[2][0] > late[0][-1]


def test_largest_output_counts_not_the_real_one(drive: Drive, tables: StepTables) -> None:
    first_tokens = [times[0] for times in drive(tgis(tables, 20), [(0, 4, 2, 16), (0, 4, 2, 16)])]
    assert first_tokens[0] == 3.5
    assert first_tokens[1] > 3.5


def test_batch_size_is_limited(drive: Drive, tables: StepTables) -> None:
    """The third is prefilled after the others' only token."""
    assert drive(tgis(tables, 100, max_batch_size=2), [(0, 4, 1)] * 3) == [[5], [5], [5 + 3.5]]


def test_padding_server_pays_for_the_longest(drive: Drive, tables: StepTables) -> None:
    """Prefill of 2 x 8 tokens: 2 + 4 + 1."""
    assert drive(tgis(tables, 1000, is_padded=True), [(0, 4, 2), (0, 8, 2)])[0] == [7, 9]


@pytest.mark.parametrize(("limit", "is_let_in"), [(288, True), (287, False)])
def test_padded_weight_is_the_longest_length_squared_times_the_sequences(
    drive: Drive, tables: StepTables, limit: int, is_let_in: bool
) -> None:
    """Inputs 4 and 8: after 4 tokens each, 2 x 12^2 = 288; after 6 one is left with (4 + 6)^2."""
    tokens = drive(tgis(tables, limit, is_padded=True), [(0, 4, 6), (0, 8, 4)])
    assert (tokens[1][0] == tokens[0][0]) == is_let_in


def test_tgi_sets_aside_input_and_largest_output(drive: Drive, tables: StepTables) -> None:
    """16 + 9 tokens do not fit into 20, whatever ends when."""
    tokens = drive(tgi(tables, 20), [(0, 4, 8), (0, 6, 3)])
    assert tokens[0][0] == 3.5
    assert tokens[1][0] == tokens[0][-1] + 2 + 1.5 + 0.5


def test_tgi_limits_the_tokens_of_a_prefill(drive: Drive, tables: StepTables) -> None:
    """Two prompts of 4 fit into 8. A new batch asks the queue again: one waits, and .3 x 2 asks for no more."""
    tokens = drive(tgi(tables, 1000, max_batch_prefill_tokens=8), [(0, 4, 2)] * 3)
    assert [times[0] for times in tokens] == [5, 5, 8.5]


def test_tgi_waits_for_a_share_of_the_batch_or_for_enough_decodes(drive: Drive, tables: StepTables) -> None:
    """Four run from 8 on, 3 seconds a decode; .5 x 4 must wait; with 4 waiting tokens one is let in after 3 decodes."""
    settings = {"waiting_served_ratio": 0.5, "max_waiting_tokens": 4}
    alone = drive(tgi(tables, 1000, **settings), [(0, 4, 9)] * 4 + [(8.5, 4, 1)])
    in_pair = drive(tgi(tables, 1000, **settings), [(0, 4, 9)] * 4 + [(8.5, 4, 1)] * 2)
    assert alone[4] == [8 + 3 * 3 + 3.5]
    assert in_pair[4] == [8 + 3 + 5]


def test_tgi_keeps_the_order_of_the_queue(drive: Drive, tables: StepTables) -> None:
    """The third would fit beside the first, but the second is before it."""
    tokens = drive(tgi(tables, 24), [(0, 4, 8), (0, 10, 10), (0, 2, 2)])
    assert tokens[0][-1] < tokens[1][0] <= tokens[2][0]
