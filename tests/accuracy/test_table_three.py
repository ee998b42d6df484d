"""Table III of Lazuka et al., 2024: which LLM fits on which GPU profile, foretold by the tuner's formulas.

A pair fits if the tuner finds a weight for requests of 874 input and 381 output tokens, the largest of the load tests.
Marks: ✓ measured, ✗ too little memory, – not tried. MPT and CodeGen2, whose repositories brought modelling code of
their own, fit exactly where they were measured if their weights are served in 32 bits, and in more places if in 16.
"""

import json
from pathlib import Path

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.memory_budget import LARGEST_INPUT_TOKENS, LARGEST_OUTPUT_TOKENS
from llmpilot_tuner.domain.defaults import default_reserved_bytes
from llmpilot_tuner.domain.plan import plan_of, predicted_weight
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.spec import TuningSpec

TABLE = json.loads(Path(__file__).parents[2].joinpath("libs/perfmodel/tests/data/table_iii.json").read_text())
REMOTE_CODE = ("ibm/mpt-7b-instruct2", "Salesforce/codegen2-16B")
MOST_USERS = 128
"""Of the load tests."""


def pairs(mark: str) -> list[tuple[str, str]]:
    return [
        (llm, profile)
        for llm, marks in TABLE["marks"].items()
        for profile, found in zip(TABLE["profiles"], marks, strict=True)
        if found == mark
    ]


def weight(llm: str, profile_name: str, *, most_requests: int = 1) -> int | None:
    """Return the weight that the formulas allow; None: none."""
    profile = load_catalogue().require(profile_name)
    spec = TuningSpec(
        config_json=bundled_config(llm),
        gpu_count=profile.gpu_count,
        gpu_memory_bytes=profile.gpu.usable_memory_bytes,
        reserved_bytes=default_reserved_bytes(ProbeKind.ANALYTIC, profile.gpu, profile.gpu_count),
        precision_name="fp32" if llm in REMOTE_CODE else "fp16",
        longest_sequence=LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS,
        most_new_tokens=LARGEST_OUTPUT_TOKENS,
        most_requests=most_requests,
    )
    try:
        return predicted_weight(plan_of(spec).problem)
    except PreconditionError:
        return None


def test_all_66_pairs_that_were_measured_fit() -> None:
    measured = pairs("✓")
    assert len(measured) == 66
    assert [pair for pair in measured if weight(*pair) is None] == []


def test_of_35_pairs_that_were_too_small_31_do_not_fit() -> None:
    """The four are T5s on 16 GB cards; see below."""
    too_small = pairs("✗")
    assert len(too_small) == 35
    assert {pair for pair in too_small if weight(*pair) is not None} == {
        ("google/flan-t5-xxl", "2xT4-16GB"),
        ("google/flan-t5-xxl", "2xV100-16GB"),
        ("google/flan-ul2", "4xT4-16GB"),
        ("google/flan-ul2", "4xV100-16GB"),
    }


def test_the_four_have_no_room_for_many_users() -> None:
    """TGIS weighs n x length^2, by which many short requests weigh as little as one long one and take far more memory.

    At the weight of one longest request, 1,255 squared, 128 short ones are too many for T5-XXL; UL2 has room for them,
    and for less than three of the longest.
    """
    for card in ("T4", "V100"):
        assert weight("google/flan-t5-xxl", f"2x{card}-16GB", most_requests=MOST_USERS) is None
        room = weight("google/flan-ul2", f"4x{card}-16GB", most_requests=MOST_USERS)
        assert room is not None
        assert room < 3 * 1255**2
