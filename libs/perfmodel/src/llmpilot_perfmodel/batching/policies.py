"""The scheduling policies of inference servers, as settings.

Invariant: a policy holds what an operator of that server would set, with the server's own default.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum

from llmpilot_contracts.errors import Violation

LARGEST_COUNT = 2**40
"""No server has more tokens, blocks or sequences; keeps the arithmetic of the compiled code far from overflow."""


class WeightDefinition(StrEnum):
    """What a server calls the weight of a batch of n requests."""

    TOKENS = "tokens"
    """Input and output tokens of all requests; vLLM: those its KV blocks have room for."""
    PADDED_SQUARED = "padded-squared"
    """n times the square of the longest request's input and output tokens."""

    def weight(self, request_count: int, sequence_tokens: int) -> int:
        """Return the weight of so many requests of so many input and output tokens each."""
        if self is WeightDefinition.TOKENS:
            return request_count * sequence_tokens
        return request_count * sequence_tokens**2

    def longest(self, request_count: int, weight: int) -> int:
        """Return the most tokens that each of so many requests can have within a weight."""
        each = weight // request_count
        return each if self is WeightDefinition.TOKENS else math.isqrt(each)


TGIS_BATCH_SIZE = 256
"""TGIS's default of max_batch_size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TgisPolicy:
    """Text Generation Inference Server (IBM): batches limited by weight, prefill preempts decode."""

    max_batch_weight: int
    """Of what a batch may ever reach, input and largest output."""
    max_batch_size: int = TGIS_BATCH_SIZE
    max_waiting_tokens: int = 12
    """Decode steps after which waiting requests are let in whatever their number."""
    is_padded: bool = False
    """Whether every sequence takes the length of the longest, as without flash attention."""

    @property
    def weight_definition(self) -> WeightDefinition:
        """What it calls the weight of a batch."""
        return WeightDefinition.PADDED_SQUARED if self.is_padded else WeightDefinition.TOKENS


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
    max_paddings: int | None = None
    """None: prompts are laid end to end; a number: they are padded to the longest, with at most that much padding, as
    from 0.2.2 on, whose default was 256."""

    @property
    def watermark_block_count(self) -> int:
        """The blocks that admission leaves free: 1 %."""
        return self.block_count // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm1Policy:
    """vLLM V1: decode first, prompts in chunks, preemption when no block is free."""

    block_count: int
    """Those that requests may hold: one less than vLLM's `num_gpu_blocks`."""
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    enable_prefix_caching: bool = True


Policy = TgisPolicy | TgiPolicy | Vllm0Policy | Vllm1Policy

_MAY_BE_ZERO = ("max_waiting_tokens", "waiting_served_ratio", "max_paddings")


def policy_violations(policy: Policy) -> Iterator[Violation]:
    """Yield everything that is wrong with the numbers of a policy."""
    for field in fields(policy):
        value = getattr(policy, field.name)
        name = f"policy.{field.name}"
        least = 0 if field.name in _MAY_BE_ZERO else 1
        if value is None or isinstance(value, bool):
            continue
        if field.type is float or isinstance(value, float):
            if field.type is not float or not math.isfinite(value) or value < 0:
                kind = "a finite number >= 0" if field.type is float else "a whole number"
                yield Violation(name, f"must be {kind}, is {value!r}")
        elif not least <= value <= LARGEST_COUNT:
            yield Violation(name, f"must be between {least} and {LARGEST_COUNT}, is {value}")


def fit_violations(policy: Policy, input_tokens: int, max_output_tokens: int) -> Iterator[Violation]:
    """Yield why a request could never be scheduled; max_output_tokens: the most it may generate."""
    total = input_tokens + max_output_tokens
    match policy:
        case TgisPolicy():
            weight = policy.weight_definition.weight(1, total)
            if weight > policy.max_batch_weight:
                yield Violation(
                    "max_output_tokens",
                    f"input and output may have {total} tokens, which weigh {weight}; max_batch_weight "
                    f"is {policy.max_batch_weight}",
                )
        case TgiPolicy():
            if input_tokens > policy.max_batch_prefill_tokens:
                yield Violation(
                    "input_tokens",
                    f"must be at most max_batch_prefill_tokens {policy.max_batch_prefill_tokens}, is {input_tokens}",
                )
            if total > policy.max_batch_total_tokens:
                yield Violation(
                    "max_output_tokens",
                    f"input and output may have {total} tokens, max_batch_total_tokens is "
                    f"{policy.max_batch_total_tokens}",
                )
        case Vllm0Policy() | Vllm1Policy():
            yield from _block_violations(policy, input_tokens, max_output_tokens)


def _block_violations(policy: Vllm0Policy | Vllm1Policy, input_tokens: int, output_tokens: int) -> Iterator[Violation]:
    size = policy.block_size
    needed = -(-(input_tokens + output_tokens - 1) // size)  # the last token is never computed on
    available = policy.block_count
    if isinstance(policy, Vllm0Policy):
        # A preempted sequence comes back with all it has generated as its prompt, in one piece.
        if input_tokens + output_tokens - 1 > policy.max_num_batched_tokens:
            yield Violation(
                "input_tokens",
                f"input and output have {input_tokens + output_tokens} tokens, which max_num_batched_tokens "
                f"{policy.max_num_batched_tokens} cannot recompute in one piece",
            )
        available -= policy.watermark_block_count
    if needed > available:
        yield Violation(
            "input_tokens",
            f"input and output need {needed} blocks of {size} tokens, the server has {available} for a request",
        )
