"""Where the memory of each GPU of a pod goes, line by line, and what is left for requests.

Invariant: the lines of a budget add up to what the GPU has. Sources: sizes by `sizes.py`; how a server copies its cache
when requests join a batch, what CUDA takes beside it and what a GPU really offers, from the out-of-memory errors in the
raw records of Lazuka et al., 2024.
"""

from dataclasses import dataclass

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.gpu_catalogue import BYTES_PER_GB, BYTES_PER_GIB, GpuProfile
from llmpilot_perfmodel.sizes import LlmWork

LARGEST_INPUT_TOKENS = 1868
"""Of the published workload model (fmperf); Table III of the paper asks for room for its requests."""
LARGEST_OUTPUT_TOKENS = 381
RUNTIME_BYTES = round(0.5 * BYTES_PER_GIB)
"""CUDA context, kernels and workspaces: .3 GiB on A10, .9 on H100, 1.7 on A100 in the raw records' errors."""
COLLECTIVES_BYTES = round(0.25 * BYTES_PER_GIB)
"""Buffers of the all-reduce where there is more than one GPU, an estimate; 2xA100 reported .6 GiB more than 1xA100."""
GRAPHS_BYTES = BYTES_PER_GIB
"""CUDA graphs of a paged server: what vLLM 0.19 logs for its default sizes is .5 to 1.5 GiB, an estimate."""
SCORE_BYTES = 6
"""Per attention score without flash attention: 32-bit softmax and its 16-bit result."""
LOGIT_BYTES = 6
"""Per logit of a padding server, which computes those of the whole prompt: 16 bits and their 32-bit copy."""
COPIES_OF_JOINING = 2
"""A server without pages copies the cache into a new one when requests join: old and new are alive together."""
OUT_OF_MEMORY_SHARE = 1.14
"""Tokens in the batch when a server without pages ran out of memory, over the largest safe weight: mean of the medians,
.96 to 1.38, of nine (LLM, GPU profile) in the raw records."""
FRAGMENTED_COPIES = 1
"""What the allocator holds of earlier caches and cannot give out: as much again in the raw records' errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLine:
    """A use of memory on each GPU."""

    name: str
    byte_count: float
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The memory of each GPU of a pod."""

    profile_name: str
    lines: tuple[MemoryLine, ...]
    """Everything but the requests' cache."""
    usable_bytes: int
    cache_bytes: float
    """What is left for the cache; negative: not even the rest fits."""
    kv_bytes_per_token: float
    fits: bool
    """Whether the largest request of the published workload can be served alone."""

    @property
    def token_count(self) -> int:
        """Tokens that the cache has room for if nothing is ever copied, as in a server with pages."""
        return max(0, int(self.cache_bytes // self.kv_bytes_per_token))

    @property
    def largest_batch_weight(self) -> int:
        """The largest maximum batch weight that is safe in a server without pages."""
        return self.token_count // (COPIES_OF_JOINING + FRAGMENTED_COPIES)

    @property
    def out_of_memory_tokens(self) -> int:
        """Tokens in the batch at which a server without pages is expected to run out of memory."""
        return round(OUT_OF_MEMORY_SHARE * self.largest_batch_weight)

    def block_count(self, block_size: int) -> int:
        """Return the blocks that a server with pages has."""
        return self.token_count // block_size

    def require_batch_weight(self, max_batch_weight: int) -> None:
        """Raise `PreconditionError` where the cache of such a batch alone is larger than the memory."""
        if max_batch_weight > self.token_count:
            needed = max_batch_weight * self.kv_bytes_per_token
            raise PreconditionError(
                f"a batch of {max_batch_weight:,} tokens needs {_gb(needed)} of cache on each GPU of "
                f"{self.profile_name}, {_gb(max(self.cache_bytes, 0))} are free, room for {self.token_count:,} tokens; "
                f"safe are {self.largest_batch_weight:,}"
            )

    def explain(self) -> tuple[str, ...]:
        """Return a line per use of the memory, the last one for what is left."""
        return (
            f"each GPU of {self.profile_name} offers {_gb(self.usable_bytes)}",
            *(f"- {_gb(line.byte_count)} {line.name}: {line.explanation}" for line in self.lines),
            f"= {_gb(self.cache_bytes)} for the cache, at {self.kv_bytes_per_token / 1e3:,.0f} kB a token "
            f"{self.token_count:,} tokens; largest safe maximum batch weight {self.largest_batch_weight:,}",
        )


def memory_budget(
    work: LlmWork, profile: GpuProfile, *, prefill_tokens: int = LARGEST_INPUT_TOKENS, is_paged: bool = False
) -> MemoryBudget:
    """Return where the memory of each GPU goes; prefill_tokens: those of the largest prefill.

    Raises InvalidInputError where the profile has another number of GPUs than `work` is for.
    """
    violations = []
    if work.gpu_count != profile.gpu_count:
        violations.append(Violation("gpu_count", f"{profile.name} has {profile.gpu_count}, the sizes {work.gpu_count}"))
    if prefill_tokens < 1:
        violations.append(Violation("prefill_tokens", f"must be >= 1, is {prefill_tokens}"))
    if violations:
        raise InvalidInputError(violations)
    lines = (*_fixed_lines(work, is_paged=is_paged), *_prefill_lines(work, prefill_tokens))
    usable = profile.gpu.usable_memory_bytes
    cache_bytes = usable - sum(line.byte_count for line in lines)
    largest_request = LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS
    return MemoryBudget(
        profile_name=profile.name,
        lines=lines,
        usable_bytes=usable,
        cache_bytes=cache_bytes,
        kv_bytes_per_token=work.kv_bytes_per_token,
        fits=cache_bytes >= work.kv_bytes(largest_request),
    )


def _fixed_lines(work: LlmWork, *, is_paged: bool) -> list[MemoryLine]:
    share = f" in {work.gpu_count} parts" if work.gpu_count > 1 else ""
    lines = [
        MemoryLine(
            name="weights",
            byte_count=work.weight_bytes,
            explanation=f"{work.parameter_count / 1e9:.2f} billion parameters{share}",
        )
    ]
    if work.fp32_parameter_count and work.activation_bytes == 2:  # noqa: PLR2004 16 bits
        lines.append(
            MemoryLine(
                name="weights in 32 bits",
                byte_count=2 * work.fp32_parameter_count,
                explanation="T5's second feed-forward matrices would overflow in 16 bits",
            )
        )
    lines.append(MemoryLine(name="runtime", byte_count=RUNTIME_BYTES, explanation="CUDA context and workspaces"))
    if work.gpu_count > 1:
        lines.append(
            MemoryLine(name="collectives", byte_count=COLLECTIVES_BYTES, explanation="buffers of the all-reduce")
        )
    if is_paged:
        lines.append(MemoryLine(name="graphs", byte_count=GRAPHS_BYTES, explanation="captured CUDA graphs"))
    return lines


def _prefill_lines(work: LlmWork, tokens: int) -> list[MemoryLine]:
    per_token = work.activation_bytes * (4 * work.hidden_size + 3 * work.inner_size)
    lines = [
        MemoryLine(
            name="activations",
            byte_count=tokens * per_token,
            explanation=f"the feed-forward part of a prefill of {tokens:,} tokens",
        )
    ]
    if work.is_padded:
        scores = work.head_count / work.gpu_count * tokens**2 * SCORE_BYTES
        logits = tokens * work.vocabulary_size / work.gpu_count * LOGIT_BYTES
        lines += [
            MemoryLine(name="attention scores", byte_count=scores, explanation="one layer's, without flash attention"),
            MemoryLine(name="logits", byte_count=logits, explanation="of every prompt token"),
        ]
    return lines


def _gb(byte_count: float) -> str:
    return f"{byte_count / BYTES_PER_GB:.2f} GB"
