import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.gpu_catalogue import BYTES_PER_GIB, load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.memory_budget import VLLM_0_2, MemoryBudget, PagedServer, memory_budget
from llmpilot_perfmodel.precision import PRECISIONS
from llmpilot_perfmodel.sizes import LlmWork, llm_work

TABLE_III = json.loads((Path(__file__).parent / "data" / "table_iii.json").read_text())
"""Lazuka et al., 2024: ✓ measured, ✗ too little memory, – not tried."""
WORKLOAD_CHOICE_LLMS = {
    "llama2-7b": "Llama-2-7b",
    "llama2-13b": "Llama-2-13b",
    "opt-6.7b": "opt-6.7b",
    "opt-13b": "opt-13b",
}


def work(llm: str, gpu_count: int, precision: str = "fp16") -> LlmWork:
    return llm_work(parse_llm(bundled_config(llm)), gpu_count, PRECISIONS[precision])


def budget(
    llm: str,
    profile_name: str,
    *,
    prefill_tokens: int | None = None,
    paged: PagedServer | None = None,
) -> MemoryBudget:
    profile = load_catalogue().require(profile_name)
    llm_on_it = work(llm, profile.gpu_count)
    return memory_budget(llm_on_it, profile, prefill_tokens=prefill_tokens, paged=paged)


def pairs(mark: str) -> list[tuple[str, str]]:
    return [
        (llm, profile)
        for llm, marks in TABLE_III["marks"].items()
        for profile, found in zip(TABLE_III["profiles"], marks, strict=True)
        if found == mark
    ]


def test_every_pair_of_table_iii_that_was_measured_fits() -> None:
    assert len(pairs("✓")) == 66
    assert [pair for pair in pairs("✓") if not budget(*pair).fits] == []


def test_of_the_pairs_of_table_iii_that_were_too_small_all_but_eight_are_found() -> None:
    """The paper does not say why these eight were too small: their weights leave room for the largest request."""
    assert len(pairs("✗")) == 35
    assert {pair for pair in pairs("✗") if budget(*pair).fits} == {
        ("google/flan-t5-xxl", "2xT4-16GB"),
        ("google/flan-t5-xxl", "2xV100-16GB"),
        ("google/flan-ul2", "4xT4-16GB"),
        ("google/flan-ul2", "4xV100-16GB"),
        ("ibm/mpt-7b-instruct2", "1xA10-24GB"),
        ("ibm/mpt-7b-instruct2", "1xT4-16GB"),
        ("ibm/mpt-7b-instruct2", "1xV100-16GB"),
        ("Salesforce/codegen2-16B", "1xA100-40GB"),
    }


@pytest.mark.parametrize("paged", [None, PagedServer()])
@pytest.mark.parametrize("pair", pairs("✓") + pairs("✗"))
def test_the_lines_add_up_to_what_the_gpu_has(pair: tuple[str, str], paged: PagedServer | None) -> None:
    found = budget(*pair, paged=paged)
    assert sum(line.byte_count for line in found.lines) + found.cache_bytes == pytest.approx(found.usable_bytes)


def test_the_budget_of_llama_2_13b_is_as_computed_by_hand() -> None:
    """42.295 GB (39.39 GiB) - 26.032 - 1.836 (1.71 GiB) - .168 (874 x 32,000 x 6) = 14.259; 819,200 bytes a token."""
    found = budget("Llama-2-13b", "1xA100-40GB")
    assert found.cache_bytes == pytest.approx(14.259e9, rel=1e-3)
    assert found.token_count == pytest.approx(17_406, rel=1e-3)
    assert found.largest_batch_weight == pytest.approx((14.259e9 + 0.168e9) / 3 / 819_200, rel=1e-3)
    assert found.safe_batch_weight == found.largest_batch_weight * 65 // 100
    assert found.explain()[0] == "each GPU of 1xA100-40GB offers 42.29 GB"
    assert "26.03 GB weights: 13.02 billion parameters" in found.explain()[1]
    assert "takes 3 times its size" in found.explain()[-1]


def test_a_small_cache_leaves_the_limit_to_the_prefill() -> None:
    """By hand, starcoder, 1xA100: 42.295 - 31.034 - 1.836 = 9.425 GB over 20,480 + 49,152 x 6 bytes a token."""
    found = budget("starcoder", "1xA100-40GB")
    assert found.largest_batch_weight == pytest.approx(9.425e9 / (20_480 + 294_912), rel=2e-3)
    assert "logits" in found.limit
    assert budget("starcoder", "1xA100-40GB", prefill_tokens=874).largest_batch_weight > found.largest_batch_weight


def test_an_encoder_decoder_has_no_logits_of_its_prompt_but_attention_scores() -> None:
    """By hand, flan-t5-xxl: 64 heads x 874 x 874 x 6 bytes."""
    lines = {line.name: line.byte_count for line in budget("flan-t5-xxl", "1xA100-40GB").lines}
    assert lines["attention scores"] == 64 * 874 * 874 * 6
    assert "logits" not in lines


