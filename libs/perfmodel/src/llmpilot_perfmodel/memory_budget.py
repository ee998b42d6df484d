"""Where the memory of each GPU of a pod goes, line by line, and what is left for requests.

Invariant: the lines of a budget and its cache add up to what the GPU has. Sources: sizes by `sizes.py`; how TGIS copies
its cache in every step and computes the logits of whole prompts, its own flash_causal_lm.py of 2023; what a GPU really
offers and when such a server ran out of it, the errors in the raw records of Lazuka et al., 2024.
"""

from dataclasses import dataclass

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.gpu_catalogue import BYTES_PER_GB, BYTES_PER_GIB, GpuProfile
from llmpilot_perfmodel.sizes import LlmWork

LARGEST_INPUT_TOKENS = 874
"""Of the requests that every load test of Lazuka et al., 2024, draws from; Table III asks for room for the largest."""
LARGEST_OUTPUT_TOKENS = 381
RUNTIME_GIB = 0.88
"""Where the catalogue states none: the mean of the four GPUs of the raw records."""
COLLECTIVES_BYTES = round(0.57 * BYTES_PER_GIB)
"""Buffers of the all-reduce: 2xA100 reported so much more than 1xA100."""
SCORE_BYTES = 6
"""Per attention score without flash attention: 32-bit softmax and its 16-bit result."""
LOGIT_BYTES = 6
"""Per logit of a server that computes those of the whole prompt: 16 bits and their 32-bit copy."""
CACHES_ALIVE = 3
"""A server without pages copies the whole cache in every step: the old one, the new one, and as much again in pieces
that the allocator cannot give out. In the raw records this gives the weights that a tuner had found within 20 %."""
PADDED_CACHES_ALIVE = 2
"""A padding server copies layer by layer, which leaves no such pieces: no load test of one ran out of memory."""
SAFE_PERCENT = 65
"""Of what a tuner finds: in none of the 20 of 262 load tests that ran out of memory did the batch stay below 69 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedServer:
    """What a server with a paged cache sets aside before it counts its pages; the defaults are those of vLLM V1."""

    gpu_memory_utilization: float = 0.9
    """The rest is left to CUDA graphs and to whatever else runs."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    sampler_bytes_per_logit: float = 22.0
    """What trying out the sampler allocates; 22: vLLM 0.19 counts 2,588 blocks for Llama-3.1-8B on an RTX 4090."""
    runtime_bytes: int = round(0.5 * BYTES_PER_GIB)
    """CUDA context, kernels and workspaces."""

    def violations(self) -> list[Violation]:
        """Return everything that is wrong with the settings."""
        found = []
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(Violation("gpu_memory_utilization", f"must be > 0 and <= 1, is {self.gpu_memory_utilization}"))
        counts = {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}
        found += [Violation(name, f"must be >= 1, is {count}") for name, count in counts.items() if count < 1]
        return found


