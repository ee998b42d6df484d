import json
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import PRECISIONS
from llmpilot_perfmodel.sizes import LlmWork, llm_work

KNOWN = json.loads((Path(__file__).parent / "data" / "known_llms.json").read_text())


def work(name: str, gpu_count: int = 1, precision: str = "bf16", kv_bits: int | None = None) -> LlmWork:
    config = parse_llm(json.dumps(KNOWN[name]["config"]))
    return llm_work(config, gpu_count, PRECISIONS[precision], kv_bits=kv_bits)


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 12.9, 0.01),
        ("Qwen/Qwen3-30B-A3B", 3.3, 0.02),
        ("deepseek-ai/DeepSeek-V3", 37.0, 0.02),
    ],
)
def test_active_parameters_are_as_published(name: str, billions: float, tolerance: float) -> None:
    assert work(name).active_parameter_count / 1e9 == pytest.approx(billions, rel=tolerance)


def test_active_parameters_of_gpt_oss_are_as_published_without_the_input_embedding() -> None:
    """Its model card counts 3.61 billion, unembeddings included; the embedding is 201088 x 2880."""
    assert work("openai/gpt-oss-20b").active_parameter_count - 201_088 * 2_880 == pytest.approx(3.61e9, rel=0.01)


def test_gpt_oss_120b_is_as_large_as_its_model_card_says() -> None:
    """Source: arXiv 2508.10925, table 1: 116.83 and, without the embedding, 5.13 billion parameters, 60.8 GiB."""
    llm = llm_work(parse_llm(bundled_config("gpt-oss-120b")), 1)
    assert llm.parameter_count == pytest.approx(116.83e9, rel=0.001)
    assert llm.active_parameter_count - 201_088 * 2_880 == pytest.approx(5.13e9, rel=0.01)
    assert llm.weight_bytes / 2**30 == pytest.approx(60.8, rel=0.005)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("meta-llama/Llama-3.1-8B", 2 * 32 * 8 * 128 * 2),
        ("meta-llama/Llama-2-13b", 2 * 40 * 40 * 128 * 2),
        ("bigcode/starcoder", 2 * 40 * 1 * 128 * 2),
        ("deepseek-ai/DeepSeek-V3", 61 * (512 + 64) * 2),
        ("google/flan-t5-xxl", 2 * 24 * 64 * 64 * 2),
    ],
)
def test_the_cache_of_a_token_is_as_computed_by_hand(name: str, by_hand: int) -> None:
    assert work(name).kv_bytes_per_token == by_hand


def test_an_8_bit_cache_is_half_as_large() -> None:
    assert work("meta-llama/Llama-3.1-8B", kv_bits=8).kv_bytes_per_token == 65_536


def test_layers_with_a_sliding_window_keep_its_tokens_only() -> None:
    """By hand: gemma-2-9b keeps 42 x 2 x 8 x 256 x 2 = 344,064 bytes a token; 21 of 42 layers stop at 4,096."""
    gemma = work("google/gemma-2-9b")
    assert gemma.kv_bytes(1_000) == 344_064 * 1_000
    assert gemma.kv_bytes(10_000) == 172_032 * (10_000 + 4_096)


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 32),
        ({"model_type": "phi3", "sliding_window": 2047}, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "gemma2", "sliding_window": 4096}, 16),
        ({"model_type": "gemma3_text", "sliding_window": 1024}, 27),
        ({"model_type": "gemma3_text", "sliding_window": 1024, "sliding_window_pattern": 4}, 24),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 4),
        (
            {
                "model_type": "gpt_oss",
                "sliding_window": 128,
                "layer_types": ["full_attention", "sliding_attention"] * 16,
            },
            16,
        ),
    ],
)
def test_a_family_says_how_many_of_32_layers_have_the_window(changes: dict[str, object], windowed: int) -> None:
    """By hand, from the rules in Hugging Face's transformers: each 6th layer of gemma3 sees everything, 5 of 32."""
    config = KNOWN["meta-llama/Llama-3.1-8B"]["config"] | changes
    window = llm_work(parse_llm(json.dumps(config)), 1).window
    assert (window.layer_share * 32 if window else 0) == windowed


def test_a_window_that_the_config_turns_off_is_ignored() -> None:
    config = KNOWN["Qwen/Qwen2.5-7B"]["config"] | {"sliding_window": 131_072, "use_sliding_window": False}
    assert llm_work(parse_llm(json.dumps(config)), 1).window is None


