"""Counts the parameters of a transformer from its sizes.

Invariant: every weight is counted once, tied embeddings too. Buffers (rotary tables, attention masks) are not
parameters. Source: the shapes of the weights in Hugging Face's transformers.
"""

from llmpilot_perfmodel.architecture import Architecture, Experts, Family, LatentAttention, T5Architecture


def decoder_parameter_count(architecture: Architecture) -> int:
    """Return the number of parameters of a decoder-only LLM."""
    a, family = architecture, architecture.family
    layers = a.layer_count * (_attention(a) + family.norms_per_layer * _norm(family, a.hidden_size))
    if a.experts is None:
        layers += a.layer_count * _mlp(family, a.hidden_size, a.inner_size)
    else:
        dense_layer_count = min(a.experts.dense_layer_count, a.layer_count)
        layers += dense_layer_count * _mlp(family, a.hidden_size, a.inner_size)
        layers += (a.layer_count - dense_layer_count) * _mixture(a, a.experts)
    return layers + _embeddings(a) + _norm(family, a.hidden_size)


def t5_parameter_count(architecture: T5Architecture) -> int:
    """Return the number of parameters of an encoder-decoder LLM built like T5."""
    a = architecture
    attention = 4 * a.hidden_size * a.head_count * a.head_size
    mlp = (3 if a.gated else 2) * a.hidden_size * a.inner_size
    encoder_layer = attention + mlp + 2 * a.hidden_size
    decoder_layer = 2 * attention + mlp + 3 * a.hidden_size
    per_stack = a.hidden_size + a.bucket_count * a.head_count
    embeddings = a.vocabulary_size * a.hidden_size * (1 if a.tied else 2)
    return a.encoder_layer_count * encoder_layer + a.decoder_layer_count * decoder_layer + 2 * per_stack + embeddings


def expert_parameter_count(architecture: Architecture) -> int:
    """Return the number of parameters of one expert of one layer; 0: there are no experts."""
    experts = architecture.experts
    if experts is None:
        return 0
    matrices = 3 * architecture.hidden_size * experts.expert_inner_size
    return matrices + (2 * experts.expert_inner_size + architecture.hidden_size) * architecture.family.expert_bias


def norm_parameter_count(architecture: Architecture) -> int:
    """Return the number of parameters of all norms, but those of queries and keys."""
    a, family = architecture, architecture.family
    return (a.layer_count * family.norms_per_layer + 1 + family.embedding_norm) * _norm(family, a.hidden_size)


def _embeddings(a: Architecture) -> int:
    total = a.vocabulary_size * a.hidden_size * (1 if a.tied else 2)
    if a.family.position_offset is not None:
        total += ((a.position_count or 0) + a.family.position_offset) * a.hidden_size
    if a.family.embedding_norm:
        total += _norm(a.family, a.hidden_size)
    if a.family.output_projection_bias:
        total += a.vocabulary_size
    return total


def _attention(a: Architecture) -> int:
    if a.latent_attention is not None:
        return _latent_attention(a, a.latent_attention)
    query_size = a.head_count * a.head_size
    key_value_size = a.key_value_head_count * a.head_size
    total = _linear(a.hidden_size, query_size + 2 * key_value_size, bias=a.family.qkv_bias)
    total += _linear(query_size, a.hidden_size, bias=a.family.output_bias)
    if a.family.query_key_norm == "head":
        total += 2 * a.head_size
    elif a.family.query_key_norm == "all":
        total += query_size + key_value_size
    return total + (a.head_count if a.family.attention_sinks else 0)


def _latent_attention(a: Architecture, latent: LatentAttention) -> int:
    query_size = a.head_count * (latent.nope_head_size + latent.rope_head_size)
    if latent.query_rank is None:
        total = a.hidden_size * query_size
    else:
        total = latent.query_rank * (a.hidden_size + query_size + 1)
    total += a.hidden_size * (latent.key_value_rank + latent.rope_head_size) + latent.key_value_rank
    total += latent.key_value_rank * a.head_count * (latent.nope_head_size + latent.value_head_size)
    return total + a.head_count * latent.value_head_size * a.hidden_size


def _mlp(family: Family, hidden_size: int, inner_size: int) -> int:
    up = _linear(hidden_size, inner_size, bias=family.mlp_bias)
    return (2 if family.gated else 1) * up + _linear(inner_size, hidden_size, bias=family.mlp_bias)


def _mixture(a: Architecture, experts: Experts) -> int:
    router = _linear(a.hidden_size, experts.expert_count, bias=a.family.router_bias)
    return experts.expert_count * expert_parameter_count(a) + router + 3 * a.hidden_size * experts.shared_inner_size


def _linear(input_size: int, output_size: int, *, bias: bool) -> int:
    return (input_size + (1 if bias else 0)) * output_size


def _norm(family: Family, size: int) -> int:
    return 2 * size if family.norm_bias else size
