"""Expected bytes are sums of tensors by hand: of each, how many numbers it has, times the bytes of one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.bundled_llms import bundled_config, bundled_llms
from llmpilot_perfmodel.llm_config import LlmConfig, parse_llm
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows, StepMemory
from llmpilot_perfmodel.step_memory.peak import StepMemoryModel, step_memory

PACKED = Execution(layout=Layout.PACKED, activation_bits=32)
PADDED = Execution(layout=Layout.PADDED, activation_bits=32)
EAGER = Execution(layout=Layout.PADDED, attention=Attention.EAGER, activation_bits=32)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""Heads of 4 numbers, so that K and V of a token are 2 layers * 2 * 4 numbers = 64 bytes."""

T5 = {
    "model_type": "t5",
    "d_model": 8,
    "d_ff": 16,
    "d_kv": 4,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 10,
    "feed_forward_proj": "relu",
    "torch_dtype": "float32",
}


def config(sizes: dict[str, object], **changes: object) -> LlmConfig:
    """Return an LLM smaller than a config.json may say: its vocabulary is cut after it was read."""
    stated = sizes | changes
    llm = parse_llm(json.dumps(stated | {"vocab_size": 2**18}))
    return replace(llm, architecture=replace(llm.architecture, vocabulary_size=int(str(stated["vocab_size"]))))


def rows(request_count: int, input_tokens: int, output_tokens: int = 1, context_tokens: int = 0) -> Rows:
    return Rows(
        request_count=request_count,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        context_tokens=context_tokens,
    )


def prefill(
    *requests: Rows,
    decode: tuple[Rows, ...] = (),
    residents: tuple[Rows, ...] = (),
    pool_tokens: int = 0,
    copied_tokens: int = 0,
    all_logits: bool = False,
) -> Batch:
    return Batch(
        case="test",
        prefill=requests,
        decode=decode,
        residents=residents,
        pool_tokens=pool_tokens,
        copied_tokens=copied_tokens,
        all_logits=all_logits,
    )


def decode(*requests: Rows, copied_tokens: int = 0) -> Batch:
    return Batch(case="test", decode=requests, copied_tokens=copied_tokens)


def is_close(memory: StepMemory, *, working: float, cache: float, phase: str) -> None:
    assert memory.phase == phase
    assert memory.working_bytes == working
    assert memory.cache_bytes == cache


def test_packed_prefill_peaks_in_the_feed_forward_part() -> None:
    memory = step_memory(config(LLAMA), prefill(rows(1, 3), pool_tokens=5), PACKED)
    # Ids, positions and the cosines and sines of 4 numbers of 3 tokens; the place of the last token.
    given_bytes = 3 * (8 + 8 + 2 * 4 * 4) + 8
    # Embedding, layer input, sum with attention, norm; gate after its activation, up, their product.
    is_close(memory, working=given_bytes + 3 * (4 * 8 + 3 * 16) * 4, cache=5 * 64, phase="feed-forward")


def test_padded_prefill_has_a_mask_and_positions_of_every_token() -> None:
    memory = step_memory(config(LLAMA), prefill(rows(2, 3)), PADDED)
    given_bytes = 6 * (8 + 8 + 8 + 2 * 4 * 4) + 3 * 8  # ids, mask, positions, cosines and sines; a row of positions
    mask = 2 * 3 * 3  # of truths
    is_close(memory, working=given_bytes + mask + 6 * (4 * 8 + 3 * 16) * 4, cache=6 * 64, phase="feed-forward")


def test_padded_decode_of_long_sequences_peaks_while_a_cache_grows() -> None:
    memory = step_memory(config(LLAMA), decode(rows(2, 30, 10)), PADDED)
    tokens = 2 * 40
    given_bytes = 2 * (8 + 2 * 4 * 4) + 8 + tokens * (8 + 8)  # mask and positions of every token
    old_values = 2 * 39 * 4 * 4
    step = 2 * (3 * 8 + 8 + 4 + 4) * 4  # embedding, layer input, norm; query, key, value
    is_close(memory, working=given_bytes + tokens + old_values + step, cache=tokens * 64, phase="cache growth")


