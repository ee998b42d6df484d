import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 512,
    "d_ff": 2048,
    "d_kv": 64,
    "num_heads": 8,
    "num_layers": 6,
    "vocab_size": 32128,
}


OPTIONAL = (
    *("text_config", "head_dim", "num_experts", "num_experts_per_tok", "first_k_dense_replace", "kv_lora_rank"),
    *("multi_query", "sliding_window", "sliding_window_pattern", "layer_types", "max_window_layers"),
    *("use_sliding_window", "quantization_config"),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def violations(text: str) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        parse_config(text)
    return {violation.field: violation.description for violation in caught.value.violations}


def violations_of(config: dict[str, Any], **changes: Any) -> dict[str, str]:
    return violations(json.dumps(config | changes))


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_the_parameter_count_is_the_published_one_to_one_percent(known_llm: tuple[LlmSpec, int]) -> None:
    spec, published_count = known_llm
    assert spec.parameter_count == pytest.approx(published_count, rel=0.01)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("google/flan-t5-xl", (False, True, 512, 32, 24, 128, 32, "float32", 32128)),
        ("google/flan-t5-xxl", (False, True, None, 64, 24, 128, 32, "float32", 32128)),
        ("google/flan-ul2", (False, True, 512, 16, 32, 128, 32, "bfloat16", 32128)),
        ("ibm/mpt-7b-instruct2", (False, False, None, 32, 32, None, None, "bfloat16", 50432)),
        ("bigscience/mt0-xxl", (False, True, None, 64, 24, 128, 32, "float32", 250112)),
        ("Salesforce/codegen2-16B", (False, False, 2048, 24, 34, None, None, "float32", 51200)),
        ("EleutherAI/gpt-neox-20b", (True, False, 2048, 64, 44, None, None, "float16", 50432)),
        ("bigcode/starcoder", (True, False, 8192, 48, 40, None, None, "float32", 49152)),
    ],
)
def test_the_features_are_the_published_ones(
    known_specs: dict[str, LlmSpec], name: str, features: tuple[object, ...]
) -> None:
    """Source: llm_features.csv of IBM/LLM-performance-prediction."""
    spec = known_specs[name]
    assert features == (
        spec.uses_flash_attention,
        spec.is_encoder_decoder,
        spec.max_position_count,
        spec.head_count,
        spec.layer_count,
        spec.relative_attention_max_distance,
        spec.relative_attention_bucket_count,
        spec.torch_dtype,
        spec.vocabulary_size,
    )


def test_the_language_part_of_a_multimodal_config_is_read() -> None:
    nested = {"model_type": "llava", "torch_dtype": "float16", "text_config": without(LLAMA, "torch_dtype")}
    spec = parse_config(json.dumps(nested))
    assert (spec.model_type, spec.parameter_count, spec.torch_dtype) == ("llama", 8_030_261_248, "float16")


def test_dtype_is_accepted_for_torch_dtype() -> None:
    config = without(LLAMA, "torch_dtype") | {"dtype": "float16"}
    assert parse_config(json.dumps(config)).torch_dtype == "float16"


def test_an_absent_data_type_is_float32() -> None:
    assert parse_config(json.dumps(without(LLAMA, "torch_dtype"))).torch_dtype == "float32"


def test_an_unknown_family_is_counted_like_llama() -> None:
    spec = parse_config(json.dumps(LLAMA | {"model_type": "brand_new"}))
    assert (spec.model_type, spec.parameter_count) == ("brand_new", 8_030_261_248)


def test_a_quantization_nobody_knows_does_not_hide_the_features() -> None:
    spec = parse_config(json.dumps(LLAMA | {"quantization_config": {"quant_method": "brand_new"}}))
    assert spec.parameter_count == 8_030_261_248


def test_null_is_read_as_absent() -> None:
    spec = parse_config(json.dumps(LLAMA | {"max_position_embeddings": None, "head_dim": None}))
    assert spec.max_position_count is None


def test_a_tied_embedding_is_counted_once() -> None:
    """The two counts differ by one embedding, vocabulary x hidden size."""
    untied, tied = (parse_config(json.dumps(LLAMA | {"tie_word_embeddings": tie})) for tie in (False, True))
    assert untied.parameter_count - tied.parameter_count == 128256 * 4096


@pytest.mark.parametrize("text", ["", "{", "model_type: llama", '{"a": }', "\ufeff{}"])
def test_text_that_is_not_json_is_rejected_with_the_position(text: str) -> None:
    description = violations(text)["config_json"]
    assert "is not JSON" in description
    assert "line 1, column" in description


@pytest.mark.parametrize("text", ["[]", "3", '"llama"', "null", "true", "NaN"])
def test_json_that_is_not_an_object_is_rejected(text: str) -> None:
    assert "must be a JSON object" in violations(text)["config_json"]


@pytest.mark.parametrize("text", ["[" * 500_000, '{"a":' * 200_000])
def test_a_nesting_bomb_is_rejected(text: str) -> None:
    assert violations(text) == {"config_json": "is nested too deeply to be a config.json"}


def test_a_number_of_thousands_of_digits_is_rejected() -> None:
    assert violations('{"vocab_size": ' + "9" * 5000 + "}") == {"config_json": "holds a number with too many digits"}