VLLM_0_2 = PagedServer(max_num_batched_tokens=2560, sampler_bytes_per_logit=59.0, runtime_bytes=0)
"""It counts what PyTorch allocated, not the CUDA context, and its sampler sorts with 64-bit indices; 59: the blocks of
four LLMs at 18 memory shares, within 6 blocks; Papaioannou and Doudali, 2024, who ran it with 2,048 sequences."""


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
    """Of a token that every layer keeps; layers with a sliding window keep fewer."""
    largest_batch_weight: int
    """The largest maximum batch weight that a tuner's corner cases pass; of a paged server, the tokens of its pages."""
    limit: str
    """Why it is no larger."""
    safe_batch_weight: int
    """The largest below which no load test ran out of memory: a tuner does not see the allocator's pieces grow."""
    fits: bool
    """Whether the largest request of the published load tests can be served."""

    @property
    def token_count(self) -> int:
        """Tokens that the cache has room for if nothing is ever copied, as in a server with pages."""
        return max(0, int(self.cache_bytes // self.kv_bytes_per_token))

    @property
    def out_of_memory_tokens(self) -> int:
        """Tokens in the batch beyond which a server without pages runs out of memory.

        The largest batch that failed was .83 to 1.27 of it, mean 1.02, on eight (LLM, GPU profile) of the raw records.
        """
        return self.largest_batch_weight

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
                f"a tuner would find {self.largest_batch_weight:,}"
            )

    def explain(self) -> tuple[str, ...]:
        """Return a line per use of the memory, then what is left and what it means for the maximum batch weight."""
        safe = f", {self.safe_batch_weight:,} are safe" if self.safe_batch_weight < self.largest_batch_weight else ""
        return (
            f"each GPU of {self.profile_name} offers {_gb(self.usable_bytes)}",
            *(f"- {_gb(line.byte_count)} {line.name}: {line.explanation}" for line in self.lines),
            f"= {_gb(self.cache_bytes)} for the cache, at {self.kv_bytes_per_token / 1e3:,.0f} kB a token "
            f"{self.token_count:,} tokens",
            f"largest batch {self.largest_batch_weight:,} tokens{safe}: {self.limit}",
        )


def memory_budget(
    work: LlmWork,
    profile: GpuProfile,
    *,
    prefill_tokens: int | None = None,
    paged: PagedServer | None = None,
) -> MemoryBudget:
    """Return where the memory of each GPU goes.

    prefill_tokens: the most that one prefill of a server without pages has; None: it may be as large as the batch.
    paged: settings of a server with pages; None: it has none. Raises InvalidInputError with
    everything that is wrong, also where the profile has another number of GPUs than `work` is for.
    """
    _require(work, profile, prefill_tokens, paged)
    usable = profile.gpu.usable_memory_bytes
    if paged is not None:
        phase = _largest_phase(_paged_phases(work, paged))
        lines = (*_fixed_lines(work, paged.runtime_bytes), _left_alone(usable, paged), phase)
    else:
        phase = _largest_phase(_prefill_phases(work, prefill_tokens or LARGEST_INPUT_TOKENS))
        runtime_gib = profile.gpu.runtime_memory_gib or RUNTIME_GIB
        lines = (*_fixed_lines(work, round(runtime_gib * BYTES_PER_GIB)), phase)
    cache_bytes = usable - sum(line.byte_count for line in lines)
    weight, limit = cache_bytes / work.kv_bytes_per_token, "pages are never copied"
    if paged is None:
        copied, limit = _largest_batch_weight(work, cache_bytes, phase, is_limited=prefill_tokens is not None)
        weight = min(weight, copied)
    largest = max(0, int(weight))
    return MemoryBudget(
        profile_name=profile.name,
        lines=lines,
        usable_bytes=usable,
        cache_bytes=cache_bytes,
        kv_bytes_per_token=work.kv_bytes_per_token,
        largest_batch_weight=largest,
        limit=limit,
        safe_batch_weight=largest if work.is_padded or paged is not None else largest * SAFE_PERCENT // 100,
        fits=largest >= LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS,
    )


def _require(work: LlmWork, profile: GpuProfile, prefill_tokens: int | None, paged: PagedServer | None) -> None:
    violations = paged.violations() if paged is not None else []
    if work.gpu_count != profile.gpu_count:
        violations.append(Violation("gpu_count", f"{profile.name} has {profile.gpu_count}, the sizes {work.gpu_count}"))
    if prefill_tokens is not None and prefill_tokens < 1:
        violations.append(Violation("prefill_tokens", f"must be >= 1, is {prefill_tokens}"))
    if violations:
        raise InvalidInputError(violations)


def _largest_batch_weight(
    work: LlmWork, cache_bytes: float, prefill: MemoryLine, *, is_limited: bool
) -> tuple[float, str]:
    """Return the tokens at which the copies of a decode step or a prefill, each in its turn, fill the GPU."""
    kv_bytes = work.kv_bytes_per_token
    caches = PADDED_CACHES_ALIVE if work.is_padded else CACHES_ALIVE
    room = cache_bytes + prefill.byte_count
    prefilled = cache_bytes / kv_bytes if is_limited else room / (kv_bytes + prefill.byte_count / LARGEST_INPUT_TOKENS)
    return min(
        (room / (caches * kv_bytes), f"the server copies the cache in every step, which takes {caches} times its size"),
        (prefilled, f"a prefill of so many tokens needs as much for cache and {prefill.name}"),
    )


def _fixed_lines(work: LlmWork, runtime_bytes: int) -> list[MemoryLine]:
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
    lines.append(MemoryLine(name="runtime", byte_count=runtime_bytes, explanation="CUDA context and workspaces"))
    if work.gpu_count > 1:
        lines.append(
            MemoryLine(name="collectives", byte_count=COLLECTIVES_BYTES, explanation="buffers of the all-reduce")
        )
    return lines


def _left_alone(usable: int, server: PagedServer) -> MemoryLine:
    return MemoryLine(
        name="left alone",
        byte_count=usable * (1 - server.gpu_memory_utilization),
        explanation=f"gpu_memory_utilization {server.gpu_memory_utilization:g}: CUDA graphs and others",
    )


def _paged_phases(work: LlmWork, server: PagedServer) -> list[MemoryLine]:
    sampler = MemoryLine(
        name="sampler",
        byte_count=server.max_num_seqs * work.vocabulary_size * server.sampler_bytes_per_logit,
        explanation=f"logits of {server.max_num_seqs:,} sequences, sorted",
    )
    return [_feed_forward(work, server.max_num_batched_tokens), sampler]


def _prefill_phases(work: LlmWork, tokens: int) -> list[MemoryLine]:
    phases = [_feed_forward(work, tokens)]
    if not work.encoder_layer_count:
        logits = tokens * work.vocabulary_size * LOGIT_BYTES
        phases.append(MemoryLine(name="logits", byte_count=logits, explanation=f"of {tokens:,} prompt tokens"))
    if work.is_padded:
        scores = work.head_count / work.gpu_count * tokens**2 * SCORE_BYTES
        phases.append(
            MemoryLine(
                name="attention scores",
                byte_count=scores,
                explanation=f"of a layer and a prompt of {tokens:,} tokens, without flash attention",
            )
        )
    return phases


def _feed_forward(work: LlmWork, tokens: int) -> MemoryLine:
    """Return four vectors of the hidden size and three of the feed-forward width for every token."""
    per_token = work.activation_bytes * (4 * work.hidden_size + 3 * work.inner_size)
    return MemoryLine(
        name="activations",
        byte_count=tokens * per_token,
        explanation=f"the feed-forward part of a prefill of {tokens:,} tokens",
    )


def _largest_phase(phases: list[MemoryLine]) -> MemoryLine:
    """Return the phase that needs most; they follow each other, so the others fit into its memory."""
    return max(phases, key=lambda phase: phase.byte_count)


def _gb(byte_count: float) -> str:
    return f"{byte_count / BYTES_PER_GB:.2f} GB"