def test_eager_attention_keeps_two_tensors_of_scores_and_a_mask() -> None:
    memory = step_memory(config(LLAMA, num_key_value_heads=2), prefill(rows(1, 64)), EAGER)
    given_bytes = 64 * (8 + 8 + 2 * 4 * 4)
    mask, scores = 64 * 64 * 4, 2 * 64 * 64 * 4
    held = 64 * (3 * 8 + 8) * 4  # embedding, layer input, norm; query
    is_close(memory, working=given_bytes + mask + 2 * scores + held, cache=64 * 128, phase="attention")


def test_scores_of_16_bits_are_normalized_in_two_more_tensors_of_32() -> None:
    execution = replace(EAGER, activation_bits=16)
    memory = step_memory(config(LLAMA, num_key_value_heads=2), prefill(rows(1, 64)), execution)
    given_bytes = 64 * (8 + 8 + 2 * 4 * 2)
    pairs = 64 * 64
    held = 64 * (3 * 8 + 8) * 2
    is_close(memory, working=given_bytes + pairs * 2 + 2 * pairs * (2 + 4 + 4) + held, cache=64 * 64, phase="attention")


def test_eager_attention_repeats_keys_and_values_for_groups_of_heads() -> None:
    one_each, grouped = (
        step_memory(config(LLAMA, num_attention_heads=4, head_dim=4, num_key_value_heads=count), batch, EAGER)
        for batch in [prefill(rows(1, 256))]
        for count in (4, 2)
    )
    assert grouped.working_bytes - one_each.working_bytes == 2 * 256 * 16 * 4  # K and V of all four heads


def test_logits_of_one_token_of_each_request() -> None:
    memory = step_memory(config(LLAMA, vocab_size=1000), decode(rows(4, 1, 1)), PACKED)
    # Ids and positions; what the model made, and of it the rows that are read; the logits.
    is_close(memory, working=4 * (16 + 8 * 4 + 8 * 4 + 1000 * 4), cache=8 * 64, phase="logits")


def test_log_probabilities_of_every_token_are_a_second_tensor_in_32_bits() -> None:
    batch = prefill(rows(1, 3), all_logits=True)
    memory = step_memory(config(LLAMA, vocab_size=1000), batch, replace(PACKED, activation_bits=16))
    # Ids, positions, the likeliest token; logits in 16 bits, log-probabilities in 32. Cache: with room for the output.
    is_close(memory, working=3 * (16 + 8 + 1000 * (2 + 4)), cache=4 * 32, phase="log-probabilities")


def test_what_is_copied_and_who_is_resident_only_adds_cache() -> None:
    alone = step_memory(config(LLAMA), prefill(rows(2, 3)), PADDED)
    beside = step_memory(config(LLAMA), prefill(rows(2, 3), residents=(rows(3, 5, 2),), copied_tokens=11), PADDED)
    assert beside.working_bytes == alone.working_bytes
    assert beside.cache_bytes == alone.cache_bytes + (3 * 7 + 11) * 64


def test_pool_has_one_size_whoever_is_in_it() -> None:
    few, many = (
        step_memory(config(LLAMA), prefill(rows(1, 3), residents=(rows(count, 10),), pool_tokens=1000), PACKED)
        for count in (1, 50)
    )
    assert few == many
    assert few.cache_bytes == 1000 * 64


def test_mixed_packed_step_is_one_forward() -> None:
    mixed = Batch(case="mixed", prefill=(rows(1, 10),), decode=(rows(6, 20, 5),), pool_tokens=1000)
    memory = step_memory(config(LLAMA), mixed, PACKED)
    assert memory.working_bytes == 16 * (8 + 8 + 32 + (4 * 8 + 3 * 16) * 4) + 7 * 8


