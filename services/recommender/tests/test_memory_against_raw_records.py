"""The memory budget against the batches that real servers ran, rebuilt from the raw records' token timestamps.

The servers' maximum batch weights were tuned but not published. Where more users no longer made the batch larger, the
largest batch seen is that weight; and each error of CUDA says how large a cache was asked for, which is the batch too.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pytest

from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.memory_budget import MemoryBudget, memory_budget
from llmpilot_perfmodel.precision import PRECISIONS
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_recommender.published import gpu_profile_name
from llmpilot_recommender.raw_source import raw_csvs

NAMES = {
    "llama-7b": "Llama-2-7b",
    "llama-13b": "Llama-2-13b",
    "EleutherAI/gpt-neox-20b": "gpt-neox-20b",
    "bigcode/starcoder": "starcoder",
}
"""The LLMs whose servers batch without padding, and the bundled ones that they are."""
COLUMNS = {
    "model": pa.string(),
    "n_gpus": pa.string(),
    "gpu_type": pa.string(),
    "num_users": pa.int64(),
    "smpnum": pa.int64(),
    "n_input_tokens": pa.float64(),
    "end_timestamp": pa.float64(),
    "timestamps_per_token": pa.string(),
    "errors": pa.string(),
}
ASKED = re.compile(r"CUDA out of memory. Tried to allocate ([\d.]+) ([GM])iB")
BYTES = {"G": 2**30, "M": 2**20}

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What one file of raw records says of memory."""

    llm: str
    profile_name: str
    users_count: int
    request_count: int
    failed_count: int
    """Requests that failed for want of GPU memory."""
    largest_batch: int
    """Tokens."""
    asked_bytes: float
    """The largest cache that was asked for in vain."""


def columns_of(content: bytes) -> pa.Table:
    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=COLUMNS, include_columns=list(COLUMNS)),
    )


def largest_batch(table: pa.Table, input_tokens: npt.NDArray[np.float64]) -> int:
    """The most input and output tokens that requests held at once, from their first token to their end."""
    times, changes = [], []
    ends = table["end_timestamp"].to_numpy()
    for row, text in enumerate(table["timestamps_per_token"].to_pylist()):
        tokens = json.loads(text)[1:]  # the first message comes before the first token
        if tokens:
            times += [*tokens, max(ends[row], tokens[-1]) + 0.5]
            first = input_tokens[row] + 1
            changes += [first, *[1.0] * (len(tokens) - 1), -(first + len(tokens) - 1)]
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(np.array(changes)[order]).max())


@pytest.fixture(scope="module")
def load_tests(public_data: Path) -> list[LoadTest]:
    files, _ = raw_csvs(public_data / "llm-pilot" / "performance_characterization_data_raw.tar.xz")
    wanted = re.compile("|".join(llm.replace("/", "__") for llm in NAMES))
    tables = [columns_of(content) for name, content in files if wanted.search(name)]
    input_tokens = np.zeros(1 + max(table["smpnum"].to_numpy().max() for table in tables))
    for table in tables:  # a failed request does not say how long its prompt was, its number does
        counted = table.filter(table["n_input_tokens"].is_valid())
        input_tokens[counted["smpnum"].to_numpy()] = counted["n_input_tokens"].to_numpy()
    found = []
    for table in tables:
        asked = [match for text in table["errors"].to_pylist() if text and (match := ASKED.search(text))]
        found.append(
            LoadTest(
                llm=table["model"][0].as_py(),
                profile_name=gpu_profile_name(table["n_gpus"][0].as_py(), table["gpu_type"][0].as_py()),
                users_count=table["num_users"][0].as_py(),
                request_count=len(table),
                failed_count=len(asked),
                largest_batch=largest_batch(table, input_tokens[table["smpnum"].to_numpy()]),
                asked_bytes=max((float(match[1]) * BYTES[match[2]] for match in asked), default=0.0),
            )
        )
    return found


def budget_of(test: LoadTest) -> MemoryBudget:
    profile = load_catalogue().require(test.profile_name)
    work = llm_work(parse_llm(bundled_config(NAMES[test.llm])), profile.gpu_count, PRECISIONS["fp16"])
    return memory_budget(work, profile)


def has_failed(test: LoadTest) -> bool:
    return test.failed_count > 0.01 * test.request_count


def tuned_weights(load_tests: list[LoadTest]) -> dict[Pair, tuple[int, MemoryBudget]]:
    """The largest batch of each pair whose batch no longer grew with twice the users (6 %), or failed too often to."""
    by_pair: defaultdict[Pair, dict[int, LoadTest]] = defaultdict(dict)
    for test in load_tests:
        by_pair[test.llm, test.profile_name][test.users_count] = test
    found = {}
    for pair, by_users in by_pair.items():
        most, fewer = by_users.get(128), by_users.get(64)
        if most is None or fewer is None:
            continue
        has_stopped = abs(most.largest_batch / fewer.largest_batch - 1) <= 0.06
        if has_stopped or most.failed_count > 0.1 * most.request_count:
            found[pair] = max(test.largest_batch for test in by_users.values()), budget_of(most)
    return found


def test_20_of_262_load_tests_ran_out_of_memory(load_tests: list[LoadTest]) -> None:
    assert (len(load_tests), sum(has_failed(test) for test in load_tests)) == (262, 20)


def test_the_cache_that_a_single_gpu_could_not_give_is_that_of_the_largest_batch(load_tests: list[LoadTest]) -> None:
    """CUDA's own numbers confirm the bytes per token of four LLMs, and the batches as rebuilt."""
    largest: defaultdict[Pair, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for test in load_tests:
        if test.failed_count and test.profile_name.startswith("1x"):
            pair = test.llm, test.profile_name
            asked, batch = largest[pair]
            tokens = test.asked_bytes / budget_of(test).kv_bytes_per_token
            largest[pair] = max(asked, tokens), max(batch, test.largest_batch)
    assert len(largest) == 7
    for pair, (asked, batch) in largest.items():
        assert asked == pytest.approx(batch, rel=0.015), pair


def test_the_tuned_batch_weights_are_found_within_a_fifth(load_tests: list[LoadTest]) -> None:
    tuned = tuned_weights(load_tests)
    errors = {pair: budget.largest_batch_weight / weight - 1 for pair, (weight, budget) in tuned.items()}
    assert len(errors) == 13
    assert {pair: error for pair, error in errors.items() if abs(error) > 0.21} == {}
    assert mean(abs(error) for error in errors.values()) < 0.08


def test_no_load_test_whose_batch_stayed_below_the_safe_weight_ran_out_of_memory(load_tests: list[LoadTest]) -> None:
    below = [test for test in load_tests if test.largest_batch <= budget_of(test).safe_batch_weight]
    assert len(below) == 206
    assert [test for test in below if has_failed(test)] == []


def test_a_third_of_those_above_the_safe_weight_did(load_tests: list[LoadTest]) -> None:
    above = [test for test in load_tests if test.largest_batch > budget_of(test).safe_batch_weight]
    assert sum(has_failed(test) for test in above) == 20
    assert len(above) == 56
