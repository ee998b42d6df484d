"""The sizes of a transformer and the habits of its family: all that the number of its parameters depends on.

Invariant: a family says only what the family's config.json leaves unsaid (whether the layers have biases, how many
norms they have), never a size. Source: the reference implementations in Hugging Face's transformers.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the layers of one `model_type` are built; the defaults are those of Llama."""

    gated: bool = True
    """Three feed-forward matrices (gate, up, down), not two."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    """LayerNorm with a bias, not RMSNorm."""
    norms_per_layer: int = 2
    query_key_norm: str = ""
    """"head": one weight per element of a head, shared by the heads; "all": one per element of all heads."""
    embedding_norm: bool = False
    position_offset: int | None = None
    """Learned absolute positions, this many more than the config says; None: rotary, relative or ALiBi."""
    tied_by_default: bool = False
    """Output projection shares the embedding unless tie_word_embeddings says otherwise."""
    output_projection_bias: bool = False
    inner_per_hidden: int | None = None
    """Feed-forward width over hidden size where the config does not state the width; None: it must."""
    gate_halves_inner: bool = False
    """The stated feed-forward width counts gate and up together."""
    router_bias: bool = False
    expert_bias: bool = False
    attention_sinks: bool = False
    window_period: int = 1
    """Every layer but each one of this many has the sliding window; 1: all have it."""
    flash_attention: bool = True
    """Whether a server runs the family with flash attention; source: the published features, Lazuka et al., 2024."""


LLAMA = Family()
_GPT = Family(gated=False, qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True, inner_per_hidden=4)
_GPT_J = replace(_GPT, qkv_bias=False, output_bias=False, norms_per_layer=1, output_projection_bias=True)

FAMILIES: dict[str, Family] = {
    "bloom": replace(_GPT, embedding_norm=True, tied_by_default=True),
    "codegen": replace(_GPT_J, flash_attention=False),
    "deepseek_v3": Family(router_bias=True),
    "falcon": replace(_GPT, qkv_bias=False, output_bias=False, mlp_bias=False, tied_by_default=True),
    "gemma": Family(tied_by_default=True),
    "gemma2": Family(tied_by_default=True, norms_per_layer=4, window_period=2),
    "gemma3_text": Family(tied_by_default=True, norms_per_layer=4, query_key_norm="head", window_period=6),
    "gpt2": replace(_GPT, position_offset=0, tied_by_default=True),
    "gpt_bigcode": replace(_GPT, position_offset=0, tied_by_default=True),
    "gpt_neox": replace(_GPT, inner_per_hidden=None),
    "gpt_oss": Family(
        qkv_bias=True, output_bias=True, router_bias=True, expert_bias=True, attention_sinks=True, window_period=2
    ),
    "gptj": _GPT_J,
    "mpt": Family(gated=False, tied_by_default=True, inner_per_hidden=4, flash_attention=False),
    "olmo2": Family(query_key_norm="all"),
    "opt": replace(_GPT, position_offset=2, tied_by_default=True, inner_per_hidden=None),
    "qwen": Family(qkv_bias=True, gate_halves_inner=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(query_key_norm="head"),
    "qwen3_moe": Family(query_key_norm="head"),
}
"""Families that differ from Llama. mistral, mixtral, phi3 and granite do not; an unknown family is taken for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture-of-experts part of a transformer."""

    expert_count: int
    experts_per_token: int | None
    """Experts that a token passes; None: not stated."""
    expert_inner_size: int
    shared_inner_size: int
    """Feed-forward width that every token passes besides its experts; 0: none."""
    dense_layer_count: int
    """Leading layers with an ordinary feed-forward part instead of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024): queries and keys/values go through low-rank projections."""

    query_rank: int | None
    key_value_rank: int
    rope_head_size: int
    nope_head_size: int
    value_head_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """Layers whose tokens attend to the latest ones only."""

    token_count: int
    layer_count: int
    """How many of the layers; the others attend to everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a decoder-only transformer."""

    family: Family
    layer_count: int
    hidden_size: int
    head_count: int
    key_value_head_count: int
    head_size: int
    inner_size: int
    vocabulary_size: int
    position_count: int | None
    tied: bool
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    sliding_window: SlidingWindow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Architecture:
    """The sizes of an encoder-decoder built like T5."""

    encoder_layer_count: int
    decoder_layer_count: int
    hidden_size: int
    head_count: int
    head_size: int
    inner_size: int
    gated: bool
    vocabulary_size: int
    bucket_count: int
    tied: bool
