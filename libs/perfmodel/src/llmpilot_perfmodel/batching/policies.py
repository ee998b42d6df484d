"""The scheduling policies of inference servers, as settings.

Invariant: a policy holds what an operator of that server would set, with the server's own default.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TgisPolicy:
    """Text Generation Inference Server (IBM): batches limited by weight, prefill preempts decode."""

    max_batch_weight: int
    """Tokens that a batch may reach: input plus maximum output, summed; squared shapes for a padding server."""
    max_batch_size: int = 256
    max_waiting_tokens: int = 12
    """Decode steps after which waiting requests are let in whatever the size of their batch."""
    is_padded: bool = False
    """Whether every sequence takes the length of the longest, as without flash attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiPolicy:
    """Text Generation Inference (Hugging Face): batches limited by total tokens."""

    max_batch_total_tokens: int
    max_batch_prefill_tokens: int = 4096
    max_batch_size: int = 1024
    max_waiting_tokens: int = 20
    waiting_served_ratio: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm0Policy:
    """vLLM 0.2: prefill first, whole prompts, preemption by recomputation."""

    block_count: int
    block_size: int = 16
    max_num_batched_tokens: int = 2560
    max_num_seqs: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm1Policy:
    """vLLM V1: decode first, prompts in chunks, preemption when no block is free."""

    block_count: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    enable_prefix_caching: bool = True


Policy = TgisPolicy | TgiPolicy | Vllm0Policy | Vllm1Policy
