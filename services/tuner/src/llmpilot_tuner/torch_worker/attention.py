"""Attention over requests that lie one after the other, and over a cache that is a pool.

Invariant: K and V are read where they lie, never copied nor, unless scores are kept, repeated; the output of all
requests is one tensor. Sources: the variable-length kernels of FlashAttention-2 (Dao, 2023); PagedAttention (Kwon et
al., 2023).
"""

import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from llmpilot_tuner.torch_worker.cache import Pool, Stretch
from llmpilot_tuner.torch_worker.fake_memory import FakeMemory

PACKED = "llmpilot_packed"
PACKED_EAGER = "llmpilot_packed_eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """What the attention of a packed step needs to know."""

    pool: Pool
    stretches: tuple[Stretch, ...]
    one_of_each: bool = False
    """Whether one request stands for all of its shape: what it takes is free again before the next one runs."""


_STEP: ContextVar[PackedStep | None] = ContextVar("packed_step", default=None)


class packed_step:  # noqa: N801 reads as the context manager that it is
    """Within it, packed attention works on this step."""

    def __init__(self, step: PackedStep) -> None:
        self._step = step

    def __enter__(self) -> None:
        self._token = _STEP.set(self._step)

    def __exit__(self, *_: object) -> None:
        _STEP.reset(self._token)


def register() -> None:
    """Make the packed attention known to transformers, by the names `PACKED` and `PACKED_EAGER`; no mask is made."""
    AttentionInterface.register(PACKED, _fused)
    AttentionInterface.register(PACKED_EAGER, _eager)


def _fused(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, None]:
    del key, value, attention_mask
    return _attend(module, query, options.get("scaling"), _fused_one), None


def _eager(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, None]:
    del key, value, attention_mask
    return _attend(module, query, options.get("scaling"), _eager_one), None


class _Attend(Protocol):
    """Attention of requests of one shape: [requests, heads, tokens, head size] in and out."""

    def __call__(self, query: Any, key: Any, value: Any, scale: float, *, context: int, is_causal: bool) -> Any:
        """Attend: context is how many tokens come before the first that asks."""


def _attend(module: Any, query: Any, scaling: float | None, attend: _Attend) -> Any:
    """Return [1, tokens, heads, head size]; query is [1, heads, tokens, head size]."""
    step = _STEP.get()
    if step is None:
        raise RuntimeError("packed attention was called outside of a packed step")
    keys, values = step.pool.layer(module.layer_idx)
    _, heads, tokens, _ = query.shape
    output = torch.empty((tokens, heads, values.shape[-1]), dtype=query.dtype, device=query.device)
    queries = query[0].transpose(0, 1)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    for stretch in step.stretches:
        own_keys, own_values = stretch.read(keys), stretch.read(values)
        if stretch.is_decode:
            new = stretch.tokens(0, stretch.request_count)
            output[new] = _decoded(queries[new], own_keys, own_values, scale, attend)
        else:
            for number in range(1 if step.one_of_each else stretch.request_count):
                new = stretch.tokens(number, number + 1)
                request = (queries[new], own_keys[number], own_values[number])
                output[new] = _read(*request, scale, context=stretch.context_tokens, attend=attend)
    return output[None]


def _read(queries: Any, keys: Any, values: Any, scale: float, *, context: int, attend: _Attend) -> Any:
    """Attend for one request, [tokens, heads, head size]."""
    query, key, value = (part.transpose(0, 1)[None] for part in (queries, keys, values))
    return attend(query, key, value, scale, context=context, is_causal=True)[0].transpose(0, 1)


def _decoded(queries: Any, keys: Any, values: Any, scale: float, attend: _Attend) -> Any:
    """Attend for requests of one length at once; the query heads of a K/V head are its queries, so none is repeated."""
    kv_heads = keys.shape[2]
    grouped = queries.unflatten(1, (kv_heads, queries.shape[1] // kv_heads))
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return attend(grouped, keys, values, scale, context=0, is_causal=False).flatten(1, 2)


def _fused_one(query: Any, key: Any, value: Any, scale: float, *, context: int, is_causal: bool) -> Any:
    grouped = query.shape[1] != key.shape[1]
    memory = FakeMemory.active()
    if context and query.shape[2] > 1 and not (memory is not None and memory.is_gpu):
        if query.device.type == "cuda":
            from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415 seconds of imports, for GPUs only

            mask = causal_lower_right(query.shape[2], key.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        return _over_context(query, key, value, scale, context)
    is_causal = is_causal and query.shape[2] > 1
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _over_context(query: Any, key: Any, value: Any, scale: float, context: int) -> Any:
    """Attend to the context and to the new tokens apart and join the two: the CPU's kernel has no such mask."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, weight = kernel(query, key[:, :, context:], value[:, :, context:], is_causal=True, scale=scale)
    earlier, earlier_weight = kernel(query, key[:, :, :context], value[:, :, :context], scale=scale)
    share = earlier_weight.sub_(weight).sigmoid_().unsqueeze(-1)
    return output.lerp_(earlier, share.to(output.dtype))


def _eager_one(query: Any, key: Any, value: Any, scale: float, *, context: int, is_causal: bool) -> Any:
    """Attend with the scores in memory, normalized in 32 bits, K and V repeated, as transformers does."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if is_causal and query.shape[2] > 1:
        rows, columns = scores.shape[-2:]
        future = torch.ones((rows, columns), dtype=torch.bool, device=scores.device).triu_(context + 1)
        scores = scores.masked_fill_(future, torch.finfo(scores.dtype).min)
    scores = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(scores, value)