def test_layer_types_say_which_layers_have_the_window() -> None:
    window = llm_work(parse_llm(bundled_config("gpt-oss-20b")), 1).window
    assert window is not None
    assert (window.token_count, window.layer_share) == (128, 0.5)


@pytest.mark.parametrize("name", [name for name in KNOWN if "experts_per_tok" not in str(KNOWN[name])])
def test_a_dense_decoder_token_costs_about_two_flops_per_parameter(name: str) -> None:
    """Input embeddings cost nothing: down to .86 of 2 x parameters where the vocabulary is large; T5 passes half."""
    llm = work(name)
    ratio = llm.decode_flops_per_token / (2 * llm.parameter_count)
    if llm.encoder_layer_count:
        assert 0.45 < ratio < 0.65
    else:
        assert 0.89 < ratio <= 1.0


def test_attention_flops_of_a_pair_are_four_times_the_width_of_all_heads() -> None:
    """Llama-2-7b: 4 x 32 layers x 32 heads x 128."""
    llm = work("meta-llama/Llama-2-7b")
    assert llm.prefill_attention_flops_per_pair == llm.decode_attention_flops_per_pair == 4 * 32 * 32 * 128


def test_two_gpus_have_half_the_weights_each_but_for_the_norms() -> None:
    """Llama-2-7b has 65 norms of 4,096."""
    one, two = work("meta-llama/Llama-2-7b"), work("meta-llama/Llama-2-7b", 2)
    assert 2 * two.weight_bytes - one.weight_bytes == 65 * 4_096 * 2


def test_more_gpus_than_key_value_heads_keep_copies() -> None:
    """Starcoder has one key/value head of 128: each GPU keeps its cache and its projection, 2 x 6144 x 128 x 40."""
    one, four = work("bigcode/starcoder"), work("bigcode/starcoder", 4)
    assert four.kv_bytes_per_token == one.kv_bytes_per_token
    norms = (2 * 40 + 1) * 2 * 6_144
    copied = 2 * 6_144 * 128 * 40
    assert 4 * four.weight_bytes - one.weight_bytes == pytest.approx(3 * 2 * (norms + copied))


@pytest.mark.parametrize(("precision", "gigabytes"), [("fp32", 32.12), ("fp8", 9.08), ("int8", 9.08), ("int4", 5.73)])
def test_quantized_weights_are_smaller_but_for_embeddings_and_norms(precision: str, gigabytes: float) -> None:
    """By hand, Llama-3.1-8B: 1.051 billion in 16 bits, 6.979 billion in 32, 8 or 4 + 20/128 bits."""
    assert work("meta-llama/Llama-3.1-8B", precision=precision).weight_bytes / 1e9 == pytest.approx(
        gigabytes, rel=0.002
    )


def test_a_quantized_config_says_so() -> None:
    """By hand: 671 GB of 8-bit weights and 2 x 129280 x 7168 more bytes of embeddings in 16."""
    config = parse_llm(bundled_config("DeepSeek-V3"))
    assert config.precision.name == "fp8"
    assert llm_work(config, 1).weight_bytes / 1e9 == pytest.approx(671.0 + 1.85, rel=0.005)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "awq", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "fp8"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "int4",
        ),
    ],
)
def test_every_usual_quantization_config_is_understood(quantization: dict[str, object], name: str) -> None:
    config = KNOWN["meta-llama/Llama-3.1-8B"]["config"] | {"quantization_config": quantization}
    assert parse_llm(json.dumps(config)).precision.name == name


def test_a_group_size_other_than_128_is_taken_into_account() -> None:
    """4 bits and, for 32 weights, a 16-bit scale and a 4-bit zero point; -1: one group a row, as good as none."""
    for group_size, bits in ((32, 4 + 20 / 32), (128, 4 + 20 / 128), (-1, 4)):
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size}
        config = KNOWN["meta-llama/Llama-3.1-8B"]["config"] | {"quantization_config": quantization}
        assert parse_llm(json.dumps(config)).precision.weight_bits == bits


