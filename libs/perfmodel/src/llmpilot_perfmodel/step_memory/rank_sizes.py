"""What one GPU's part of a decoder-only LLM is made of, as far as the memory of a step depends on it.

Invariant: numbers are tensor elements per token unless a name says bytes. Source: the modules of Hugging Face's
transformers, whose local variables decide how long a tensor lives.
"""

import math
from dataclasses import dataclass, replace

from llmpilot_perfmodel.architecture import Architecture
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.precision import Precision
from llmpilot_perfmodel.step_memory.batch import Execution

_BYTE_BITS = 8
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """Which tensors the layers of a family keep; the defaults are Llama's."""

    one_projection: bool = False
    """Queries, keys and values are views of one tensor, which lives as long as any of them."""
    rotary_share: float = 1.0
    """Of each head, how much is rotated by position; 0: none."""
    activation_tensors: int = 2
    """As large as the feed-forward width, alive at once in the activation function: 2 where it is one kernel."""
    one_gate_projection: bool = False
    """Gate and up are halves of one tensor."""
    kept_after_attention: int = 2
    """Tensors of hidden size that a layer holds while its feed-forward part runs, besides what came into it."""
    float_routing: bool = True
    """Weights of experts stay 32-bit numbers, and so does what they are multiplied with."""


_LLAMA = Habits()
_LEARNED = Habits(one_projection=True, rotary_share=0, kept_after_attention=3)
_HABITS = {
    "bloom": replace(_LEARNED, activation_tensors=5, kept_after_attention=2),
    "codegen": Habits(one_projection=True, rotary_share=0.25, activation_tensors=4),
    "falcon": Habits(one_projection=True),
    "gpt2": replace(_LEARNED, activation_tensors=4),
    "gpt_bigcode": _LEARNED,
    "gpt_neox": Habits(one_projection=True, rotary_share=0.25),
    "gptj": Habits(rotary_share=0.25, activation_tensors=4),
    "mpt": _LEARNED,
    "opt": Habits(rotary_share=0, kept_after_attention=1),
    "qwen2_moe": Habits(float_routing=False),
    "qwen3_moe": Habits(float_routing=False),
    "phi3": Habits(one_projection=True, one_gate_projection=True),
}
"""Families that differ from Llama; an unknown one is taken for a relative of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSizes:
    """One GPU's part of a decoder-only LLM."""

    habits: Habits
    number_bytes: int
    """Of an activation."""
    layer_count: int
    hidden: int
    query: int
    """All heads of this GPU."""
    key_value: int
    """K, or V, of all heads of this GPU."""
    output: int
    """What attention makes."""
    head_count: int
    key_value_head_count: int
    rotary: int
    """Of one head, how many are rotated."""
    vocabulary: int
    gpu_count: int
    carried: int
    """Tensors of hidden size that live through a layer: the embedded tokens, and what the layer was given."""
    has_position_rows: bool
    """Whether learned positions are looked up, one row of hidden size each."""

    @property
    def projected(self) -> int:
        """What projection keeps alive while attention runs: one tensor of all, or the queries alone."""
        rotated = self.query if self.habits.rotary_share else 0
        if self.habits.one_projection:
            return self.query + 2 * self.key_value + rotated
        return self.query

    @property
    def rotating(self) -> int:
        """What lives at most while queries and keys are rotated, or written to the cache."""
        queries, keys = self.query, self.key_value
        if self.habits.one_projection:
            return 2 * queries + 3 * keys if self.habits.rotary_share else queries + 2 * keys
        if not self.habits.rotary_share:
            return queries + 2 * keys
        return max(4 * queries + 2 * keys, 2 * queries + 5 * keys)

    @property
    def written(self) -> int:
        """What projection keeps alive while keys and values are written to the cache."""
        if not self.habits.one_projection:
            return self.query + 2 * self.key_value
        return self.projected + (self.key_value if self.habits.rotary_share else 0)

    @property
    def attended(self) -> int:
        """What fused attention makes: one tensor, two where its kernel gives the heads in another order."""
        return self.output * (2 if self.habits.one_projection else 1)


