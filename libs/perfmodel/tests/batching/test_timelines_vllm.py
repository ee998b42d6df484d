"""Timelines by hand: a decode takes 1 + sequences / 2 seconds, a prefill 2 + tokens / 4 + requests / 2.

A step that does both takes 2 + sequences / 2 + tokens / 4 + requests / 2.
"""

from collections.abc import Callable

import numpy as np
import pytest

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepTables

Drive = Callable[..., list[list[float]]]


def vllm0(tables: StepTables, block_count: int, **settings: int) -> Engine:
    return Engine(policy=Vllm0Policy(block_count=block_count, block_size=4, **settings), tables=tables)


def vllm1(tables: StepTables, block_count: int, *, caching: bool = False, **settings: int) -> Engine:
    policy = Vllm1Policy(block_count=block_count, block_size=4, enable_prefix_caching=caching, **settings)
    return Engine(policy=policy, tables=tables)


def test_vllm0_prefills_whatever_waits_before_it_decodes(drive: Drive, tables: StepTables) -> None:
    """Prefill 0-3.5; the second came at 1, its prefill 3.5-7; then both decode: 9; the first alone: 10.5."""
    assert drive(vllm0(tables, 100), [(0, 4, 3), (1, 4, 2)]) == [[3.5, 9, 10.5], [7, 9]]


def test_vllm0_prefills_whole_prompts_within_the_batched_tokens(drive: Drive, tables: StepTables) -> None:
    """10 tokens: 4 + 4, then 4, and no decode in between."""
    tokens = drive(vllm0(tables, 100, max_num_batched_tokens=10), [(0, 4, 2)] * 3)
    assert [times[0] for times in tokens] == [5, 5, 8.5]
    assert [times[1] for times in tokens] == [11, 11, 11]


def test_vllm0_limits_the_sequences(drive: Drive, tables: StepTables) -> None:
    assert drive(vllm0(tables, 100, max_num_seqs=2), [(0, 4, 1)] * 3) == [[5], [5], [8.5]]


def test_vllm0_limits_the_padding_where_prompts_are_padded(drive: Drive, tables: StepTables) -> None:
    """2 x 8 - 12 = 4 tokens of padding, which are computed too: 2 + 16/4 + 1."""
    within = drive(vllm0(tables, 100, max_paddings=4), [(0, 4, 1), (0, 8, 1)])
    beyond = drive(vllm0(tables, 100, max_paddings=3), [(0, 4, 1), (0, 8, 1)])
    assert within == [[7], [7]]
    assert beyond == [[3.5], [3.5 + 4.5]]


def test_vllm0_recomputes_the_newest_when_blocks_run_out(drive: Drive, tables: StepTables) -> None:
    """3 blocks of 4 tokens, two prompts of 4: both prefilled by 5 with one block each.

    At 5 both need a second block, for their fifth token; the server gives one to the first and, with none left, sends
    the second back. The first decodes alone, 6.5 and 8. Then the second comes back with 5 tokens and a full prefill:
    2 + 5/4 + .5.
    """
    engine = vllm0(tables, 3)
    assert drive(engine, [(0, 4, 3), (0, 4, 3)]) == [[5, 6.5, 8], [5, 11.75, 13.25]]
    assert engine.preemption_count == 1


def test_vllm0_asks_for_a_free_block_for_every_sequence_even_one_that_needs_none(
    drive: Drive, tables: StepTables
) -> None:
    """2 blocks, two prompts of 3: each has room for a fourth token, but no block is free.

    The second gives up its block, the first decodes alone until 6. Then the second comes back: 2 + 4/4 + .5.
    """
    engine = vllm0(tables, 2)
    assert drive(engine, [(0, 3, 2), (0, 3, 2)]) == [[4.5, 6], [4.5, 9.5]]
    assert engine.preemption_count == 1


def test_vllm0_leaves_one_percent_of_the_blocks_free_when_it_admits(drive: Drive, tables: StepTables) -> None:
    """99 of 100 blocks may be taken: the second prompt of 8 would take the hundredth."""
    tokens = drive(vllm0(tables, 100), [(0, 392, 1), (0, 8, 1)])
    assert tokens[1][0] > tokens[0][0]
    assert drive(vllm0(tables, 101), [(0, 392, 1), (0, 8, 1)])[0] == [2 + 100 + 1]


def test_vllm1_mixes_decodes_and_prefills_in_a_step(drive: Drive, tables: StepTables) -> None:
    """Prefill 0-3.5. Then one decode and a prompt of 4: 2 + .5 + 1 + .5 = 4. Then two decodes: 2; then one: 1.5."""
    assert drive(vllm1(tables, 100), [(0, 4, 4), (1, 4, 2)]) == [[3.5, 7.5, 9.5, 11], [7.5, 9.5]]


def test_vllm1_computes_a_long_prompt_in_chunks_beside_the_decodes(drive: Drive, tables: StepTables) -> None:
    """Budget 8: the first prompt of 4 and 4 of the second's 14: 2 + 2 + 1 = 5.

    Then 1 decode and 7 of the prompt: 2 + .5 + 7/4 + .5 = 4.75. Then 1 decode and the last 3: 2 + .5 + .75 + .5 = 3.75.
    """
    tokens = drive(vllm1(tables, 100, max_num_batched_tokens=8), [(0, 4, 3), (0, 14, 1)])
    assert tokens == [[5, 9.75, 13.5], [13.5]]