def test_gpt_neox_adds_attention_to_the_layer_input_after_the_feed_forward_part() -> None:
    neox = config(LLAMA, model_type="gpt_neox", hidden_size=32, num_key_value_heads=None, intermediate_size=128)
    memory = step_memory(neox, prefill(rows(1, 3), pool_tokens=4), PACKED)
    # A quarter of a head of 16 is rotated; embedding, layer input, attention, norm; two tensors of the width.
    is_close(
        memory,
        working=3 * (8 + 8 + 2 * 4 * 4 + (4 * 32 + 2 * 128) * 4) + 8,
        cache=4 * 2 * 2 * 32 * 4,
        phase="feed-forward",
    )


def test_experts_take_every_token_once_for_each_expert_that_it_passes() -> None:
    mixtral = config(LLAMA, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    memory = step_memory(mixtral, prefill(rows(1, 3), pool_tokens=4), PACKED)
    passed = 2 * (8 + 4 * 16) * 4  # of each expert the input; gate and up together, the gate's activation, the product
    indices = 4 * 4 + 2 * 36
    assert memory.working_bytes == 3 * (8 + 8 + 32 + 4 * 8 * 4 + passed + indices) + 8


def test_t5_position_bias_of_one_long_input_is_the_peak_while_it_is_computed() -> None:
    memory = step_memory(config(T5), prefill(rows(1, 64)), PADDED)
    ids = 64 * 8
    tensors = 64 * (2 * 8 + 3 * 8) * 4  # embedding, norm; query, key, value
    distances = 64 * 64 * (6 * 8 + 1) + 2 * 64 * 8  # six tensors of 64-bit integers, one of truths; two of positions
    is_close(memory, working=ids + tensors + distances, cache=0, phase="position bias")


def test_t5_scores_of_many_inputs_are_the_peak() -> None:
    memory = step_memory(config(T5), prefill(rows(16, 64)), EAGER)
    tokens, pairs = 16 * 64, 64 * 64
    working = tokens * 16 + 16 * pairs * 4 + tokens * (3 * 8 + 3 * 8) * 4 + 2 * pairs * 4 + 2 * 16 * 2 * pairs * 4
    is_close(memory, working=working, cache=0, phase="encoder attention")


def test_t5_in_half_precision_keeps_its_second_feed_forward_matrices_in_32_bits() -> None:
    half = replace(PADDED, activation_bits=16)
    float16, bfloat16 = (step_memory(config(T5, torch_dtype=name), prefill(rows(4, 8)), half) for name in PRECISIONS)
    assert float16.weight_bytes - bfloat16.weight_bytes == 4 * 8 * 16 * 2
    assert float16.working_bytes > bfloat16.working_bytes


PRECISIONS = ("float16", "bfloat16")


@pytest.mark.parametrize("sizes", [LLAMA, T5])
def test_weights_are_those_of_llm_work_on_one_gpu(sizes: dict[str, object]) -> None:
    llm = config(sizes, torch_dtype="bfloat16")
    memory = step_memory(llm, prefill(rows(1, 2)), Execution(layout=Layout.PADDED))
    assert memory.weight_bytes == llm_work(llm, 1).weight_bytes


def test_quantized_weights_are_counted_as_the_config_json_says() -> None:
    name = "openai/gpt-oss-20b"
    llm = parse_llm(bundled_config(name))
    memory = step_memory(llm, prefill(rows(1, 2)), Execution(layout=Layout.PACKED))
    assert memory.weight_bytes == llm_work(llm, 1).weight_bytes


def test_heads_that_gpus_cannot_share_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="gpu_count"):
        StepMemoryModel(config(LLAMA), replace(PACKED, gpu_count=3))


@pytest.mark.parametrize("name", bundled_llms())
@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("layout", Layout)
def test_every_bundled_llm_needs_more_for_more_requests(name: str, attention: Attention, layout: Layout) -> None:
    model = StepMemoryModel(parse_llm(bundled_config(name)), Execution(layout=layout, attention=attention))
    totals = [model.of(prefill(rows(count, 100), decode=(rows(count, 90, 10),))).total_bytes for count in (1, 2, 4, 8)]
    assert totals == sorted(set(totals))
    assert totals[0] > model.of(Batch(case="idle")).total_bytes > 0


SHAPES = st.tuples(st.integers(1, 64), st.integers(1, 512), st.integers(1, 64))
LLMS = [config(LLAMA), config(LLAMA, model_type="gpt_neox", num_key_value_heads=None), config(T5)]


