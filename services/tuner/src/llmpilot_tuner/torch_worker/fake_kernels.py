"""What kernels allocate, where fake tensors would take another path.

Invariant: each function makes the tensors that the real kernel makes, in its order, and returns what it returns.
Sources: PyTorch 2.13, aten/src/ATen/native/transformers/attention.cpp and cpu/FlashAttentionKernel.cpp; the CPU's
sizes were compared with the allocations that torch's profiler sees.
"""

from collections.abc import Callable
from typing import Any

import torch

_KEY_BLOCK = 512
"""Keys that the CPU's kernel scores at once."""
_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
"""(From so many queries, so many are scored at once), by the CPU's kernel."""
_LARGEST_FLASH_HEAD = 256
_MASK_ALIGNMENT = 8


def attention(  # noqa: PLR0917 the signature of what it stands for
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    is_gpu: bool,
) -> Any:
    """Stand for scaled_dot_product_attention: [requests, heads, tokens, head size] in and out."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
    if not is_gpu:
        return _cpu_kernel(query, key, value)[0]
    is_flash = attn_mask is None and query.dtype.itemsize == 2 and query.shape[-1] <= _LARGEST_FLASH_HEAD  # noqa: PLR2004
    if enable_gqa and not is_flash:
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    padded = _aligned(attn_mask)
    output = _output(query, value)
    weights = _weights(query) if is_flash else None
    del padded, weights
    return output


def cpu_attention(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
    is_gpu: bool,
) -> tuple[Any, Any]:
    """Stand for _scaled_dot_product_flash_attention_for_cpu."""
    del dropout_p, is_causal, attn_mask, scale, is_gpu
    return _cpu_kernel(query, key, value)


def _cpu_kernel(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    output, weights = _output(query, value), _weights(query)
    query_count, key_count = query.shape[2], key.shape[2]
    rows = min(query_count, next(size for least, size in _QUERY_BLOCKS if query_count >= least))
    columns = min(key_count, _KEY_BLOCK)
    threads = torch.get_num_threads()
    scores = torch.empty((threads, rows * (columns + 2 + query.shape[-1])), dtype=torch.float32, device=query.device)
    reduced = None
    if query.dtype.itemsize == 2:  # noqa: PLR2004
        reduced = torch.empty((threads, rows, columns), dtype=query.dtype, device=query.device)
    del scores, reduced
    return output, weights


def _output(query: Any, value: Any) -> Any:
    requests, heads, tokens, _ = query.shape
    output = torch.empty((requests, tokens, heads, value.shape[-1]), dtype=query.dtype, device=query.device)
    return output.transpose(1, 2)


def _weights(query: Any) -> Any:
    """Return the logarithms of the sums of the scores."""
    requests, heads, tokens, _ = query.shape
    return torch.empty((requests, tokens, heads), dtype=torch.float32, device=query.device).transpose(1, 2)


def _aligned(mask: Any) -> Any:
    """Return the copy of a mask whose rows the GPU's kernel cannot read as they lie, or None."""
    if mask is None or mask.shape[-1] % _MASK_ALIGNMENT == 0:
        return None
    length = -(-mask.shape[-1] // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    return torch.empty((*mask.shape[:-1], length), dtype=mask.dtype, device=mask.device)


def grouped_product(mat_a: Any, mat_b: Any, offs: Any = None, *_: Any, is_gpu: bool, **__: Any) -> Any:
    """Stand for _grouped_mm of rows that are sorted by expert: [rows, in], [experts, in, out] -> [rows, out]."""
    del offs, is_gpu
    return torch.empty((mat_a.shape[0], mat_b.shape[-1]), dtype=mat_a.dtype, device=mat_a.device)


def dropout(tensor: Any, p: float, train: bool, *, is_gpu: bool) -> Any:
    """Stand for dropout in inference, which copies nothing; its decomposition for fake tensors does."""
    del p, train, is_gpu
    return tensor


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: cpu_attention,
    torch.ops.aten.dropout.default: dropout,
}
"""By the operation that they stand for."""
if hasattr(torch.ops.aten, "_grouped_mm"):  # PyTorch 2.8 has it
    KERNELS[torch.ops.aten._grouped_mm.default] = grouped_product
