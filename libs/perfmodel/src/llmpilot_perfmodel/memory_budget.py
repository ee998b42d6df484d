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
RUNTIME_BYTES = round(0.5 * BYTES_PER_GIB)
"""CUDA context, kernels and workspaces: .3 GiB on A10, .9 on H100, 1.7 on A100 in the raw records' errors."""
COLLECTIVES_BYTES = round(0.25 * BYTES_PER_GIB)
"""Buffers of the all-reduce where there is more than one GPU, an estimate; 2xA100 reported .6 GiB more than 1xA100."""
SCORE_BYTES = 6
"""Per attention score without flash attention: 32-bit softmax and its 16-bit result."""
LOGIT_BYTES = 6
"""Per logit of a server that computes those of the whole prompt: 16 bits and their 32-bit copy."""
CACHES_ALIVE = 3
"""A server without pages copies the whole cache in every step: the old one, the new one, and as much again in pieces
that the allocator cannot give out. Read from the raw records: there it held .5 to 2.7 of the batch in such pieces."""
PADDED_CACHES_ALIVE = 2
"""A padding server allocates layer by layer, which leaves no pieces: no load test of one ran out of memory."""
SAFE_PERCENT = 60
"""Of the largest batch weight that a tuner finds: the smallest batch of a load test that ran out of memory reached
69 % of it (starcoder's, whose server held 8 GB more than its weights, 66 %)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedServer:
    """What a server with a paged cache sets aside before it counts its pages; the defaults are those of vLLM V1."""

    gpu_memory_utilization: float = 0.9
    """The rest is left to CUDA graphs and to whatever else runs."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    sampler_bytes_per_logit: float = 22.0
    """What trying out the sampler allocates; 22: vLLM 0.19 counts 2,588 blocks for Llama-3.1-8B on an RTX 4090."""
    runtime_bytes: int = RUNTIME_BYTES

    def violations(self) -> list[Violation]:
        """Return everything that is wrong with the settings."""
        found = []
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(
                Violation("gpu_memory_utilization", f"must be > 0 and <= 1, is {self.gpu_memory_utilization}")
            )
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                found.append(Violation(name, f"must be >= 1, is {getattr(self, name)}"))
        return found


VLLM_0_2 = PagedServer(max_num_batched_tokens=2560, sampler_bytes_per_logit=58.0, runtime_bytes=0)
"""It counts what PyTorch allocated, not the CUDA context, and its sampler sorts with 64-bit indices; 58: the blocks of
Llama-2-7b and Llama-2-13b by memory share in Papaioannou and Doudali, 2024, which OPT-6.7b and OPT-13b confirm."""


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

        The largest batch that failed was .84 to 1.19 of it, mean 1.0, on seven (LLM, GPU profile).
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
        """Return a line per use of the memory, the last one for what is left."""
        safe = f", {self.safe_batch_weight:,} are safe" if self.safe_batch_weight < self.largest_batch_weight else ""
        return (
            f"each GPU of {self.profile_name} offers {_gb(self.usable_bytes)}",
            *(f"- {_gb(line.byte_count)} {line.name}: {line.explanation}" for line in self.lines),
            f"= {_gb(self.cache_bytes)} for the cache, at {self.kv_bytes_per_token / 1e3:,.0f} kB a token "
            f"{self.token_count:,} tokens; largest maximum batch weight {self.largest_batch_weight:,}{safe}",
        )


def memory_budget(
    work: LlmWork,
    profile: GpuProfile,
    *,
    prefill_tokens: int | None = None,
    is_paged: bool = False,
    paged: PagedServer | None = None,
) -> MemoryBudget:
    """Return where the memory of each GPU goes.

    prefill_tokens: the most that one prefill of a server without pages has; None: it may be as large as the batch.
    paged: settings of a server with pages; None: vLLM's defaults if `is_paged`. Raises InvalidInputError with
    everything that is wrong, also where the profile has another number of GPUs than `work` is for.
    """
    paged = paged or (PagedServer() if is_paged else None)
    _require(work, profile, prefill_tokens, paged)
    usable = profile.gpu.usable_memory_bytes
    largest_request = work.kv_bytes(LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS)
    if paged is not None:
        lines = (*_fixed_lines(work, paged.runtime_bytes), *_paged_lines(work, usable, paged))
        cache_bytes = usable - sum(line.byte_count for line in lines)
        weight = safe_weight = max(0, int(cache_bytes // work.kv_bytes_per_token))
        fits = cache_bytes >= largest_request
    else:
        prefill = _largest_phase(_prefill_phases(work, prefill_tokens or LARGEST_INPUT_TOKENS))
        lines = (*_fixed_lines(work, RUNTIME_BYTES), prefill)
        cache_bytes = usable - sum(line.byte_count for line in lines)
        weight = _largest_batch_weight(work, cache_bytes, prefill, is_limited=prefill_tokens is not None)
        safe_weight = weight if work.is_padded else weight * SAFE_PERCENT // 100
        fits = weight >= LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS
    return MemoryBudget(
        profile_name=profile.name,
        lines=lines,
        usable_bytes=usable,
        cache_bytes=cache_bytes,
        kv_bytes_per_token=work.kv_bytes_per_token,
        largest_batch_weight=weight,
        safe_batch_weight=safe_weight,
        fits=fits,
    )


def _require(work: LlmWork, profile: GpuProfile, prefill_tokens: int | None, paged: PagedServer | None) -> None:
    violations = paged.violations() if paged is not None else []
    if work.gpu_count != profile.gpu_count:
        violations.append(Violation("gpu_count", f"{profile.name} has {profile.gpu_count}, the sizes {work.gpu_count}"))
    if prefill_tokens is not None and prefill_tokens < 1:
        violations.append(Violation("prefill_tokens", f"must be >= 1, is {prefill_tokens}"))
    if violations:
        raise InvalidInputError(violations)


def _largest_batch_weight(work: LlmWork, cache_bytes: float, prefill: MemoryLine, *, is_limited: bool) -> int:
    """Return the tokens at which a step's copies or, if nothing limits it, a prefill of the whole batch fill the GPU."""
    caches = PADDED_CACHES_ALIVE if work.is_padded else CACHES_ALIVE
    weight = cache_bytes / (caches * work.kv_bytes_per_token)
    if not is_limited:
        per_token = work.kv_bytes_per_token + prefill.byte_count / LARGEST_INPUT_TOKENS
        weight = min(weight, (cache_bytes + prefill.byte_count) / per_token)
    return max(0, int(weight))


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


def _paged_lines(work: LlmWork, usable: int, server: PagedServer) -> list[MemoryLine]:
    sampler = MemoryLine(
        name="sampler",
        byte_count=server.max_num_seqs * work.vocabulary_size * server.sampler_bytes_per_logit,
        explanation=f"logits of {server.max_num_seqs:,} sequences, sorted",
    )
    return [
        MemoryLine(
            name="left alone",
            byte_count=usable * (1 - server.gpu_memory_utilization),
            explanation=f"gpu_memory_utilization {server.gpu_memory_utilization:g}: CUDA graphs and others",
        ),
        _largest_phase([_feed_forward(work, server.max_num_batched_tokens), sampler]),
    ]


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
