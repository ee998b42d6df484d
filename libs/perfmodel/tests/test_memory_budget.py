import json
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.memory_budget import MemoryBudget, memory_budget
from llmpilot_perfmodel.precision import PRECISIONS
from llmpilot_perfmodel.sizes import llm_work

DATA = Path(__file__).parent / "data"
KNOWN = json.loads((DATA / "known_llms.json").read_text())
TABLE_III = json.loads((DATA / "table_iii.json").read_text())
"""Lazuka et al., 2024: ✓ measured, ✗ too little memory, – not tried."""


def budget(llm: str, profile_name: str, *, is_paged: bool = False) -> MemoryBudget:
    profile = load_catalogue().require(profile_name)
    config = parse_llm(json.dumps(KNOWN[llm]["config"]))
    return memory_budget(llm_work(config, profile.gpu_count, PRECISIONS["fp16"]), profile, is_paged=is_paged)


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
    assert len(pairs("✗")) == 35
    assert {pair for pair in pairs("✗") if budget(*pair).fits} == {
        ("google/flan-t5-xxl", "2xT4-16GB"),
        ("google/flan-t5-xxl", "2xV100-16GB"),
        ("google/flan-ul2", "4xT4-16GB"),
        ("google/flan-ul2", "4xV100-16GB"),
        ("ibm/mpt-7b-instruct2", "1xA10-24GB"),
        ("Salesforce/codegen2-16B", "1xA100-40GB"),
        ("meta-llama/Llama-2-7b", "1xT4-16GB"),
        ("meta-llama/Llama-2-13b", "2xT4-16GB"),
    }


@pytest.mark.parametrize("pair", pairs("✓") + pairs("✗"))
def test_the_lines_add_up_to_what_the_gpu_has(pair: tuple[str, str]) -> None:
    found = budget(*pair)
    assert sum(line.byte_count for line in found.lines) + found.cache_bytes == pytest.approx(found.usable_bytes)


def test_the_budget_of_llama_2_13b_is_as_computed_by_hand() -> None:
    """42.295 GB - 26.032 weights - .537 - .231 (1868 x 2 x (4 x 5120 + 3 x 13824)) = 15.495 GB; 819,200 B a token."""
    found = budget("meta-llama/Llama-2-13b", "1xA100-40GB")
    assert found.cache_bytes == pytest.approx(15.495e9, rel=1e-3)
    assert found.token_count == pytest.approx(18_914, rel=1e-3)
    assert found.largest_batch_weight == found.token_count // 3
    assert found.explain()[0] == "each GPU of 1xA100-40GB offers 42.29 GB"
    assert "26.03 GB weights: 13.02 billion parameters" in found.explain()[1]


def test_a_server_with_pages_counts_blocks() -> None:
    """As above, less 1 GiB of graphs: 14.421 GB are 17,604 tokens, 1,100 blocks of 16."""
    assert budget("meta-llama/Llama-2-13b", "1xA100-40GB", is_paged=True).block_count(16) == pytest.approx(1_100, abs=1)


def test_a_batch_weight_beyond_the_memory_is_refused_with_both_numbers() -> None:
    found = budget("meta-llama/Llama-2-13b", "1xA100-40GB")
    found.require_batch_weight(18_000)
    with pytest.raises(PreconditionError, match=r"20,000 tokens needs 16\.38 GB .*15\.\d\d GB are free"):
        found.require_batch_weight(20_000)


def test_weights_alone_beyond_the_memory_leave_nothing() -> None:
    found = budget("EleutherAI/gpt-neox-20b", "1xT4-16GB")
    assert (found.fits, found.token_count, found.largest_batch_weight) == (False, 0, 0)


def test_sizes_for_another_number_of_gpus_are_refused() -> None:
    work = llm_work(parse_llm(json.dumps(KNOWN["meta-llama/Llama-2-7b"]["config"])), 2)
    with pytest.raises(InvalidInputError, match="1xT4-16GB has 1, the sizes 2"):
        memory_budget(work, load_catalogue().require("1xT4-16GB"))
