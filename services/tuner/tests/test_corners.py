"""Corner cases: the examples that were worked out by hand, what they promise, and what they cost to compute."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import precision_named
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.domain.admissibility import is_admissible
from llmpilot_tuner.domain.corners import corner_batches, sweep_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.plan import prediction
from llmpilot_tuner.domain.servers import TGI, TGI_PADDED, TGIS_FLASH, TGIS_PADDED, VLLM, ServerRules

SERVERS = [TGIS_FLASH, TGIS_PADDED, TGI, TGI_PADDED, VLLM]
BIG = Limits(rules=TGI_PADDED, longest_sequence=8192, most_new_tokens=1024, most_requests=256, prefill_limit=8192)


def shapes(groups: tuple[Rows, ...]) -> list[tuple[int, int]]:
    """Return counts of requests and input tokens of each."""
    return [(rows.request_count, rows.input_tokens) for rows in groups]


def named(batches: tuple[Batch, ...]) -> dict[str, Batch]:
    """Return batches by case."""
    assert len({batch.case for batch in batches}) == len(batches)
    return {batch.case: batch for batch in batches}


@st.composite
def any_limits(draw: st.DrawFn) -> tuple[Limits, int]:
    """Draw limits that do not contradict each other, and a weight that they allow."""
    rules: ServerRules = draw(st.sampled_from(SERVERS))
    longest = draw(st.integers(2, 300))
    requests = draw(st.integers(1, 70))
    limits = Limits(
        rules=rules,
        longest_sequence=longest,
        most_new_tokens=draw(st.integers(1, longest - 1)),
        most_requests=requests,
        is_encoder_decoder=rules.layout is Layout.PADDED and draw(st.booleans()),
        prompt_logprobs=draw(st.booleans()),
    )
    least = requests if rules.chunks_prefills else limits.prefill_weight(1, longest - 1)
    if draw(st.booleans()):
        limits = replace(limits, prefill_limit=least + draw(st.integers(0, 4 * least)))
    return limits, draw(st.integers(limits.lowest_weight, limits.highest_weight * 11 // 10))


@given(any_limits())
@settings(max_examples=250, deadline=None)
def test_every_corner_and_every_batch_of_the_sweep_is_admissible(drawn: tuple[Limits, int]) -> None:
    """A batch that a server would not run must not lower the weight that it is given."""
    limits, weight = drawn
    corners, sweep = corner_batches(limits, weight), sweep_batches(limits, weight)
    assert corners
    for batch in (*corners, *sweep):
        assert is_admissible(batch, limits, weight), batch
    steps = [replace(batch, case="") for batch in (*corners, *sweep)]
    assert len(set(steps)) == len(steps)
    named(corners)
    named(sweep)


def test_prefill_limit_of_8192_and_weight_of_448000() -> None:
    """The example of the research: 2 inputs of 4096, or 1 of 8191, beside residents that fill the weight."""
    corners = named(corner_batches(BIG, 448_000))
    assert shapes(corners["mixed_length"].prefill) == [(1, 8191)]
    assert shapes(corners["mixed_tokens"].prefill) == [(2, 4096)]
    for case in ("mixed_length", "mixed_tokens"):
        assert sum(rows.request_count for rows in corners[case].residents) == 54
        assert corners[case].token_count == 448_000
    assert shapes(corners["mixed_count"].prefill) == [(256, 32)]
    # 448000 is 256 x 1750: no count of requests leaves fewer tokens, and none has more rows.
    assert corners["decode_many"].decode == (Rows(request_count=256, input_tokens=726, output_tokens=1024),)
    assert [case for case in corners if case.startswith("decode")] == ["decode_many"]


def test_pool_makes_the_same_example_smaller() -> None:
    """Where the cache is a pool, residents cost nothing: 8192 tokens read at once, by few and by many requests."""
    corners = named(corner_batches(replace(BIG, rules=TGI), 448_000))
    assert shapes(corners["mixed_tokens"].prefill) == [(1, 8191), (1, 1)]
    assert shapes(corners["mixed_count"].prefill) == [(1, 7937), (255, 1)]
    assert sum(rows.request_count for rows in corners["decode_many"].decode) == 256
    assert set(corners) == {"mixed_tokens", "mixed_count", "decode_many"}
    assert {batch.pool_tokens for batch in corners.values()} == {448_000}


def test_flash_of_tgis_copies_the_whole_cache_twice_in_a_decode_step() -> None:
    """Its 2 extra caches are of all tokens of the batch."""
    corners = named(corner_batches(replace(BIG, rules=TGIS_FLASH), 448_000))
    assert corners["decode_many"].copied_tokens == 2 * 448_000


def test_t5_needs_the_batch_that_strands_fewest_tokens() -> None:
    """W=1024: of inputs of 256 and a token of output 3 fit, but 4 of 255 read 1020 tokens: 29 % more memory."""
    limits = Limits(rules=TGI_PADDED, longest_sequence=257, most_new_tokens=64, most_requests=64)
    for is_encoder_decoder in (False, True):
        corners = corner_batches(replace(limits, is_encoder_decoder=is_encoder_decoder), 1024)
        assert (4, 255) in [shape for batch in corners for shape in shapes(batch.prefill)]
        assert max(batch.prefill_tokens for batch in corners) == 1020


def test_mixed_case_fills_the_prefill_limit_with_several_inputs() -> None:
    """W=1999, P=700: one longest input and residents alone measured 30 % too little."""
    limits = Limits(rules=TGI_PADDED, longest_sequence=512, most_new_tokens=128, most_requests=32, prefill_limit=700)
    corners = named(corner_batches(limits, 1999))
    assert shapes(corners["mixed_tokens"].prefill) == [(2, 350)]
    assert corners["mixed_tokens"].token_count == 1999
    assert shapes(corners["mixed_length"].prefill) == [(1, 511)]


def test_square_weight_counts_squares() -> None:
    """TGIS padded, W = 4 x 64^2: 4 of 64 tokens, or 16 of 32."""
    limits = Limits(rules=TGIS_PADDED, longest_sequence=64, most_new_tokens=8, most_requests=16)
    corners = named(corner_batches(limits, 4 * 64**2))
    assert shapes(corners["prefill_long"].prefill) == [(4, 63)]
    assert shapes(corners["prefill_many"].prefill) == [(16, 31)]
    assert corners["decode_many"].decode == (Rows(request_count=16, input_tokens=24, output_tokens=8),)


def test_chunk_is_read_at_the_end_of_the_longest_sequence_beside_as_many_decodes_as_may_be() -> None:
    """vLLM: 2048 tokens of a step are 63 decode steps and 1985 tokens of an input of 4095, of which 2110 were read."""
    limits = Limits(rules=VLLM, longest_sequence=4096, most_new_tokens=512, most_requests=64, prefill_limit=2048)
    corners = named(corner_batches(limits, 100_007))
    count = corners["mixed_count"]
    assert count.prefill == (Rows(request_count=1, input_tokens=1985, output_tokens=1, context_tokens=2110),)
    assert sum(rows.request_count for rows in count.decode) == 63
    # 6250 whole blocks of 16.
    assert {batch.pool_tokens for batch in corners.values()} == {100_000}
    assert sum(rows.request_count for rows in corners["decode_many"].decode) == 64
    assert not corners["decode_many"].prefill


def test_blocks_are_whole() -> None:
    """25 tokens take 2 blocks of 16: of 5 blocks 2 sequences of 25 leave one, which a third request can have."""
    limits = Limits(rules=VLLM, longest_sequence=25, most_new_tokens=8, most_requests=8, prefill_limit=64)
    decode = named(corner_batches(replace(limits, most_requests=3), 95))["decode_many"].decode
    assert [(rows.request_count, rows.sequence_tokens) for rows in decode] == [(2, 25), (1, 16)]


@pytest.mark.parametrize("rules", SERVERS)
def test_log_probabilities_of_the_prompt_are_of_the_most_tokens_that_a_step_reads(rules: ServerRules) -> None:
    """The logits of every input token are kept."""
    limits = Limits(
        rules=rules, longest_sequence=64, most_new_tokens=16, most_requests=8, prefill_limit=None, prompt_logprobs=True
    )
    corners = corner_batches(limits, limits.lowest_weight * 3)
    kept = max(batch.prefill_tokens for batch in corners if batch.all_logits)
    assert kept == max(batch.prefill_tokens for batch in corners)
    assert not any(batch.all_logits for batch in corner_batches(replace(limits, prompt_logprobs=False), 64**2 * 3))


def test_weight_below_one_longest_request_is_an_error_that_says_the_lowest() -> None:
    """A server with less could not serve what it promises."""
    with pytest.raises(InvalidInputError, match="weight: must be >= 8192, the weight of one longest request, is 8191"):
        corner_batches(BIG, 8191)


def test_limits_that_contradict_each_other_are_an_error() -> None:
    """Nothing is computed from them."""
    with pytest.raises(InvalidInputError, match="prefill_limit"):
        corner_batches(replace(BIG, prefill_limit=100), 448_000)


def test_sweep_is_of_other_batches_at_counts_a_factor_of_two_apart() -> None:
    """Kernels' workspaces depend on how many requests there are."""
    sweep = named(sweep_batches(replace(BIG, prefill_limit=None), 448_000))
    assert {"sweep_prefill_1", "sweep_prefill_128", "sweep_decode_1", "sweep_decode_128"} <= set(sweep)
    assert "sweep_decode_256" not in sweep
    assert shapes(sweep["sweep_prefill_64"].prefill) == [(64, 6999)]


