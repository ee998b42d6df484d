import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_perfmodel.memory import weights_memory

TABLE_III = json.loads((Path(__file__).parent / "data" / "table_iii.json").read_text())
"""Lazuka et al., 2024: ✓ measured, ✗ too little memory, – not tried."""


def verdicts(known_specs: dict[str, LlmSpec], mark: str) -> dict[tuple[str, str], bool]:
    catalogue = load_catalogue()
    return {
        (llm, name): weights_memory(known_specs[llm], catalogue.require(name)).fits
        for llm, marks in TABLE_III["marks"].items()
        for name, found in zip(TABLE_III["profiles"], marks, strict=True)
        if found == mark
    }


def test_no_pair_of_table_iii_that_was_measured_is_vetoed(known_specs: dict[str, LlmSpec]) -> None:
    measured = verdicts(known_specs, "✓")
    assert [pair for pair, fits in measured.items() if not fits] == []


def test_the_pairs_of_table_iii_that_were_too_small_are_vetoed_but_for_twelve(
    known_specs: dict[str, LlmSpec],
) -> None:
    """By hand, from billions of parameters: 7.6 fit into 16 GB, 11.4 into 24, 15.2 into 32, 19.0 into 40."""
    too_small = verdicts(known_specs, "✗")
    assert {pair for pair, fits in too_small.items() if fits} == {
        ("ibm/mpt-7b-instruct2", "1xT4-16GB"),
        ("ibm/mpt-7b-instruct2", "1xV100-16GB"),
        ("ibm/mpt-7b-instruct2", "1xA10-24GB"),
        ("meta-llama/Llama-2-7b", "1xT4-16GB"),
        ("google/flan-t5-xxl", "1xA10-24GB"),
        ("google/flan-t5-xxl", "2xT4-16GB"),
        ("google/flan-t5-xxl", "2xV100-16GB"),
        ("meta-llama/Llama-2-13b", "2xT4-16GB"),
        ("Salesforce/codegen2-16B", "1xA100-40GB"),
        ("google/flan-ul2", "2xA10-24GB"),
        ("google/flan-ul2", "4xT4-16GB"),
        ("google/flan-ul2", "4xV100-16GB"),
    }


def test_llama_8b_needs_its_parameters_twice_in_bytes() -> None:
    fit = weights_memory(parse_config(bundled_config("llama-3.1-8b")), load_catalogue().require("1xL4-24GB"))
    assert fit.needed_bytes == 16_060_522_496
    assert fit.available_bytes == 22_800_000_000
    assert fit.fits
    assert fit.explanation == ("16-bit weights take 16.1 GB, which fits into 22.8 GB (95 % of the memory of 1xL4-24GB)")


def test_llama_8b_does_not_fit_into_a_t4() -> None:
    fit = weights_memory(parse_config(bundled_config("llama-3.1-8b")), load_catalogue().require("1xT4-16GB"))
    assert not fit.fits
    assert "does not fit into 15.2 GB" in fit.explanation


@given(st.integers(10**6, 10**12))
def test_more_gpus_of_a_type_never_lose_the_fit(parameter_count: int) -> None:
    spec = replace(parse_config(bundled_config("llama-3.1-8b")), parameter_count=parameter_count)
    for fewer, more in pairwise(load_catalogue().profiles()):
        if fewer.gpu == more.gpu:
            assert weights_memory(spec, more).fits >= weights_memory(spec, fewer).fits


@pytest.mark.parametrize(("parameter_count", "fits"), [(7_600_000_000, True), (7_600_000_001, False)])
def test_the_limit_is_95_percent_of_the_memory(parameter_count: int, fits: bool) -> None:
    """2 bytes x 7,600,000,000 = .95 x 16 GB."""
    spec = replace(parse_config(bundled_config("llama-3.1-8b")), parameter_count=parameter_count)
    assert weights_memory(spec, load_catalogue().require("1xT4-16GB")).fits == fits