def rank_sizes(config: LlmConfig, architecture: Architecture, execution: Execution) -> RankSizes:
    """Return the sizes of one GPU's part."""
    a, parts = architecture, execution.gpu_count
    habits = _HABITS.get(config.spec.model_type, _LLAMA)
    has_rows = a.family.position_offset is not None
    head_count = a.head_count // parts
    kv_head_count = max(1, math.ceil(a.key_value_head_count / parts))
    key_size, value_size = a.head_size, a.head_size
    if a.latent_attention is not None:
        latent = a.latent_attention
        kv_head_count = head_count
        key_size, value_size = latent.nope_head_size + latent.rope_head_size, latent.value_head_size
    has_own_input = has_rows or a.family.embedding_norm or a.layer_count > 1
    return RankSizes(
        habits=habits,
        number_bytes=execution.activation_bits // _BYTE_BITS,
        layer_count=a.layer_count,
        hidden=a.hidden_size,
        query=head_count * key_size,
        key_value=kv_head_count * (key_size + value_size) // 2,
        output=head_count * value_size,
        head_count=head_count,
        key_value_head_count=kv_head_count,
        rotary=int(key_size * habits.rotary_share),
        vocabulary=a.vocabulary_size,
        gpu_count=parts,
        carried=2 if has_own_input else 1,
        has_position_rows=has_rows,
    )


def feed_forward_bytes(config: LlmConfig, architecture: Architecture, execution: Execution) -> int:
    """Return the most bytes per token in the feed-forward part and its norm, besides what lives through a layer."""
    hidden, number = architecture.hidden_size, execution.activation_bits // _BYTE_BITS
    kept = _HABITS.get(config.spec.model_type, _LLAMA).kept_after_attention * hidden * number
    passed = kept + _passed_bytes(config, architecture, execution)
    if number == _FLOAT_BYTES or architecture.family.norm_bias:
        return passed
    # An RMS norm of 16-bit numbers takes two copies in 32 bits, a mean and its root.
    return max(passed, kept - hidden * number + 2 * (hidden + 1) * _FLOAT_BYTES)


def _passed_bytes(config: LlmConfig, architecture: Architecture, execution: Execution) -> int:
    a, parts = architecture, execution.gpu_count
    habits = _HABITS.get(config.spec.model_type, _LLAMA)
    number = execution.activation_bits // _BYTE_BITS
    dense = _dense(a.inner_size // parts, habits, gated=a.family.gated) * number
    if a.experts is None:
        return dense
    experts, per_token = a.experts, a.experts.experts_per_token or 0
    inner = experts.expert_inner_size // parts
    # Indices of grouped experts: 8 of top-k, 16 of the sort, 8 of its inverse; 4 each of two weights and the counts.
    gating = per_token * (a.hidden_size + (6 if a.family.expert_bias else 4) * inner) * number + 36 * per_token
    weighted = _FLOAT_BYTES if habits.float_routing else number
    joining = per_token * (a.hidden_size * 2 * (number + weighted) + 44)
    shared = _dense(experts.shared_inner_size // parts, habits, gated=True) * number + a.hidden_size * number
    routed = max(gating, joining) + experts.expert_count * number
    return max(routed, shared if experts.shared_inner_size else 0, dense if experts.dense_layer_count else 0)


def _dense(inner: int, habits: Habits, *, gated: bool) -> int:
    if habits.one_gate_projection:
        return 4 * inner
    return inner * max(habits.activation_tensors, 3 if gated else 0)


_WHOLE_EMBEDDING = ("gpt_neox",)
"""Families whose embedding every GPU holds whole, since transformers' plan of their parts leaves it out."""


def copied_weight_bytes(config: LlmConfig, architecture: Architecture, execution: Execution) -> float:
    """Return the bytes of weights that each GPU holds whole and that `llm_work` takes for split.

    They are position rows, biases that are added to sums, routers, and the embedding of some families.
    """
    a, parts, family = architecture, execution.gpu_count, architecture.family
    has_rows = family.position_offset is not None
    whole = (a.position_count or 0) * a.hidden_size if has_rows else 0
    if config.spec.model_type in _WHOLE_EMBEDDING:
        whole += a.vocabulary_size * a.hidden_size
    biases = a.hidden_size * (family.output_bias + (family.mlp_bias and a.experts is None))
    if family.qkv_bias and a.key_value_head_count < parts:
        biases += 2 * a.key_value_head_count * a.head_size
    router = a.experts.expert_count * a.hidden_size if a.experts else 0
    whole += a.layer_count * (biases + router)
    return whole * (1 - 1 / parts) * execution.activation_bits / _BYTE_BITS


def served_precision(config: LlmConfig, execution: Execution) -> Precision:
    """Return the number format of the weights: what the config.json says, with activations of the execution's bits."""
    stated, bits = config.precision, execution.activation_bits
    if stated.weight_bits >= stated.activation_bits:
        return replace(stated, weight_bits=bits, activation_bits=bits)
    return replace(stated, activation_bits=bits)