@pytest.mark.parametrize("rules", SERVERS)
def test_memory_never_falls_with_the_weight(rules: ServerRules) -> None:
    """A larger weight admits whatever a smaller one does: a search may bisect. Costs are those of an 8B LLM, about."""
    limits = Limits(rules=rules, longest_sequence=128, most_new_tokens=32, most_requests=24)
    costs = {"cache": 131_072.0, "token": 118_784.0, "square": 64.0, "row": 513_024.0}
    before = 0.0
    for weight in range(limits.lowest_weight, limits.highest_weight, max(1, limits.highest_weight // 400)):
        needs = []
        for batch in corner_batches(limits, weight):
            squares = sum(rows.request_count * rows.input_tokens**2 for rows in batch.prefill)
            rows = sum(rows.request_count for rows in (*batch.prefill, *batch.decode))
            cache = max(batch.pool_tokens, batch.token_count) + batch.copied_tokens
            working = max(
                costs["token"] * batch.prefill_tokens + costs["square"] * squares,
                costs["token"] * batch.prefill_tokens + costs["row"] * rows,
            )
            needs.append(costs["cache"] * cache + working)
        assert max(needs) >= before * (1 - 1e-9)
        before = max(needs)


@pytest.mark.parametrize("rules", SERVERS)
@pytest.mark.parametrize("prefill_limit", [None, 8192])
def test_corners_of_real_limits_are_few_and_take_milliseconds(rules: ServerRules, prefill_limit: int | None) -> None:
    """A search asks for them at dozens of weights; the time is the least of several, for the sake of a busy machine."""
    limits = replace(BIG, rules=rules, prefill_limit=prefill_limit if rules is not TGIS_PADDED else None)
    weight = 10**6 if rules is not TGIS_PADDED else 2 * 10**9
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        corners = corner_batches(limits, weight)
        seconds.append(time.perf_counter() - start)
    # About 1 ms on the machine that this was written on.
    assert min(seconds) < 0.02
    assert len(corners) <= 12


def test_batch_that_an_llm_needs_most_for_is_a_corner_case() -> None:
    """3 inputs of 2,566 tokens and 1 of 4,095 weigh as much as 2 of 3,142, whose position bias takes 5 % more."""
    execution = Execution(layout=Layout.PADDED)
    config = parse_llm(bundled_config("google/flan-t5-xl"))
    costs = prediction(config, execution, precision_named("fp16"))
    limits = Limits(
        rules=TGIS_PADDED, longest_sequence=4096, most_new_tokens=2048, most_requests=8, is_encoder_decoder=True
    )
    without, corners = corner_batches(limits, 19_768_963), corner_batches(limits, 19_768_963, costs)
    assert corners[:-1] == without
    assert (corners[-1].case, shapes(corners[-1].prefill)) == ("prefill_dearest", [(2, 3142)])
    beside_weights = [max(map(costs, batches)) - costs.weight_bytes for batches in (without, corners)]
    assert beside_weights[1] > 1.04 * beside_weights[0]


def test_lowest_and_highest_weight_of_a_server_with_blocks_are_whole_blocks() -> None:
    """1255 tokens take 79 blocks of 16: with 78, which 1255 // 16 are, the server would not start."""
    limits = Limits(rules=VLLM, longest_sequence=1255, most_new_tokens=381, most_requests=4)
    assert (limits.lowest_weight, limits.highest_weight) == (79 * 16, 4 * 79 * 16)