@pytest.mark.parametrize(
    ("quantization", "field"),
    [
        ({"quant_method": "vodoo"}, "quant_method"),
        ({}, "quant_method"),
        ({"quant_method": "gptq", "bits": 3}, "bits"),
        ({"quant_method": "awq", "bits": "four"}, "bits"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 5}}}}, "config_groups"),
    ],
)
def test_a_quantization_that_is_not_understood_is_refused_unless_the_precision_is_named(
    quantization: dict[str, object], field: str
) -> None:
    config = parse_llm(json.dumps(KNOWN["meta-llama/Llama-3.1-8B"]["config"] | {"quantization_config": quantization}))
    with pytest.raises(InvalidInputError) as caught:
        llm_work(config, 1)
    assert [violation.field for violation in caught.value.violations] == [f"config_json.quantization_config.{field}"]
    with pytest.raises(InvalidInputError):
        _ = config.precision
    assert llm_work(config, 1, PRECISIONS["int4"]).weight_bytes / 1e9 == pytest.approx(5.73, rel=0.002)


@pytest.mark.parametrize(
    ("name", "precision", "gigabytes"),
    [
        ("meta-llama/Llama-2-7b", "int4", 3.90),
        ("meta-llama/Llama-2-13b", "int4", 7.26),
        ("meta-llama/Llama-3.1-70B", "int8", 67.7229 * 1.073741824),
        ("openai/gpt-oss-20b", "mxfp4", 12.8 * 1.073741824),
        ("mistralai/Mixtral-8x7B-v0.1", "bf16", 93.4),
    ],
)
def test_the_weights_are_as_large_as_published_files(name: str, precision: str, gigabytes: float) -> None:
    """TheBloke's GPTQ files, 128 weights a group; vllm-project/vllm#12569; gpt-oss's model card; mistralai's files."""
    assert work(name, precision=precision).weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_a_step_of_few_tokens_reads_few_experts() -> None:
    """Mixtral: one token reads 2 of 8 experts; of many tokens hardly an expert is left out."""
    llm = work("mistralai/Mixtral-8x7B-v0.1")
    assert llm.weight_bytes_read(1) == pytest.approx(2 * 12.88e9, rel=0.01)
    assert llm.weight_bytes_read(64) == pytest.approx(llm.weight_bytes, rel=1e-6)
    assert llm.weight_bytes_read(2) < llm.weight_bytes_read(4) < llm.weight_bytes


def test_heads_that_cannot_be_split_and_missing_expert_counts_are_told_at_once() -> None:
    config = {
        key: value for key, value in KNOWN["Qwen/Qwen3-30B-A3B"]["config"].items() if key != "num_experts_per_tok"
    }
    with pytest.raises(InvalidInputError) as caught:
        llm_work(parse_llm(json.dumps(config)), 3, kv_bits=7)
    assert [violation.field for violation in caught.value.violations] == [
        "gpu_count",
        "kv_bits",
        "config_json.num_experts_per_tok",
    ]


def test_more_chosen_experts_than_there_are_is_refused() -> None:
    config = KNOWN["mistralai/Mixtral-8x7B-v0.1"]["config"] | {"num_experts_per_tok": 9}
    with pytest.raises(InvalidInputError, match="at most the 8 experts, is 9"):
        parse_llm(json.dumps(config))


def test_more_dense_layers_than_there_are_is_refused() -> None:
    config = KNOWN["deepseek-ai/DeepSeek-V3"]["config"] | {"first_k_dense_replace": 62}
    with pytest.raises(InvalidInputError, match="at most the 61 layers, is 62"):
        parse_llm(json.dumps(config))


def test_contradictions_are_listed_at_once() -> None:
    config = KNOWN["mistralai/Mixtral-8x7B-v0.1"]["config"] | {
        "hidden_size": 4097,
        "num_key_value_heads": 5,
        "num_experts_per_tok": 9,
        "layer_types": ["full_attention"],
        "vocab_size": 0,
    }
    with pytest.raises(InvalidInputError) as caught:
        parse_llm(json.dumps(config))
    assert {violation.field.removeprefix("config_json.") for violation in caught.value.violations} == {
        "hidden_size",
        "num_key_value_heads",
        "num_experts_per_tok",
        "layer_types",
        "vocab_size",
    }


def test_layer_types_of_another_number_of_layers_are_refused() -> None:
    config = KNOWN["openai/gpt-oss-20b"]["config"] | {"layer_types": ["sliding_attention"]}
    with pytest.raises(InvalidInputError, match="each of 24 layers, names 1"):
        parse_llm(json.dumps(config))


def test_a_config_of_an_unknown_family_names_every_field_it_lacks() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_llm('{"model_type": "brandnew"}')
    assert {violation.field.removeprefix("config_json.") for violation in caught.value.violations} == {
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    }