def test_vllm1_lets_a_prompt_in_only_when_all_of_it_fits(drive: Drive, tables: StepTables) -> None:
    """6 blocks, 8 tokens a step: the first, 12 tokens, takes 3 blocks in the end, 2 of them in the first step.

    So 14 tokens have no room beside it, though there would be for their first chunk, until its only token at 4.5 +
    2 + 4/4 + .5; then 8 and 6 of them take 4.5 and 4. With one block more they are let in after the first step: 4 of
    the first and 4 of the second, 2 + 2 + 1, then 8 and the last 2, 4.5 and 3.
    """
    requests = [(0, 12, 1), (0, 14, 1)]
    assert drive(vllm1(tables, 6, max_num_batched_tokens=8), requests) == [[8], [16.5]]
    assert drive(vllm1(tables, 7, max_num_batched_tokens=8), requests) == [[9.5], [17]]


def test_vllm1_sends_the_newest_back_when_blocks_run_out_and_lets_none_in_that_step(
    drive: Drive, tables: StepTables
) -> None:
    """3 blocks, two prompts of 4: at 5 the first takes the last block, the second goes back and waits for two decodes.

    Then it is computed again, its first token included: 2 + 5/4 + .5.
    """
    engine = vllm1(tables, 3)
    assert drive(engine, [(0, 4, 3), (0, 4, 3)]) == [[5, 6.5, 8], [5, 11.75, 13.25]]
    assert engine.preemption_count == 1


def test_vllm1_needs_no_block_for_a_token_that_fits_into_the_last_one(drive: Drive, tables: StepTables) -> None:
    """2 blocks, two prompts of 3 and one decode each: 4.5 + 2."""
    engine = vllm1(tables, 2)
    assert drive(engine, [(0, 3, 2), (0, 3, 2)]) == [[4.5, 6.5], [4.5, 6.5]]
    assert engine.preemption_count == 0


def test_vllm1_skips_the_blocks_of_a_prefix_it_has_computed(drive: Drive, tables: StepTables) -> None:
    """Prompts of 10 with 8 in common: the second computes 2 of them."""
    engine = vllm1(tables, 100, caching=True)
    tokens = drive(engine, [(0, 10, 1), (10, 10, 1)], [(7, 8), (7, 8)])
    assert tokens == [[5], [10 + 2 + 0.5 + 0.5]]
    assert (engine.prefix_hit_tokens, engine.prefix_query_tokens) == (8, 20)


def test_vllm1_computes_the_last_block_of_a_prompt_that_is_there_entirely(drive: Drive, tables: StepTables) -> None:
    """8 tokens are there, but 4 are computed again to get the next token."""
    engine = vllm1(tables, 100, caching=True)
    assert drive(engine, [(0, 8, 1), (10, 8, 1)], [(7, 8), (7, 8)])[1] == [10 + 2 + 1 + 0.5]
    assert engine.prefix_hit_tokens == 4


def test_vllm1_shares_a_prefix_between_two_prompts_of_one_step(drive: Drive, tables: StepTables) -> None:
    """4 + 4 tokens of the first, 4 of the second: 2 + 12/4 + 1."""
    engine = vllm1(tables, 3, caching=True)
    assert drive(engine, [(0, 8, 1), (0, 8, 1)], [(7, 8), (7, 9)]) == [[6], [6]]
    assert engine.prefix_hit_tokens == 4


def test_vllm1_forgets_the_blocks_that_have_been_free_the_longest(drive: Drive, tables: StepTables) -> None:
    """7 blocks, prompts of 9, so 2 blocks to find and a third, one after the other: A, B, A, C, A, B.

    C takes A's old third block and B's last two, the next third block is B's first; A was used in between and stays.
    """
    hashes = [(1, 2), (3, 4), (1, 2), (5, 6), (1, 2), (3, 4)]
    requests = [(100.0 * number, 9, 1) for number in range(6)]
    tokens = drive(vllm1(tables, 7, caching=True), requests, hashes)
    computed = [(times[0] - request[0] - 2.5) * 4 for times, request in zip(tokens, requests, strict=True)]
    assert computed == [9, 9, 1, 9, 1, 9]


def test_vllm1_finds_its_own_blocks_again_after_a_preemption(drive: Drive, tables: StepTables) -> None:
    """4 blocks: at 13 both have 9 tokens and need a third; the first takes it from the second and ends at 14.5.

    The second's first block is still there, so 5 of its 9 tokens are computed again: 2 + 5/4 + .5.
    """
    engine = vllm1(tables, 4, caching=True)
    tokens = drive(engine, [(0, 4, 6), (0, 4, 6)], [(1,), (2,)])
    assert tokens == [[5, 7, 9, 11, 13, 14.5], [5, 7, 9, 11, 13, 18.25]]
    assert engine.preemption_count == 1


@pytest.mark.parametrize("caching", [True, False])
def test_nothing_is_held_when_all_have_ended(drive: Drive, tables: StepTables, caching: bool) -> None:
    engine = vllm1(tables, 20, caching=caching)
    generator = np.random.default_rng(0)
    requests = [(0.0, int(generator.integers(1, 30)), int(generator.integers(1, 20))) for _ in range(50)]
    drive(engine, requests)
    assert (engine.used_memory_share, engine.running_count, engine.waiting_count) == (0, 0, 0)