def test_t5_keeps_its_second_feed_forward_matrices_in_32_bits() -> None:
    """By hand, flan-t5-xxl: 48 matrices of 4,096 x 10,240, two bytes more each."""
    lines = {line.name: line.byte_count for line in budget("flan-t5-xxl", "1xA100-40GB").lines}
    assert lines["weights in 32 bits"] == 2 * 48 * 4_096 * 10_240


def test_vllm_blocks_of_four_llms_at_18_memory_shares_are_within_6(public_data: Path) -> None:
    """Papaioannou and Doudali, EuroMLSys '24: vLLM 0.2 on an A100 with 40 GB, max_num_seqs 2048."""
    with (public_data / "workload-choice" / "offline.csv").open() as file:
        shares = {(row["model"], float(row["memory_util"]), int(row["total_blocks"])) for row in csv.DictReader(file)}
    assert len(shares) == 18
    for llm, share, blocks in shares:
        server = replace(VLLM_0_2, max_num_seqs=2048, gpu_memory_utilization=share)
        found = budget(WORKLOAD_CHOICE_LLMS[llm], "1xA100-40GB", paged=server)
        assert found.block_count(16) == pytest.approx(blocks, abs=6), (llm, share)


def test_vllm_blocks_of_llama_8b_on_an_rtx_4090_are_within_one_percent(public_data: Path) -> None:
    """Source: casys-kaist/LLMServingSim, vLLM 0.19 with its defaults."""
    path = public_data / "layer-profiles" / "RTX4090" / "Llama-3.1-8B" / "vllm-run" / "meta.json"
    measured = json.loads(path.read_text())
    profile = load_catalogue().require("1xRTX4090-24GB")
    assert profile.gpu.usable_memory_bytes == pytest.approx(measured["hardware"]["device_total_memory_bytes"], rel=1e-3)
    found = memory_budget(work("Llama-3.1-8B", 1), profile, paged=PagedServer())
    assert found.block_count(16) == pytest.approx(measured["kv_cache"]["num_gpu_blocks"], rel=0.01)


def test_vllm_blocks_of_an_8_bit_70b_llm_on_an_h100_are_within_two_percent() -> None:
    """Source: vllm-project/vllm#12569, 1,381 blocks at .98 of an H100, with the defaults of vllm-project/vllm#12369."""
    server = PagedServer(gpu_memory_utilization=0.98, max_num_seqs=1024, max_num_batched_tokens=8192)
    profile = load_catalogue().require("1xH100-80GB")
    found = memory_budget(work("Llama-3.1-70B", 1, "int8"), profile, paged=server)
    assert found.block_count(16) == pytest.approx(1_381, rel=0.02)


def test_a_server_with_pages_may_use_all_of_them() -> None:
    found = budget("Llama-2-13b", "1xA100-40GB", paged=PagedServer())
    assert found.largest_batch_weight == found.safe_batch_weight == found.token_count
    assert found.block_count(16) == found.token_count // 16


def test_a_batch_weight_beyond_the_memory_is_refused_with_both_numbers() -> None:
    found = budget("Llama-2-13b", "1xA100-40GB")
    found.require_batch_weight(17_000)
    with pytest.raises(PreconditionError, match=r"20,000 tokens needs 16\.38 GB .*14\.\d\d GB are free"):
        found.require_batch_weight(20_000)


def test_weights_alone_beyond_the_memory_leave_nothing() -> None:
    found = budget("gpt-neox-20b", "1xT4-16GB")
    assert (found.fits, found.token_count, found.largest_batch_weight, found.safe_batch_weight) == (False, 0, 0, 0)
    assert "0 tokens" in found.explain()[-2]


def test_wrong_settings_and_sizes_for_another_number_of_gpus_are_told_at_once() -> None:
    server = PagedServer(gpu_memory_utilization=1.5, max_num_seqs=0, max_num_batched_tokens=-1)
    with pytest.raises(InvalidInputError) as caught:
        memory_budget(work("Llama-2-7b", 2), load_catalogue().require("1xT4-16GB"), prefill_tokens=0, paged=server)
    assert [violation.field for violation in caught.value.violations] == [
        "gpu_memory_utilization",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_count",
        "prefill_tokens",
    ]


@given(st.floats(10, 200), st.floats(10, 200))
def test_more_memory_is_never_less_room(first: float, second: float) -> None:
    smaller, larger = sorted((first, second))
    profile = load_catalogue().require("2xA100-40GB")
    found = [
        memory_budget(
            work("Llama-2-13b", 2),
            replace(profile, gpu=replace(profile.gpu, usable_memory_gib=gib)),
        )
        for gib in (smaller, larger)
    ]
    assert found[0].largest_batch_weight <= found[1].largest_batch_weight
    assert found[0].usable_bytes == round(smaller * BYTES_PER_GIB)
    assert all(one.safe_batch_weight <= one.largest_batch_weight <= one.token_count for one in found)