EXECUTIONS = [
    Execution(layout=layout, attention=attention, activation_bits=bits)
    for layout in Layout
    for attention in Attention
    for bits in (16, 32)
]


@given(
    llm=st.sampled_from(LLMS),
    execution=st.sampled_from(EXECUTIONS),
    shape=SHAPES,
    more=st.tuples(st.integers(0, 8), st.integers(0, 64), st.integers(0, 8)),
    copied_tokens=st.integers(0, 1000),
)
def test_no_request_and_no_token_makes_a_step_smaller(
    llm: LlmConfig, execution: Execution, shape: tuple[int, int, int], more: tuple[int, int, int], copied_tokens: int
) -> None:
    larger = tuple(a + b for a, b in zip(shape, more, strict=True))
    for kind in (prefill, decode):
        small = step_memory(llm, kind(rows(*shape)), execution)
        large = step_memory(llm, kind(rows(*larger), copied_tokens=copied_tokens), execution)
        assert large.total_bytes >= small.total_bytes


@given(shape=SHAPES, layout=st.sampled_from(Layout), attention=st.sampled_from(Attention))
def test_two_gpus_need_less_each_but_more_together(
    shape: tuple[int, int, int], layout: Layout, attention: Attention
) -> None:
    llm = config(LLAMA, num_attention_heads=4, num_key_value_heads=4)
    execution = Execution(layout=layout, attention=attention)
    batch = Batch(case="mixed", prefill=(rows(*shape),), decode=(rows(*shape),))
    one, each = (step_memory(llm, batch, replace(execution, gpu_count=count)) for count in (1, 2))
    assert each.weight_bytes < one.weight_bytes <= 2 * each.weight_bytes
    assert each.total_bytes < one.total_bytes <= 2 * each.total_bytes


@given(shape=SHAPES, layout=st.sampled_from(Layout), attention=st.sampled_from(Attention))
def test_16_bits_take_at_least_half_of_32(shape: tuple[int, int, int], layout: Layout, attention: Attention) -> None:
    batch = Batch(case="mixed", prefill=(rows(*shape),), decode=(rows(*shape),))
    half, full = (
        step_memory(config(LLAMA), batch, Execution(layout=layout, attention=attention, activation_bits=bits))
        for bits in (16, 32)
    )
    assert half.weight_bytes == full.weight_bytes / 2
    assert half.total_bytes >= full.total_bytes / 2


def test_sliding_window_cuts_the_cache_of_a_padded_batch() -> None:
    whole = step_memory(config(LLAMA), decode(rows(2, 500, 12)), PADDED)
    cut = step_memory(config(LLAMA, model_type="mistral", sliding_window=128), decode(rows(2, 500, 12)), PADDED)
    assert whole.cache_bytes == 2 * 512 * 64
    assert cut.cache_bytes == 2 * 128 * 64


@given(
    llm=st.sampled_from([*LLMS, config(LLAMA, model_type="mistral", sliding_window=16)]),
    attention=st.sampled_from(Attention),
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    residents=st.tuples(st.integers(0, 9), st.integers(2, 99)),
)
def test_many_padded_steps_at_once_take_what_each_takes(
    llm: LlmConfig, attention: Attention, shapes: list[tuple[int, int, int]], residents: tuple[int, int]
) -> None:
    model = StepMemoryModel(llm, replace(PADDED, attention=attention))
    others = (rows(residents[0], residents[1] - 1),) if residents[0] else ()
    requests, inputs, outputs = np.array(shapes, dtype=np.float64).T

    def needed(batch: Batch) -> float:
        memory = model.of(batch)
        return memory.cache_bytes + memory.working_bytes

    prefills = [needed(prefill(rows(n, read), residents=others)) for n, read, _ in shapes]
    decodes = [needed(decode(rows(*shape))) for shape in shapes]
    assert model.prefill_bytes(requests, inputs, [residents]) == pytest.approx(prefills)
    assert model.decode_bytes(requests, inputs, outputs) == pytest.approx(decodes)
