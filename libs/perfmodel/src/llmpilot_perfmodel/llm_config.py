"""Turns the text of a Hugging Face config.json into an `LlmConfig`.

Invariant: `parse_llm` returns a spec without violations or raises `InvalidInputError` with every problem it found.
"""

from dataclasses import dataclass, replace

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.architecture import (
    FAMILIES,
    LLAMA,
    Architecture,
    Experts,
    Family,
    LatentAttention,
    SlidingWindow,
    T5Architecture,
)
from llmpilot_perfmodel.config_reader import ConfigReader, parse_object
from llmpilot_perfmodel.llm_spec import (
    HEAD_COUNT_RANGE,
    LAYER_COUNT_RANGE,
    POSITION_COUNT_RANGE,
    RELATIVE_ATTENTION_RANGE,
    VOCABULARY_SIZE_RANGE,
    LlmSpec,
)
from llmpilot_perfmodel.parameter_count import decoder_parameter_count, t5_parameter_count
from llmpilot_perfmodel.precision import Precision, StatedPrecision, stated_precision

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
HIDDEN = ("hidden_size", "d_model", "n_embd", "n_embed")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_SIZE = ("head_dim", "d_kv", "kv_channels")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")
VOCABULARY = ("vocab_size",)

WIDTH_MAXIMUM = 10**6
EXPERT_MAXIMUM = 10**5
T5_TYPES = ("t5", "mt5", "umt5")
UNEVEN_LAYERS = (
    "block_configs",
    "interleave_moe_layer_step",
    "layers_block_type",
    "linear_num_value_heads",
    "mamba_d_state",
)
"""Keys of LLMs whose layers are not all of one shape, so that the formulas here would miscount them."""
INHERITED = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config")
"""What a multimodal config.json says once for all its parts."""
DEFAULT_DTYPE = "float32"
"""What Hugging Face's transformers loads when a config.json names no data type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    """What a config.json says of its LLM."""

    spec: LlmSpec
    architecture: Architecture | T5Architecture
    stated_precision: StatedPrecision

    @property
    def precision(self) -> Precision:
        """What the weights are served in; raises InvalidInputError where its quantization is not understood."""
        if self.stated_precision.violations:
            raise InvalidInputError(self.stated_precision.violations)
        return self.stated_precision.precision


def parse_config(text: str) -> LlmSpec:
    """Return the features of the LLM of a config.json, see `parse_llm`."""
    return parse_llm(text).spec


def parse_llm(text: str) -> LlmConfig:
    """Return what a config.json says of its LLM, for a multimodal one of its language part.

    Parameters are counted from the sizes; quantization does not change their number. A `model_type` nobody taught
    this module is taken for a relative of Llama.
    """
    reader = _language_reader(parse_object(text))
    model_type = reader.word("model_type")
    if not reader.has("model_type"):
        reader.refuse("model_type", 'is missing; it names the family, e.g. "llama"')
    spec: LlmSpec
    architecture: Architecture | T5Architecture
    if model_type in T5_TYPES:
        spec, architecture = _t5(reader, model_type)
    else:
        spec, architecture = _decoder(reader, "unknown" if model_type is None else model_type)
    precision = stated_precision(reader.section("quantization_config"), spec.torch_dtype)
    sizes_are_right = not reader.violations
    for violation in spec.violations():
        if sizes_are_right or violation.field != "parameter_count":
            reader.refuse(violation.field, violation.description)
    reader.raise_violations()
    return LlmConfig(spec=spec, architecture=architecture, stated_precision=precision)


def _language_reader(document: dict[str, object]) -> ConfigReader:
    reader = ConfigReader(document)
    section = reader.section("text_config")
    reader.raise_violations()
    if section is None:
        return reader
    stated = {key: value for key, value in section.items() if value is not None}
    inherited = {key: document[key] for key in INHERITED if key in document}
    return ConfigReader(inherited | stated)


def _torch_dtype(reader: ConfigReader) -> str:
    torch_dtype = reader.word("torch_dtype", "dtype")
    return DEFAULT_DTYPE if torch_dtype is None else torch_dtype


def _decoder(reader: ConfigReader, model_type: str) -> tuple[LlmSpec, Architecture]:
    if reader.flag("is_encoder_decoder", default=False):
        known = ", ".join(T5_TYPES)
        reader.refuse("is_encoder_decoder", f"must be false unless model_type is one of {known}")
    for key in UNEVEN_LAYERS:
        if reader.has(key):
            reader.refuse(key, "layers of mixed shapes are not understood; give the architecture as a spec instead")
    architecture = _architecture(reader, model_type)
    spec = LlmSpec(
        model_type=model_type,
        is_encoder_decoder=False,
        parameter_count=decoder_parameter_count(architecture),
        layer_count=architecture.layer_count,
        head_count=architecture.head_count,
        vocabulary_size=architecture.vocabulary_size,
        max_position_count=architecture.position_count,
        uses_flash_attention=architecture.family.flash_attention,
        relative_attention_max_distance=None,
        relative_attention_bucket_count=None,
        torch_dtype=_torch_dtype(reader),
    )
    return spec, architecture


def _architecture(reader: ConfigReader, model_type: str) -> Architecture:
    family = _family(reader, model_type)
    hidden_size = reader.required_count(*HIDDEN, maximum=WIDTH_MAXIMUM)
    head_count = reader.required_count(*HEADS, maximum=HEAD_COUNT_RANGE[1])
    latent_attention = _latent_attention(reader)
    if family.position_offset is None:
        position_count = reader.count(*POSITIONS, maximum=POSITION_COUNT_RANGE[1])
    else:
        position_count = reader.required_count(*POSITIONS, maximum=POSITION_COUNT_RANGE[1])
    layer_count = reader.required_count(*LAYERS, maximum=LAYER_COUNT_RANGE[1])
    architecture = Architecture(
        family=family,
        layer_count=layer_count,
        hidden_size=hidden_size,
        head_count=head_count,
        key_value_head_count=_key_value_head_count(reader, model_type, head_count),
        head_size=reader.count(*HEAD_SIZE, maximum=WIDTH_MAXIMUM) or max(hidden_size // head_count, 1),
        inner_size=_inner_size(reader, family, hidden_size),
        vocabulary_size=reader.required_count(*VOCABULARY, maximum=VOCABULARY_SIZE_RANGE[1]),
        position_count=position_count,
        tied=reader.flag("tie_word_embeddings", default=family.tied_by_default),
        experts=_experts(reader, layer_count),
        latent_attention=latent_attention,
        sliding_window=_sliding_window(reader, family, layer_count),
    )
    if reader.states(*HEADS):
        _refuse_uneven_heads(reader, architecture)
    return architecture


def _refuse_uneven_heads(reader: ConfigReader, architecture: Architecture) -> None:
    heads = architecture.head_count
    is_divided = reader.states(*HIDDEN) and not reader.has(*HEAD_SIZE) and architecture.latent_attention is None
    if is_divided and architecture.hidden_size % heads:
        reader.refuse(HIDDEN[0], f"must be a multiple of the {heads} heads, is {architecture.hidden_size}")
    if heads % architecture.key_value_head_count:
        kv_heads = architecture.key_value_head_count
        reader.refuse(KEY_VALUE_HEADS[0], f"must divide the {heads} attention heads, is {kv_heads}")


def _family(reader: ConfigReader, model_type: str) -> Family:
    family = FAMILIES.get(model_type, LLAMA)
    if model_type == "falcon":
        bias = reader.flag("bias", default=False)
        parallel = reader.flag("parallel_attn", default=True)
        one_norm = parallel and not reader.flag("new_decoder_architecture", default=False)
        norms_per_layer = 1 if one_norm else 2
        return replace(family, qkv_bias=bias, output_bias=bias, mlp_bias=bias, norms_per_layer=norms_per_layer)
    if reader.has("attention_bias"):
        bias = reader.flag("attention_bias", default=False)
        family = replace(family, qkv_bias=bias, output_bias=bias)
    if reader.has("mlp_bias"):
        family = replace(family, mlp_bias=reader.flag("mlp_bias", default=False))
    return family


def _key_value_head_count(reader: ConfigReader, model_type: str, head_count: int) -> int:
    stated = reader.count(*KEY_VALUE_HEADS, maximum=HEAD_COUNT_RANGE[1])
    multi_query = reader.flag("multi_query", default=model_type in ("falcon", "gpt_bigcode"))
    if reader.flag("new_decoder_architecture", default=False):
        return stated or head_count
    if multi_query:  # Falcon's config.json states as many key/value heads as heads beside multi_query
        return 1
    return stated or head_count


def _inner_size(reader: ConfigReader, family: Family, hidden_size: int) -> int:
    ratio = reader.count("expansion_ratio", maximum=64) or family.inner_per_hidden
    if ratio is not None and not reader.has(*INNER):
        return ratio * hidden_size
    inner_size = reader.required_count(*INNER, maximum=WIDTH_MAXIMUM)
    return inner_size // 2 if family.gate_halves_inner else inner_size


def _experts(reader: ConfigReader, layer_count: int) -> Experts | None:
    expert_count = reader.count(*EXPERTS, minimum=0, maximum=EXPERT_MAXIMUM)
    if not expert_count:
        return None
    expert_inner_size = reader.required_count("moe_intermediate_size", *INNER, maximum=WIDTH_MAXIMUM)
    shared_expert_count = reader.count("n_shared_experts", minimum=0, maximum=EXPERT_MAXIMUM) or 0
    shared_inner_size = reader.count("shared_expert_intermediate_size", minimum=0, maximum=WIDTH_MAXIMUM)
    experts_per_token = reader.count(*EXPERTS_PER_TOKEN, maximum=EXPERT_MAXIMUM)
    if experts_per_token is not None and experts_per_token > expert_count:
        reader.refuse(EXPERTS_PER_TOKEN[0], f"must be at most the {expert_count} experts, is {experts_per_token}")
    dense_layer_count = reader.count("first_k_dense_replace", minimum=0, maximum=LAYER_COUNT_RANGE[1]) or 0
    if reader.states(*LAYERS) and dense_layer_count > layer_count:
        reader.refuse("first_k_dense_replace", f"must be at most the {layer_count} layers, is {dense_layer_count}")
    return Experts(
        expert_count=expert_count,
        experts_per_token=experts_per_token,
        expert_inner_size=expert_inner_size,
        shared_inner_size=shared_inner_size or shared_expert_count * expert_inner_size,
        dense_layer_count=dense_layer_count,
    )


def _latent_attention(reader: ConfigReader) -> LatentAttention | None:
    if not reader.has("kv_lora_rank"):
        return None
    return LatentAttention(
        query_rank=reader.count("q_lora_rank", maximum=WIDTH_MAXIMUM),
        key_value_rank=reader.required_count("kv_lora_rank", maximum=WIDTH_MAXIMUM),
        rope_head_size=reader.required_count("qk_rope_head_dim", maximum=WIDTH_MAXIMUM),
        nope_head_size=reader.required_count("qk_nope_head_dim", maximum=WIDTH_MAXIMUM),
        value_head_size=reader.required_count("v_head_dim", maximum=WIDTH_MAXIMUM),
    )


def _sliding_window(reader: ConfigReader, family: Family, layer_count: int) -> SlidingWindow | None:
    token_count = reader.count("sliding_window", minimum=0, maximum=POSITION_COUNT_RANGE[1])
    is_used = reader.flag("use_sliding_window", default=True)
    layer_types = reader.words("layer_types")
    if layer_types is not None and reader.states(*LAYERS) and len(layer_types) != layer_count:
        reader.refuse("layer_types", f"must name the kind of each of {layer_count} layers, names {len(layer_types)}")
    period = reader.count("sliding_window_pattern", maximum=LAYER_COUNT_RANGE[1]) or family.window_period
    leading = reader.count("max_window_layers", minimum=0, maximum=LAYER_COUNT_RANGE[1])
    if not token_count or not is_used:
        return None
    if layer_types is not None:
        windowed = layer_types.count("sliding_attention")
    elif reader.has("use_sliding_window") and leading is not None:  # Qwen2: the leading layers see everything
        windowed = max(0, layer_count - leading)
    else:
        windowed = layer_count if period == 1 else layer_count - layer_count // period
    return SlidingWindow(token_count=token_count, layer_count=windowed) if windowed else None


def _t5(reader: ConfigReader, model_type: str) -> tuple[LlmSpec, T5Architecture]:
    encoder_layer_count = reader.required_count("num_layers", maximum=LAYER_COUNT_RANGE[1])
    decoder_layer_count = reader.count("num_decoder_layers", maximum=LAYER_COUNT_RANGE[1]) or encoder_layer_count
    bucket_count = reader.count("relative_attention_num_buckets", maximum=RELATIVE_ATTENTION_RANGE[1]) or 32
    feed_forward = reader.word("feed_forward_proj") or ("relu" if model_type == "t5" else "gated-gelu")
    architecture = T5Architecture(
        encoder_layer_count=encoder_layer_count,
        decoder_layer_count=decoder_layer_count,
        hidden_size=reader.required_count(*HIDDEN, maximum=WIDTH_MAXIMUM),
        head_count=reader.required_count(*HEADS, maximum=HEAD_COUNT_RANGE[1]),
        head_size=reader.required_count("d_kv", "head_dim", maximum=WIDTH_MAXIMUM),
        inner_size=reader.required_count(*INNER, maximum=WIDTH_MAXIMUM),
        gated=feed_forward.startswith("gated"),
        vocabulary_size=reader.required_count(*VOCABULARY, maximum=VOCABULARY_SIZE_RANGE[1]),
        bucket_count=bucket_count,
        tied=reader.flag("tie_word_embeddings", default=model_type == "t5"),
    )
    max_distance = reader.count("relative_attention_max_distance", maximum=RELATIVE_ATTENTION_RANGE[1]) or 128
    spec = LlmSpec(
        model_type=model_type,
        is_encoder_decoder=True,
        parameter_count=t5_parameter_count(architecture),
        layer_count=decoder_layer_count,
        head_count=architecture.head_count,
        vocabulary_size=architecture.vocabulary_size,
        max_position_count=reader.count(*POSITIONS, maximum=POSITION_COUNT_RANGE[1]),
        uses_flash_attention=False,
        relative_attention_max_distance=max_distance,
        relative_attention_bucket_count=bucket_count,
        torch_dtype=_torch_dtype(reader),
    )
    return spec, architecture
