"""The caches that a step works on: a pool that is written in place, or one that grows by copying.

Invariant: caches are made, never computed: a step starts from the state that a server would have reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from llmpilot_perfmodel.step_memory.batch import Batch, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """One token's K and V of one layer, on this rank."""

    layer_count: int
    kv_head_count: int
    key_size: int
    """Of one head."""
    value_size: int
    dtype: Any
    device: str

    def zeros(self, *leading: int) -> tuple[Any, Any]:
        """Return K and V of so many tokens, [*leading, heads, head size]."""
        sizes = (self.key_size, self.value_size)
        key, value = (
            torch.zeros((*leading, self.kv_head_count, size), dtype=self.dtype, device=self.device) for size in sizes
        )
        return key, value

    def layers(self, *leading: int) -> list[tuple[Any, Any]]:
        """Return K and V of every layer."""
        return [self.zeros(*leading) for _ in range(self.layer_count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Requests of one shape that lie next to each other, among the tokens of the step and in the pool."""

    request_count: int
    new_tokens: int
    """Of each request, in this step."""
    context_tokens: int
    """Of each request, in the pool already."""
    room_tokens: int
    """Of each request in the pool."""
    first_token: int
    """Among the tokens of the step."""
    first_slot: int
    """Among those of the pool."""
    is_decode: bool

    def _rooms(self, tensor: Any) -> Any:
        slots = slice(self.first_slot, self.first_slot + self.request_count * self.room_tokens)
        return tensor[slots].unflatten(0, (self.request_count, self.room_tokens))

    def read(self, tensor: Any) -> Any:
        """Return what these requests attend to, [requests, tokens, heads, head size], as a view of the pool."""
        return self._rooms(tensor)[:, : self.context_tokens + self.new_tokens]

    def tokens(self, start: int, stop: int) -> slice:
        """Return where the new tokens of these requests lie in the step."""
        return slice(self.first_token + start * self.new_tokens, self.first_token + stop * self.new_tokens)

    def write(self, tensor: Any, new: Any) -> None:
        """Write the new tokens, [tokens of the step, heads, head size], into the pool."""
        tokens = self.tokens(0, self.request_count)
        target = self._rooms(tensor)[:, self.context_tokens : self.context_tokens + self.new_tokens]
        target.copy_(new[tokens].unflatten(0, (self.request_count, self.new_tokens)))


def stretches(batch: Batch) -> tuple[Stretch, ...]:
    """Return where the requests of a packed step lie: first those that are read, then those that make a token."""
    found = []
    token, slot = 0, 0
    for rows, is_decode in [(rows, False) for rows in batch.prefill] + [(rows, True) for rows in batch.decode]:
        new = 1 if is_decode else rows.input_tokens
        context = rows.sequence_tokens - 1 if is_decode else rows.context_tokens
        found.append(
            Stretch(
                request_count=rows.request_count,
                new_tokens=new,
                context_tokens=context,
                room_tokens=rows.sequence_tokens,
                first_token=token,
                first_slot=slot,
                is_decode=is_decode,
            )
        )
        token += rows.request_count * new
        slot += rows.token_count
    return tuple(found)


class Pool(Cache):  # type: ignore[misc]
    """K and V of every layer for as many tokens as there is room for; new tokens are written where they belong."""

    def __init__(self, shape: CacheShape, token_count: int, parts: Sequence[Stretch]) -> None:
        super().__init__(layers=[])
        self._tensors = shape.layers(token_count)
        self._parts = parts

    def layer(self, index: int) -> tuple[Any, Any]:
        """Return K and V of a layer, [tokens, heads, head size]."""
        return self._tensors[index]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the new tokens, [1, heads, tokens, head size]; returns views of the pool, so that they can go."""
        keys, values = self._tensors[layer_idx]
        for tensor, new in ((keys, key_states), (values, value_states)):
            for part in self._parts:
                part.write(tensor, new[0].transpose(0, 1))
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given, never counted."""
        del layer_idx
        return 0


def filled_cache(config: Any, shape: CacheShape, request_count: int, token_count: int) -> Any:
    """Return a cache that grows by copying and has so many tokens of each request."""
    cache = empty_cache(config)
    for index in range(shape.layer_count):
        fill(cache, shape, index, request_count, token_count)
    return cache


def fill(cache: Any, shape: CacheShape, index: int, request_count: int, token_count: int) -> None:
    """Give a layer of a cache that grows so many tokens of each request."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    window = getattr(layer, "sliding_window", None)
    kept = token_count if window is None else min(token_count, window - 1)
    empty = torch.empty(0, dtype=shape.dtype, device=shape.device)
    layer.lazy_initialization(empty, empty)
    layer.keys, layer.values = (
        torch.zeros((request_count, shape.kv_head_count, kept, size), dtype=shape.dtype, device=shape.device)
        for size in (shape.key_size, shape.value_size)
    )
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = token_count


def empty_cache(config: Any, *, is_encoder_decoder: bool = False) -> Any:
    """Return a cache that grows by copying, before the first token."""
    if is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def filled_encoder_decoder_cache(
    config: Any, shape: CacheShape, *, request_count: int, encoder_tokens: int, decoder_tokens: int
) -> Any:
    """Return the cache of an encoder-decoder that has read its input and made so many tokens."""
    own = filled_cache(config, shape, request_count, decoder_tokens)
    crossing = filled_cache(config, shape, request_count, encoder_tokens)
    return EncoderDecoderCache(own, crossing)


def padded_rows(rows: Sequence[Rows]) -> Rows | None:
    """Return the rectangle that holds these requests, or None if there are none."""
    if not rows:
        return None
    return Rows(
        request_count=sum(row.request_count for row in rows),
        input_tokens=max(row.context_tokens + row.input_tokens for row in rows),
        output_tokens=max(row.output_tokens for row in rows),
    )
