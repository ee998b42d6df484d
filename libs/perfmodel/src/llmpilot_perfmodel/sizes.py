"""What an LLM weighs and what a token of it costs, on each GPU of a tensor-parallel pod.

Invariant: the weights of all GPUs together are those of the LLM, except that every GPU has its own norms and, where
there are fewer key/value heads than GPUs, its own copy of a head.
Sources: Shoeybi et al., "Megatron-LM", 2019 (tensor parallelism); DeepSeek-V2, 2024 (latent attention).
"""

import math
from dataclasses import dataclass

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.architecture import Architecture, T5Architecture
from llmpilot_perfmodel.llm_config import EXPERTS_PER_TOKEN, LlmConfig
from llmpilot_perfmodel.parameter_count import (
    decoder_parameter_count,
    expert_parameter_count,
    norm_parameter_count,
    t5_parameter_count,
)
from llmpilot_perfmodel.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """The experts of all layers, on each GPU."""

    expert_count: int
    experts_per_token: int
    weight_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowWork:
    """The layers of a sliding window."""

    token_count: int
    layer_share: float
    """Of the layers, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmWork:
    """What an LLM weighs and what a token costs, on each GPU of a pod; FLOPs count a multiplication and an addition."""

    gpu_count: int
    layer_count: int
    """Of the decoder."""
    encoder_layer_count: int
    """0: a decoder alone."""
    hidden_size: int
    inner_size: int
    """Feed-forward width that a token passes on this GPU."""
    head_count: int
    vocabulary_size: int
    parameter_count: int
    """Of the whole LLM."""
    active_parameter_count: int
    """Of the whole LLM, what one token passes; embeddings included."""
    weight_bytes: float
    experts: ExpertWork | None
    kv_bytes_per_token: float
    """Of every layer, as if none had a window; for an encoder-decoder of each input and each output token."""
    window: WindowWork | None
    prefill_flops_per_token: float
    """Matrix products of one prompt token; for an encoder-decoder encoder and cross-attention's keys."""
    decode_flops_per_token: float
    """Matrix products of one output token, the output head included."""
    prefill_attention_flops_per_pair: float
    """Attention of one token to one token, all layers."""
    decode_attention_flops_per_pair: float
    activation_bytes: int
    """Per number."""
    is_padded: bool
    """Whether servers of 2023 ran it in padded batches, for want of flash attention."""
    fp32_parameter_count: int = 0
    """On each GPU, weights kept in 32 bits where the others have 16: T5's second feed-forward matrices."""

    def weight_bytes_read(self, token_count: int) -> float:
        """Return the bytes of weights that a step of so many tokens reads; of experts, those expected to be chosen."""
        if self.experts is None:
            return self.weight_bytes
        untouched = (1 - self.experts.experts_per_token / self.experts.expert_count) ** token_count
        return self.weight_bytes - self.experts.weight_bytes * untouched

    def kv_bytes(self, token_count: int) -> float:
        """Return the bytes of cache that one sequence of so many tokens keeps."""
        if self.window is None:
            return self.kv_bytes_per_token * token_count
        kept = min(token_count, self.window.token_count)
        share = self.window.layer_share
        return self.kv_bytes_per_token * (share * kept + (1 - share) * token_count)


def llm_work(
    config: LlmConfig, gpu_count: int, precision: Precision | None = None, *, kv_bits: int | None = None
) -> LlmWork:
    """Return what the LLM of a config.json costs on each of `gpu_count` GPUs.

    precision: of the weights; None: what the config.json says. kv_bits: bits per number of the cache; None: those of
    the activations. Raises InvalidInputError where the LLM cannot be split into so many parts, the config.json leaves
    out how many experts a token passes, or its quantization is not understood and no precision is named.
    """
    violations = list(_violations(config, gpu_count, kv_bits))
    if precision is None:
        violations += config.stated_precision.violations
        precision = config.stated_precision.precision
    if violations:
        raise InvalidInputError(violations)
    kv_bytes = (kv_bits or precision.activation_bits) / 8
    architecture = config.architecture
    if isinstance(architecture, T5Architecture):
        return _t5_work(architecture, gpu_count, precision, kv_bytes)
    return _decoder_work(architecture, gpu_count, precision, kv_bytes)


def _violations(config: LlmConfig, gpu_count: int, kv_bits: int | None) -> list[Violation]:
    heads = config.architecture.head_count
    violations = []
    if gpu_count < 1 or heads % gpu_count:
        violations.append(Violation("gpu_count", f"must divide the {heads} attention heads, is {gpu_count}"))
    if kv_bits not in (None, 8, 16, 32):
        violations.append(Violation("kv_bits", f"must be 8, 16 or 32, is {kv_bits}"))
    experts = config.architecture.experts if isinstance(config.architecture, Architecture) else None
    if experts is not None and experts.experts_per_token is None:
        violations.append(
            Violation(f"config_json.{EXPERTS_PER_TOKEN[0]}", "is missing; it says how many experts a token passes")
        )
    return violations


