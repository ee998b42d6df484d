from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import GpuProfile, load_catalogue
from llmpilot_recommender.features import FeatureSchema
from llmpilot_recommender.measured_llms import load_measured_llms

LLAMA = load_measured_llms()["llama-13b"].spec
T5 = load_measured_llms()["google/flan-t5-xl"].spec
CATALOGUE = load_catalogue()
A100 = CATALOGUE.require("2xA100-40GB")
H100 = CATALOGUE.require("1xH100-80GB")
SCHEMA = FeatureSchema.covering([LLAMA, T5], [A100, H100])


def columns(row: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(SCHEMA.names, row.tolist(), strict=True))


def test_row_holds_the_published_figures() -> None:
    # Values of llm_features.csv, of the A100's datasheet, and of the profile: 2 GPUs of 40 GB.
    row = columns(SCHEMA.encode(LLAMA, [A100], [16])[0])
    expected = {
        "parameter_count": 13e9,
        "is_encoder_decoder": 0,
        "layer_count": 40,
        "head_count": 40,
        "vocabulary_size": 32000,
        "max_position_count": 2048,
        "uses_flash_attention": 1,
        "model_type=llama": 1,
        "model_type=t5": 0,
        "torch_dtype=float16": 1,
        "torch_dtype=float32": 0,
        "architecture=Ampere": 1,
        "architecture=Hopper": 0,
        "cuda_core_count": 6912,
        "sm_count": 108,
        "tensor_fp16_tflops": 312,
        "memory_bandwidth_gb_per_second": 1555,
        "gpu_count": 2,
        "total_memory_bytes": 80e9,
        "memory_bytes": 40e9,
        "users_count": 16,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # float32


def test_number_nobody_published_is_nan() -> None:
    row = columns(SCHEMA.encode(replace(LLAMA, max_position_count=None), [A100], [1])[0])
    missing = {name for name, value in row.items() if np.isnan(value)}
    assert {"max_position_count", "relative_attention_max_distance", "relative_attention_bucket_count"} < missing
    assert "cuda_mixed_tflops" in missing  # the published table has no such figure for the A100
    assert not any("=" in name for name in missing)


def test_unknown_categories_are_all_zeros() -> None:
    unseen = replace(LLAMA, model_type="mamba", torch_dtype="bfloat16")
    row = columns(SCHEMA.encode(unseen, [CATALOGUE.require("1xB200-180GB")], [1])[0])
    assert {name: value for name, value in row.items() if "=" in name and value} == {}


def test_users_vary_fastest_then_profiles() -> None:
    rows = SCHEMA.encode(LLAMA, [A100, H100], [1, 8, 64])
    assert rows.shape == (6, len(SCHEMA.names))
    assert rows.dtype == np.float32
    users, gpus = SCHEMA.names.index("users_count"), SCHEMA.names.index("gpu_count")
    assert rows[:, users].tolist() == [1, 8, 64, 1, 8, 64]
    assert rows[:, gpus].tolist() == [2, 2, 2, 1, 1, 1]


def test_no_profiles_give_no_rows() -> None:
    assert SCHEMA.encode(LLAMA, [], [1, 2]).shape == (0, len(SCHEMA.names))


def test_every_name_is_there_once_and_users_last() -> None:
    assert len(set(SCHEMA.names)) == len(SCHEMA.names)
    assert SCHEMA.names[-1] == "users_count"
    assert [name for name in SCHEMA.names if "=" in name] == [
        "model_type=llama",
        "model_type=t5",
        "torch_dtype=float16",
        "torch_dtype=float32",
        "architecture=Ampere",
        "architecture=Hopper",
    ]


def test_only_users_are_monotone() -> None:
    assert SCHEMA.monotone_constraints() == "(" + "0," * (len(SCHEMA.names) - 1) + "1)"


@given(
    st.permutations(SCHEMA.names),
    st.lists(st.sampled_from(CATALOGUE.profiles()), min_size=1, max_size=3),
    st.lists(st.integers(1, 128), min_size=1, max_size=3),
)
def test_names_alone_rebuild_the_columns_in_their_order(
    names: list[str], profiles: list[GpuProfile], users_counts: list[int]
) -> None:
    rebuilt = FeatureSchema.from_names(names)
    assert rebuilt.names == tuple(names)
    rows, reordered = (schema.encode(T5, profiles, users_counts) for schema in (SCHEMA, rebuilt))
    assert np.array_equal(rows, reordered[:, [names.index(name) for name in SCHEMA.names]], equal_nan=True)


def test_all_unknown_missing_and_repeated_names_are_refused_at_once() -> None:
    kept = [name for name in SCHEMA.names if name not in {"sm_count", "users_count"}]
    with pytest.raises(InvalidInputError) as caught:
        FeatureSchema.from_names([*kept, kept[0], "colour", "price=high"])
    text = str(caught.value)
    assert len(caught.value.violations) == 5
    for part in ("'colour' is unknown", "'price=high' is unknown", "'sm_count' is missing", "'users_count' is missing"):
        assert part in text
    assert "repeated" in text


@pytest.mark.parametrize("wrong", ["model_type", "architecture"])
def test_category_without_a_value_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match="unknown"):
        FeatureSchema.from_names([*SCHEMA.names, wrong])


@pytest.mark.parametrize("wrong", ["users_count=3", "gpu_count=2"])
def test_number_with_a_value_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match="unknown"):
        FeatureSchema.from_names([*SCHEMA.names, wrong])
