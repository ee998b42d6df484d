from dataclasses import replace

import pytest

from llmpilot_perfmodel.llm_spec import LlmSpec

LLAMA = LlmSpec(
    model_type="llama",
    is_encoder_decoder=False,
    parameter_count=8_030_261_248,
    layer_count=32,
    head_count=32,
    vocabulary_size=128_256,
    max_position_count=131_072,
    uses_flash_attention=True,
    relative_attention_max_distance=None,
    relative_attention_bucket_count=None,
    torch_dtype="bfloat16",
)


def test_a_real_llm_has_no_violations() -> None:
    assert LLAMA.violations() == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_a_known_data_type_is_accepted(dtype: str) -> None:
    assert replace(LLAMA, torch_dtype=dtype).violations() == ()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (replace(LLAMA, model_type=""), "model_type"),
        (replace(LLAMA, model_type="a b"), "model_type"),
        (replace(LLAMA, parameter_count=999_999), "parameter_count"),
        (replace(LLAMA, parameter_count=10**13 + 1), "parameter_count"),
        (replace(LLAMA, layer_count=0), "layer_count"),
        (replace(LLAMA, layer_count=1001), "layer_count"),
        (replace(LLAMA, head_count=-1), "head_count"),
        (replace(LLAMA, vocabulary_size=10**7 + 1), "vocabulary_size"),
        (replace(LLAMA, max_position_count=0), "max_position_count"),
        (replace(LLAMA, relative_attention_max_distance=0), "relative_attention_max_distance"),
        (replace(LLAMA, relative_attention_bucket_count=-5), "relative_attention_bucket_count"),
        (replace(LLAMA, torch_dtype="int4"), "torch_dtype"),
    ],
)
def test_a_value_out_of_range_is_one_violation_of_its_field(wrong: LlmSpec, field: str) -> None:
    assert [violation.field for violation in wrong.violations()] == [field]


def test_every_violation_is_listed_at_once() -> None:
    wrong = replace(LLAMA, layer_count=0, head_count=0, torch_dtype="")
    assert [violation.field for violation in wrong.violations()] == ["layer_count", "head_count", "torch_dtype"]