def _decoder_work(a: Architecture, gpu_count: int, precision: Precision, kv_bytes: float) -> LlmWork:
    total, norms = decoder_parameter_count(a), norm_parameter_count(a)
    embedding = a.vocabulary_size * a.hidden_size
    embeddings = embedding * (1 if a.tied else 2)
    expert_layers = a.layer_count - min(a.experts.dense_layer_count, a.layer_count) if a.experts else 0
    expert = expert_layers * expert_parameter_count(a)
    experts = a.experts.expert_count * expert if a.experts else 0
    passed = (a.experts.experts_per_token or 0) * expert if a.experts else 0
    matrices = total - norms - embeddings - experts
    matrix_bytes = precision.activation_bytes if precision.experts_only else precision.weight_bytes
    on_each = matrices / gpu_count + _copied_head_parameters(a, gpu_count)
    expert_bytes = experts / gpu_count * precision.weight_bytes
    layer_flops = 2 * (matrices + passed) / gpu_count
    head_flops = 2 * embedding / gpu_count
    prefill_pair, decode_pair = _pair_flops(a)
    return LlmWork(
        gpu_count=gpu_count,
        layer_count=a.layer_count,
        encoder_layer_count=0,
        hidden_size=a.hidden_size,
        inner_size=_passed_inner_size(a) // gpu_count,
        head_count=a.head_count,
        vocabulary_size=a.vocabulary_size,
        parameter_count=total,
        active_parameter_count=total - experts + passed,
        weight_bytes=on_each * matrix_bytes
        + expert_bytes
        + (embeddings / gpu_count + norms) * precision.activation_bytes,
        experts=ExpertWork(
            expert_count=a.experts.expert_count,
            experts_per_token=a.experts.experts_per_token or 0,
            weight_bytes=expert_bytes,
        )
        if a.experts
        else None,
        kv_bytes_per_token=kv_bytes * _kept_numbers(a, gpu_count),
        window=WindowWork(
            token_count=a.sliding_window.token_count, layer_share=a.sliding_window.layer_count / a.layer_count
        )
        if a.sliding_window
        else None,
        prefill_flops_per_token=layer_flops,
        decode_flops_per_token=layer_flops + head_flops,
        prefill_attention_flops_per_pair=prefill_pair / gpu_count,
        decode_attention_flops_per_pair=decode_pair / gpu_count,
        activation_bytes=precision.activation_bytes,
        is_padded=not a.family.flash_attention,
    )


def _copied_head_parameters(a: Architecture, gpu_count: int) -> float:
    """Parameters per GPU of key/value heads that another GPU has too."""
    if a.latent_attention is not None:
        latent = a.latent_attention
        down = a.hidden_size * (latent.key_value_rank + latent.rope_head_size + (latent.query_rank or 0))
        return a.layer_count * down * (1 - 1 / gpu_count)
    heads_on_each = math.ceil(a.key_value_head_count / gpu_count)
    one_head = 2 * a.hidden_size * a.head_size * a.layer_count
    return one_head * (heads_on_each - a.key_value_head_count / gpu_count)


def _kept_numbers(a: Architecture, gpu_count: int) -> int:
    """Numbers that the cache of one GPU keeps of one token."""
    if a.latent_attention is not None:  # every GPU keeps the whole latent vector
        return a.layer_count * (a.latent_attention.key_value_rank + a.latent_attention.rope_head_size)
    return a.layer_count * 2 * math.ceil(a.key_value_head_count / gpu_count) * a.head_size


def _pair_flops(a: Architecture) -> tuple[int, int]:
    """FLOPs of all layers for one token's attention to another, in a prefill and in a decode step."""
    if a.latent_attention is not None:
        latent, heads = a.latent_attention, a.layer_count * a.head_count
        query_size = latent.nope_head_size + latent.rope_head_size
        prefill = 2 * heads * (query_size + latent.value_head_size)
        return prefill, 2 * heads * (2 * latent.key_value_rank + latent.rope_head_size)
    pair = 4 * a.layer_count * a.head_count * a.head_size
    return pair, pair


def _passed_inner_size(a: Architecture) -> int:
    if a.experts is None:
        return a.inner_size
    mixture = (a.experts.experts_per_token or 0) * a.experts.expert_inner_size + a.experts.shared_inner_size
    return max(mixture, a.inner_size) if a.experts.dense_layer_count else mixture


def _t5_work(a: T5Architecture, gpu_count: int, precision: Precision, kv_bytes: float) -> LlmWork:
    total = t5_parameter_count(a)
    heads = a.head_count * a.head_size
    embedding = a.vocabulary_size * a.hidden_size
    embeddings = embedding * (1 if a.tied else 2)
    mlp = (3 if a.gated else 2) * a.hidden_size * a.inner_size
    projection = a.hidden_size * heads
    encoder = a.encoder_layer_count * (4 * projection + mlp)
    cross_keys = a.decoder_layer_count * 2 * projection
    decoder = a.decoder_layer_count * (6 * projection + mlp)
    layers = a.encoder_layer_count + a.decoder_layer_count
    rest = total - embeddings - encoder - cross_keys - decoder
    head_flops = 2 * embedding / gpu_count
    return LlmWork(
        gpu_count=gpu_count,
        layer_count=a.decoder_layer_count,
        encoder_layer_count=a.encoder_layer_count,
        hidden_size=a.hidden_size,
        inner_size=a.inner_size // gpu_count,
        head_count=a.head_count,
        vocabulary_size=a.vocabulary_size,
        parameter_count=total,
        active_parameter_count=total,
        weight_bytes=(encoder + cross_keys + decoder) / gpu_count * precision.weight_bytes
        + (embeddings / gpu_count + rest) * precision.activation_bytes,
        experts=None,
        kv_bytes_per_token=kv_bytes * a.decoder_layer_count * 2 * heads / gpu_count,
        window=None,
        prefill_flops_per_token=2 * (encoder + cross_keys) / gpu_count,
        decode_flops_per_token=2 * decoder / gpu_count + head_flops,
        prefill_attention_flops_per_pair=4 * a.encoder_layer_count * heads / gpu_count,
        decode_attention_flops_per_pair=4 * a.decoder_layer_count * heads / gpu_count,
        activation_bytes=precision.activation_bytes,
        is_padded=True,
        fp32_parameter_count=layers * a.hidden_size * a.inner_size // gpu_count,
    )
