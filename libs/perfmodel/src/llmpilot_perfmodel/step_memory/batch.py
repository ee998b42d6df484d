"""One step of an inference server: which requests are in it, and what it keeps in memory for them.

Invariant: a batch is arithmetic, it holds no data; what a probe runs and what a formula counts is the same batch.
"""

from dataclasses import dataclass
from enum import StrEnum


class Layout(StrEnum):
    """How a server lays requests and their cache out in memory."""

    PACKED = "packed"
    """Tokens of all requests one after the other, none wasted; the cache is a pool that is written in place."""
    PADDED = "padded"
    """A rectangle as wide as the longest request; in every step the cache of a layer is copied to grow."""


class Attention(StrEnum):
    """How attention is computed."""

    FUSED = "fused"
    """Scores are never kept: flash attention, or PyTorch's scaled_dot_product_attention."""
    EAGER = "eager"
    """The scores of a layer lie in memory, in 32 bits where they are normalized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Requests of one shape."""

    request_count: int
    input_tokens: int
    """Of each request: of a prefill those that this step reads, of others those that were read."""
    output_tokens: int = 0
    """Of each request. A prefill has room for the one it makes; in a decode step the one made now is among them."""
    context_tokens: int = 0
    """Of each request of a chunked prefill: input tokens read by earlier steps."""

    @property
    def sequence_tokens(self) -> int:
        """Tokens of each request."""
        return self.context_tokens + self.input_tokens + self.output_tokens

    @property
    def token_count(self) -> int:
        """Tokens of all requests."""
        return self.request_count * self.sequence_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: it reads the input of `prefill`, makes one token for each of `decode`, and leaves `residents` alone."""

    case: str
    """Which extreme it is, e.g. "prefill_long"."""
    prefill: tuple[Rows, ...] = ()
    decode: tuple[Rows, ...] = ()
    residents: tuple[Rows, ...] = ()
    """Requests whose cache lies in memory meanwhile."""
    pool_tokens: int = 0
    """PACKED: tokens that the pool of the cache has room for; PADDED: 0, the cache is as large as its requests."""
    copied_tokens: int = 0
    """Tokens whose cache lies in memory once more: a server that copies, or concatenates, whole caches."""
    all_logits: bool = False
    """Whether the logits of every input token are computed, as for log-probabilities of the prompt."""

    @property
    def request_count(self) -> int:
        """Requests in the batch."""
        return sum(rows.request_count for rows in (*self.prefill, *self.decode, *self.residents))

    @property
    def token_count(self) -> int:
        """Tokens of all requests, each counted once: the instantaneous weight of a server that counts tokens."""
        return sum(rows.token_count for rows in (*self.prefill, *self.decode, *self.residents))

    @property
    def prefill_tokens(self) -> int:
        """Input tokens that the step reads."""
        return sum(rows.request_count * rows.input_tokens for rows in self.prefill)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a batch is executed."""

    layout: Layout
    attention: Attention = Attention.FUSED
    gpu_count: int = 1
    """GPUs that the LLM is sharded over (tensor parallelism); memory is of each."""
    activation_bits: int = 16
    """Of weights, activations and cache: 16 or 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """The memory of each GPU at the peak of a step."""

    weight_bytes: float
    cache_bytes: float
    """Of all requests, what is copied included."""
    working_bytes: float
    """Everything else that is alive at the peak."""
    phase: str
    """What the step is doing at its peak, e.g. "feed-forward", "logits"."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes
