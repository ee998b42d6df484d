"""The memory of a step of a decoder-only LLM.

A step passes few moments that can be its peak: the rotation of queries and keys, the growth of the cache, attention,
the feed-forward part, the logits. Each is the sum of the tensors that are alive then in Hugging Face's transformers, in
the last layer, when the cache is complete.

Invariant: linear in the tokens of a step, but for scores and masks. Not counted: workspaces of kernels. Approximate:
layers with a sliding window (their cache is cut, their masks and the copies that grow them are not) and latent
attention (the cache is the latent vector that servers keep, not the heads that transformers unfolds from it).
"""

from collections.abc import Iterable, Iterator, Sequence

from llmpilot_perfmodel.architecture import Architecture
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows, StepMemory
from llmpilot_perfmodel.step_memory.moment import (
    INDEX_BYTES,
    SCORE_BYTES,
    Amount,
    Floats,
    Moment,
    larger,
    most_bytes,
    step_peak,
)
from llmpilot_perfmodel.step_memory.rank_sizes import (
    copied_weight_bytes,
    feed_forward_bytes,
    rank_sizes,
    served_precision,
)


class DecoderMemory:
    """The memory of any step of one decoder-only LLM under one execution."""

    def __init__(self, config: LlmConfig, architecture: Architecture, execution: Execution) -> None:
        self._work = llm_work(config, execution.gpu_count, served_precision(config, execution))
        self._weight_bytes = self._work.weight_bytes + copied_weight_bytes(config, architecture, execution)
        self._sizes = s = rank_sizes(config, architecture, execution)
        self._is_packed = execution.layout is Layout.PACKED
        self._is_eager = execution.attention is Attention.EAGER
        self._b = b = s.number_bytes
        held = s.carried * s.hidden * b
        self._rotating = held + (s.hidden + s.rotating) * b
        self._growing = held + (s.hidden + s.written) * b
        self._attending = held + (s.hidden + s.projected) * b
        self._attended = s.attended * b
        self._kernel = s.output * b + SCORE_BYTES * s.head_count
        """Bytes per token that fused attention makes: its output, and for each head the logarithm of a sum."""
        self._feed_forward = held + feed_forward_bytes(config, architecture, execution)
        self._position = INDEX_BYTES + (2 * s.rotary + (s.hidden if s.has_position_rows else 0)) * b
        """Bytes per token of its position: the number, and its cosines and sines or its row."""
        self._softmax = 2 * b if b == SCORE_BYTES else b + 2 * SCORE_BYTES
        """Bytes per score at their most: two tensors; of 16 bits one, which is there twice more in 32 bits."""
        self._is_grouped = s.head_count != s.key_value_head_count
        self._hidden = s.hidden * b
        self._row = s.vocabulary * b
        self._gathered_row = self._row + self._row / s.gpu_count if s.gpu_count > 1 else self._row

    def of(self, batch: Batch) -> StepMemory:
        """Return the memory of a step."""
        moments = self._packed(batch) if self._is_packed else self._padded(batch)
        return step_peak(self._weight_bytes, moments)

    def prefill_bytes(
        self, n: Amount, length: Amount, residents: Iterable[tuple[Amount, Amount]], *, all_logits: bool
    ) -> Floats:
        """Return what each of many padded prefills takes beside the weights; see `StepMemoryModel`."""
        kept = sum((self._cache(count, tokens) for count, tokens in residents), start=0.0)
        return most_bytes(self._padded_prefill(n, length, kept, all_logits=all_logits))

    def decode_bytes(self, n: Amount, inputs: Amount, outputs: Amount) -> Floats:
        """Return what each of many padded decode steps takes beside the weights; see `StepMemoryModel`."""
        return most_bytes(self._padded_decode(n, inputs + outputs, 0.0))

    def _padded(self, batch: Batch) -> Iterator[Moment]:
        kept: Amount = self._work.kv_bytes_per_token * batch.copied_tokens
        for rows in batch.residents:
            kept += self._cache(rows.request_count, rows.sequence_tokens)
        decoding, length = _rectangle(batch.decode)
        if batch.prefill:
            n, read = _rectangle(batch.prefill, is_prefill=True)
            before = kept + (self._cache(decoding, length - 1) if decoding else 0)
            yield from self._padded_prefill(n, read, before, all_logits=batch.all_logits)
            kept += self._cache(n, read)
        elif not batch.decode:
            yield Moment("idle", 0, kept)
        if batch.decode:
            yield from self._padded_decode(decoding, length, kept)

    def _cache(self, request_count: Amount, tokens: Amount) -> Amount:
        kept: Amount = tokens
        if self._work.window is not None:
            kept = tokens - self._work.window.layer_share * larger(tokens - self._work.window.token_count, 0)
        return request_count * self._work.kv_bytes_per_token * kept

    def _padded_prefill(self, n: Amount, length: Amount, kept: Amount, *, all_logits: bool) -> Iterator[Moment]:
        """N requests of so many tokens, which a mask marks unless there is one request."""
        s, b, tokens, pairs = self._sizes, self._b, n * length, n * length * length
        cache = kept + self._cache(n, length)
        is_masked = (n > 1) & (length > 1)
        given = (1 + is_masked) * INDEX_BYTES * tokens + is_masked * INDEX_BYTES * length
        base = given + self._position * tokens
        before_cache = cache - (cache - kept) / s.layer_count
        scores: Amount
        mask: Amount
        attending: Amount
        repeated: Amount
        if self._is_eager:
            scores, mask = s.head_count * pairs, pairs * b
            repeated = 2 * s.query * b if self._is_grouped and s.key_value_head_count > 1 else 0
            attending = larger(scores * self._softmax, scores * b + 2 * s.output * b * tokens)
        else:
            scores, mask = 0 * pairs, pairs * is_masked
            repeated = 2 * s.query * b * is_masked if self._is_grouped and s.key_value_head_count > 1 else 0
            attending = larger(mask * b + self._kernel * tokens, self._attended * tokens)
        base = base + mask
        yield Moment("rotation", base + self._rotating * tokens, before_cache)
        yield Moment("attention", base + (self._attending + repeated) * tokens + attending, cache)
        yield Moment("feed-forward", base + self._feed_forward * tokens + scores * b, cache)
        yield from self._logits(given + INDEX_BYTES * tokens, n, tokens, cache, all_logits=all_logits)

    def _padded_decode(self, n: Amount, length: Amount, kept: Amount) -> Iterator[Moment]:
        """One token of each of n requests that have so many tokens with it."""
        s, b, tokens = self._sizes, self._b, n * length
        cache = kept + self._cache(n, length)
        given = INDEX_BYTES * (n + 1 + 2 * tokens * (n > 1))
        base = given + (self._position - INDEX_BYTES) * n
        scores = s.head_count * tokens * self._is_eager
        mask: Amount
        attending: Amount
        repeated: Amount
        if self._is_eager:
            mask = tokens * b
            copied = s.query * b * n * (n > 1)
            if self._is_grouped and s.key_value_head_count > 1:
                attending = 2 * s.query * b * tokens + larger(scores * self._softmax, scores * b + copied)
            else:  # the product copies the one head for every query head, for itself only
                repeated = s.query * b * tokens * (n > 1) if self._is_grouped else 0
                attending = larger(scores * self._softmax, repeated + scores * b + copied)
        else:
            mask = tokens * (n > 1)
            attending = larger(mask * b + self._kernel * n, self._attended * n)
        base = base + mask
        yield Moment("cache growth", base + self._growing * n + s.key_value * b * (tokens - n), cache)
        yield Moment("attention", base + self._attending * n + attending, cache)
        yield Moment("feed-forward", base + self._feed_forward * n + scores * b, cache)
        yield Moment("logits", given + (self._hidden + self._gathered_row) * n, cache)

    def _packed(self, batch: Batch) -> Iterator[Moment]:
        decoding = sum(rows.request_count for rows in batch.decode)
        request_count = decoding + sum(rows.request_count for rows in batch.prefill)
        tokens = batch.prefill_tokens + decoding
        pool_tokens = max(batch.pool_tokens, batch.token_count)
        cache = self._work.kv_bytes_per_token * (pool_tokens + batch.copied_tokens)
        base = (INDEX_BYTES + self._position) * tokens + (0 if batch.all_logits else INDEX_BYTES * request_count)
        yield Moment("rotation", base + self._rotating * tokens, cache)
        attending = (self._attending + self._sizes.output * self._b) * tokens
        yield Moment("attention", base + attending + self._packed_attention(batch), cache)
        yield Moment("feed-forward", base + self._feed_forward * tokens, cache)
        yield from self._logits(2 * INDEX_BYTES * tokens, request_count, tokens, cache, all_logits=batch.all_logits)

    def _packed_attention(self, batch: Batch) -> float:
        """Return what attention takes for the largest request of a prefill, or for requests that decode together."""
        s, b = self._sizes, self._b
        most: float = 0
        for rows in batch.prefill:
            new, seen = rows.input_tokens, rows.context_tokens + rows.input_tokens
            here: float = self._kernel * new
            if self._is_eager:
                here = s.output * b * new
                repeated = 2 * s.query * b * seen if self._is_grouped else 0
                scores = s.head_count * new * seen
                here = repeated + max(scores * self._softmax, scores * b + here) + (new * seen if new > 1 else 0)
            most = max(most, here)
        for rows in batch.decode:
            n, seen = rows.request_count, rows.sequence_tokens
            here = self._kernel * n
            if self._is_eager:
                here = s.output * b * n
                scores = s.head_count * n * seen
                copied = s.key_value * b * n * seen if n > 1 and s.key_value_head_count > 1 else 0
                here = max(scores * self._softmax, scores * b + copied + here)
            most = max(most, here)
        return most

    def _logits(self, given: Amount, n: Amount, tokens: Amount, cache: Amount, *, all_logits: bool) -> Iterator[Moment]:
        if not all_logits:
            yield Moment("logits", given + self._hidden * tokens + (self._gathered_row + self._hidden) * n, cache)
            return
        yield Moment("logits", given + (self._hidden + self._gathered_row) * tokens, cache)
        row = self._row + SCORE_BYTES * self._sizes.vocabulary + INDEX_BYTES
        yield Moment("log-probabilities", given + row * tokens, cache)


def _rectangle(rows: Sequence[Rows], *, is_prefill: bool = False) -> tuple[int, int]:
    """Return how many requests there are, and the tokens of the longest, of a prefill without what it will make."""
    longest = 0
    for row in rows:
        longest = max(longest, row.sequence_tokens)
    if is_prefill:
        longest = max(row.context_tokens + row.input_tokens for row in rows)
    return sum(row.request_count for row in rows), longest
