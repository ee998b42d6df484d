"""The memory of a step of an encoder-decoder built like T5.

A prefill runs the encoder and the first step of the decoder, which fills the cache of the encoder's keys and values;
its peak is the relative position bias while it is computed, the attention or the feed-forward part of the encoder's
last layer, the cache of the decoder's last layer while it is made, or the logits.

Invariant: only the position bias, masks and, without fused attention, scores are quadratic in the input.
Source: T5's modules in Hugging Face's transformers; the encoder's output stays until the step ends.
"""

from collections.abc import Iterable, Iterator

from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Rows, StepMemory
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
from llmpilot_perfmodel.step_memory.rank_sizes import served_precision

_POSITION_BYTES = 49
"""Per pair of tokens while distances become buckets: six tensors of 64-bit integers and one of truths."""
_BUCKET_BYTES = 16
"""Of them, what lives until the bias is looked up."""
_GATED_ACTIVATION_TENSORS = 4
"""Alive at once in the GELU that gated T5s have, which is no kernel but seven operations."""
_FLOAT_BYTES = 4


class EncoderDecoderMemory:
    """The memory of any step of one encoder-decoder under one execution; its layout is always padded."""

    def __init__(self, config: LlmConfig, architecture: T5Architecture, execution: Execution) -> None:
        a, parts = architecture, execution.gpu_count
        self._work = work = llm_work(config, parts, served_precision(config, execution))
        self._b = b = work.activation_bytes
        self._is_eager = execution.attention is Attention.EAGER
        self._heads = a.head_count // parts
        self._gathered = a.vocabulary_size * b * (1 + 1 / parts if parts > 1 else 1)
        self._hidden = a.hidden_size * b
        self._made = self._hidden * (2 if a.tied else 1)
        """What the decoder made, and where its embedding is also its head, the same scaled."""
        self._projected = self._heads * a.head_size * b
        # Halves of 16 bits overflow in T5's second feed-forward matrices: transformers keeps those, and all that is
        # added to what they make, in 32 bits.
        keeps_floats = b < _FLOAT_BYTES and config.spec.torch_dtype != "bfloat16"
        wide = a.hidden_size * (_FLOAT_BYTES if keeps_floats else b)
        split_bias = 2 * a.bucket_count * a.head_count * b * (1 - 1 / parts)
        self._weight_bytes = work.weight_bytes - split_bias
        if keeps_floats:
            self._weight_bytes += work.fp32_parameter_count * (_FLOAT_BYTES - b)
        self._held = self._hidden + (wide if a.encoder_layer_count > 1 else 0)
        self._attending = self._held + self._hidden + 3 * self._projected
        inner = a.inner_size // parts
        activation = (_GATED_ACTIVATION_TENSORS if a.gated else 2) * b
        widening = (3 if a.gated else 1) * b + _FLOAT_BYTES if keeps_floats else 0
        self._feed_forward = self._held + wide + self._hidden + inner * max(activation, widening)
        self._decoding = self._held + wide + self._hidden + self._projected
        """Bytes per request of the decoder's one token."""

    def of(self, batch: Batch) -> StepMemory:
        """Return the memory of a step."""
        return step_peak(self._weight_bytes, self._moments(batch))

    def prefill_bytes(self, n: Amount, length: Amount, residents: Iterable[tuple[Amount, Amount]]) -> Floats:
        """Return what each of many prefills takes beside the weights; see `StepMemoryModel`."""
        kept: Amount = 0.0
        encoded: Amount = 0.0
        for count, tokens in residents:
            kept += self._work.kv_bytes_per_token * count * tokens
            encoded += self._hidden * count * larger(tokens - 1, 0)
        return most_bytes(self._prefill(n, length, kept, encoded))

    def decode_bytes(self, n: Amount, inputs: Amount, outputs: Amount) -> Floats:
        """Return what each of many decode steps takes beside the weights; see `StepMemoryModel`."""
        return most_bytes(self._decode(n, inputs, outputs, 0.0, 0.0))

    def _moments(self, batch: Batch) -> Iterator[Moment]:
        token = self._work.kv_bytes_per_token
        kept = token * batch.copied_tokens
        encoded = 0
        for rows in batch.residents:
            kept += token * rows.token_count
            encoded += self._hidden * rows.request_count * rows.input_tokens
        decoding = _rectangle(batch.decode) if batch.decode else None
        if batch.prefill:
            meanwhile, also_encoded = kept, encoded
            if decoding is not None:
                n, read, made = decoding
                meanwhile += token * n * (read + made - 1)
                also_encoded += self._hidden * n * read
            n, read, _ = _rectangle(batch.prefill)
            yield from self._prefill(n, read, meanwhile, also_encoded)
            kept += token * n * (read + 1)
            encoded += self._hidden * n * read
        if decoding is not None:
            yield from self._decode(*decoding, kept, encoded)
        if not batch.prefill and decoding is None:
            yield Moment("idle", encoded, kept)

    def _prefill(self, n: Amount, length: Amount, kept: Amount, others: Amount) -> Iterator[Moment]:
        tokens, pairs, b = n * length, length * length, self._b
        is_masked = (n > 1) & (length > 1)
        given = others + (1 + is_masked) * INDEX_BYTES * tokens
        bias = self._heads * pairs * b
        scores = n * bias
        mask = is_masked * n * pairs * (b if self._is_eager else 1)
        buckets = larger(_POSITION_BYTES * pairs, _BUCKET_BYTES * pairs + bias)
        first = 2 * self._hidden + 3 * self._projected
        yield Moment("position bias", given + mask + first * tokens + buckets + 2 * INDEX_BYTES * length, kept)
        attending = given + mask + self._attending * tokens + bias
        attended = self._projected * tokens
        if self._is_eager:
            yield Moment("encoder attention", attending + scores + larger(scores, 2 * attended), kept)
        else:
            # The bias is copied to lie in order; with a mask it is made for every request, and that is copied.
            kernel = attended + SCORE_BYTES * self._heads * tokens
            own_bias = is_masked * (scores + larger(scores, kernel)) + (1 - is_masked) * (bias + kernel)
            yield Moment("encoder attention", attending + own_bias, kept)
        feed_forward = self._feed_forward * tokens + (scores if self._is_eager else 0)
        yield Moment("encoder feed-forward", given + mask + bias + feed_forward, kept)
        cache = kept + self._work.kv_bytes_per_token * (tokens + n)
        # The decoder gets a mask of its own, which becomes one of truths or of numbers.
        mask = is_masked * tokens * (INDEX_BYTES + (b if self._is_eager else 1))
        encoded = given + mask + n * INDEX_BYTES + self._hidden * tokens
        crossing = 2 * self._projected * tokens + self._heads * length * b
        yield Moment("cache of the encoder", encoded + crossing + self._decoding * n, cache)
        yield self._logits(encoded, n, cache)

    def _decode(self, n: Amount, read: Amount, made: Amount, kept: Amount, others: Amount) -> Iterator[Moment]:
        tokens = n * read
        cache = kept + self._work.kv_bytes_per_token * (tokens + n * made)
        mask = (n > 1) * (read > 1) * tokens * (INDEX_BYTES + (self._b if self._is_eager else 1))
        encoded = others + mask + n * INDEX_BYTES + self._hidden * tokens
        grown = self._projected * n * (made - 1)
        bias = self._heads * (made + read) * self._b
        scores = n * self._heads * read * self._b * self._is_eager
        yield Moment("cache growth", encoded + bias + grown + self._attending * n, cache)
        yield Moment("attention", encoded + bias + 2 * scores + self._decoding * n, cache)
        yield Moment("feed-forward", encoded + bias + scores + self._feed_forward * n, cache)
        yield self._logits(encoded, n, cache)

    def _logits(self, base: Amount, n: Amount, cache: Amount) -> Moment:
        row = self._made + self._gathered + INDEX_BYTES
        return Moment("logits", base + row * n, cache)


def _rectangle(rows: tuple[Rows, ...]) -> tuple[int, int, int]:
    """Return how many requests there are, and the longest input and output."""
    return (
        sum(row.request_count for row in rows),
        max(row.context_tokens + row.input_tokens for row in rows),
        max(row.output_tokens for row in rows),
    )