def test_a_text_of_megabytes_is_rejected() -> None:
    assert "must be at most 1,000,000 characters" in violations(" " * 1_000_001)["config_json"]


def test_a_key_that_appears_twice_is_rejected() -> None:
    assert violations('{"vocab_size": 1, "vocab_size": 2}') == {"config_json.vocab_size": "appears more than once"}


def test_every_missing_field_is_named_with_its_accepted_names() -> None:
    found = violations("{}")
    assert set(found) == {
        "config_json.model_type",
        "config_json.hidden_size",
        "config_json.num_attention_heads",
        "config_json.num_hidden_layers",
        "config_json.intermediate_size",
        "config_json.vocab_size",
    }
    assert "n_layer, n_layers, num_layers" in found["config_json.num_hidden_layers"]


def test_every_missing_field_of_a_t5_is_named() -> None:
    assert set(violations('{"model_type": "t5"}')) == {
        "config_json.num_layers",
        "config_json.hidden_size",
        "config_json.num_attention_heads",
        "config_json.d_kv",
        "config_json.intermediate_size",
        "config_json.vocab_size",
    }


@pytest.mark.parametrize(
    "literal",
    ["0", "-1", "1e400", "NaN", "Infinity", "-Infinity", '"32"', "true", "false", "32.0", "[32]", "{}", "1001"],
)
def test_a_wrong_layer_count_is_rejected(literal: str) -> None:
    text = json.dumps(LLAMA).replace('"num_hidden_layers": 32', f'"num_hidden_layers": {literal}')
    assert list(violations(text)) == ["config_json.num_hidden_layers"]


def test_wrong_values_of_every_kind_are_listed_at_once() -> None:
    found = violations_of(
        LLAMA,
        hidden_size=0,
        num_attention_heads="32",
        vocab_size=10**9,
        tie_word_embeddings="yes",
        torch_dtype=16,
        max_position_embeddings=-1,
    )
    assert set(found) == {
        f"config_json.{key}"
        for key in (
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "tie_word_embeddings",
            "torch_dtype",
            "max_position_embeddings",
        )
    }


@pytest.mark.parametrize("model_type", ["", "a b", "x" * 65, 7, ["llama"]])
def test_a_model_type_that_is_no_name_is_rejected(model_type: object) -> None:
    assert list(violations_of(LLAMA, model_type=model_type)) == ["config_json.model_type"]


def test_an_unknown_data_type_is_rejected() -> None:
    assert list(violations_of(LLAMA, torch_dtype="int4")) == ["config_json.torch_dtype"]


def test_more_parameters_than_any_llm_has_are_rejected() -> None:
    assert list(violations_of(LLAMA, hidden_size=999_424, intermediate_size=10**6)) == ["config_json.parameter_count"]


def test_fewer_parameters_than_any_llm_has_are_rejected() -> None:
    tiny = {"hidden_size": 8, "num_attention_heads": 8, "intermediate_size": 8, "vocab_size": 8}
    assert list(violations_of(LLAMA, **tiny)) == ["config_json.parameter_count"]


def test_key_value_heads_that_do_not_divide_the_heads_are_rejected() -> None:
    assert list(violations_of(LLAMA, num_key_value_heads=5)) == ["config_json.num_key_value_heads"]


def test_a_hidden_size_that_the_heads_do_not_divide_is_rejected() -> None:
    assert list(violations_of(LLAMA, hidden_size=4097)) == ["config_json.hidden_size"]


def test_an_encoder_decoder_other_than_t5_is_rejected() -> None:
    assert list(violations_of(LLAMA, is_encoder_decoder=True)) == ["config_json.is_encoder_decoder"]


def test_layers_of_mixed_shapes_are_rejected_rather_than_miscounted() -> None:
    assert list(violations_of(LLAMA, mamba_d_state=16)) == ["config_json.mamba_d_state"]


def test_a_text_config_that_is_no_object_is_rejected() -> None:
    assert list(violations_of(LLAMA, text_config="llama")) == ["config_json.text_config"]


@given(
    st.dictionaries(
        st.sampled_from([*LLAMA, *T5, *OPTIONAL]),
        SCALARS | st.lists(st.integers(), max_size=2),
    ),
    st.sampled_from([LLAMA, T5]),
)
def test_any_object_is_either_a_valid_spec_or_invalid_input(changes: dict[str, Any], config: dict[str, Any]) -> None:
    try:
        found = parse_config(json.dumps(config | changes)).violations()
    except InvalidInputError as error:
        found = error.violations
        str(error).encode()  # a lone surrogate in a message could not travel
        if found and all(violation.field.startswith("config_json") for violation in found):
            return
    assert found == ()


@given(st.text())
def test_any_text_that_is_no_config_is_invalid_input(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_config(text)


@given(st.integers(1, 500))
def test_parameters_grow_linearly_with_layers(layer_count: int) -> None:
    """A Llama-3.1-8B layer: 41,943,040 attention, 176,160,768 feed-forward and 8,192 norm weights."""
    one, more = (parse_config(json.dumps(LLAMA | {"num_hidden_layers": n})) for n in (1, layer_count))
    assert more.parameter_count - one.parameter_count == (layer_count - 1) * 218_112_000
