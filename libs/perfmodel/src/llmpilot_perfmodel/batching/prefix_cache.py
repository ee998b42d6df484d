"""The blocks of vLLM V1: which sequence holds which, and which still hold a prefix that another sequence could use.

Invariant: a block is held by at least one sequence or in the list of free blocks, never both; a free block keeps its
content, and can be found by it, until it is the oldest of the list and someone takes it.
Source: the behaviour of the block pool of vllm-project/vllm, V1.
"""

from typing import NamedTuple

import numpy as np

from llmpilot_perfmodel.batching.state import (
    BLOCK_COUNT,
    BLOCK_ROW,
    COMPUTED_TOKENS,
    FREE_BLOCKS,
    FREE_ROW_STACK,
    FREE_ROWS,
    HASH_COUNT,
    HASH_START,
    Integers,
    Rules,
    State,
    length_so_far,
    power_of_two,
)
from llmpilot_perfmodel.compiled import compiled

_MULTIPLIER = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number: spreads hashes over the table (Knuth, vol. 3, 6.4)."""

(
    HOLDERS,  # sequences that hold the block
    NEWER,  # in the list of free blocks: the one freed after it
    OLDER,
    HASH,  # of its content
    IS_FINDABLE,  # 0 or 1
    _BLOCK_FIELD_COUNT,
) = range(6)
"""Rows of `PrefixCache.blocks`."""


class PrefixCache(NamedTuple):
    """What is in the blocks; all but empty where the policy has no prefix cache."""

    blocks: Integers
    """Two dimensions: a field, a block; one more entry than blocks, for both ends of the list of free ones."""
    block_rows: Integers
    """Two dimensions: a row, taken by a sequence of the batch, and the places in that sequence."""
    table: Integers
    """Open addressing, length a power of two: the block, or -1."""
    hashes: Integers
    """The block hashes of all requests."""


def empty_prefix_cache(rules: Rules, *, capacity: int, longest_blocks: int, hashes: Integers) -> PrefixCache:
    """Return a cache that holds nothing; longest_blocks: the most blocks that one sequence will hold."""
    count = rules.block_count if rules.has_prefix_cache else 0
    blocks = np.zeros((_BLOCK_FIELD_COUNT, count + 1), np.int64)
    blocks[NEWER] = np.roll(np.arange(count + 1), -1)
    blocks[OLDER] = np.roll(np.arange(count + 1), 1)
    shape = (min(rules.max_batch_size, capacity), longest_blocks) if count else (0, 0)
    return PrefixCache(
        blocks=blocks,
        block_rows=np.zeros(shape, np.int64),
        table=np.full(power_of_two(2 * count + 2), -1),
        hashes=hashes,
    )


def with_room(cache: PrefixCache, rules: Rules, *, capacity: int, old: int, longest_blocks: int) -> PrefixCache:
    """Return the same cache with room for more slots or longer sequences; slot i's hashes begin at i x longest_blocks.

    old: the most blocks of a sequence until now.
    """
    rows = np.zeros((min(rules.max_batch_size, capacity), longest_blocks), np.int64)
    rows[: len(cache.block_rows), :old] = cache.block_rows
    hashes = np.zeros((capacity, longest_blocks), np.int64)
    if old:
        known = cache.hashes.reshape(-1, old)
        hashes[: len(known), :old] = known
    return cache._replace(block_rows=rows, hashes=hashes.reshape(-1))


@compiled
def _home(cache: PrefixCache, key: int) -> int:
    mixed = key * _MULTIPLIER
    return int((mixed ^ (mixed >> 32)) & (len(cache.table) - 1))


@compiled
def find_block(cache: PrefixCache, key: int) -> int:
    """Return the block that has had that content the longest, -1 if there is none."""
    place = _home(cache, key)
    while cache.table[place] >= 0:
        block = cache.table[place]
        if cache.blocks[HASH, block] == key:
            return int(block)
        place = (place + 1) & (len(cache.table) - 1)
    return -1


@compiled
def _remember(cache: PrefixCache, block: int, key: int) -> None:
    if cache.blocks[IS_FINDABLE, block] > 0:
        return
    place = _home(cache, key)
    while cache.table[place] >= 0:
        place = (place + 1) & (len(cache.table) - 1)
    cache.table[place] = block
    cache.blocks[HASH, block] = key
    cache.blocks[IS_FINDABLE, block] = 1


@compiled
def _forget(cache: PrefixCache, block: int) -> None:
    """Take a block out of the table and close the gap, so that a search never stops too early."""
    mask = len(cache.table) - 1
    cache.blocks[IS_FINDABLE, block] = 0
    gap = _home(cache, cache.blocks[HASH, block])
    while cache.table[gap] != block:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        other = cache.table[place]
        if other < 0:
            break
        home = _home(cache, cache.blocks[HASH, other])
        if ((place - home) & mask) >= ((place - gap) & mask):
            cache.table[gap] = other
            gap = place
    cache.table[gap] = -1


@compiled
def _take_from_free(state: State, cache: PrefixCache, block: int) -> None:
    newer, older = cache.blocks[NEWER, block], cache.blocks[OLDER, block]
    cache.blocks[NEWER, older] = newer
    cache.blocks[OLDER, newer] = older
    state.counters[FREE_BLOCKS] -= 1


@compiled
def _put_to_free(state: State, cache: PrefixCache, block: int) -> None:
    end = cache.blocks.shape[1] - 1
    last = cache.blocks[OLDER, end]
    cache.blocks[NEWER, last] = block
    cache.blocks[OLDER, block] = last
    cache.blocks[NEWER, block] = end
    cache.blocks[OLDER, end] = block
    state.counters[FREE_BLOCKS] += 1


@compiled
def cached_block_count(state: State, cache: PrefixCache, rules: Rules, slot: int) -> int:
    """Return how many leading blocks of a request are there already; its last token is always computed."""
    most = (length_so_far(state, slot) - 1) // rules.block_size
    most = min(most, state.slots[HASH_COUNT, slot])
    start = state.slots[HASH_START, slot]
    count = 0
    while count < most and find_block(cache, cache.hashes[start + count]) >= 0:
        count += 1
    return count


@compiled
def has_blocks(  # noqa: PLR0917 compiled code knows no keyword-only arguments
    state: State, cache: PrefixCache, rules: Rules, slot: int, tokens: int, cached_blocks: int
) -> bool:
    """Return whether a sequence can be given the blocks for `tokens` in all; cached_blocks: as in `take_blocks`."""
    held = state.slots[BLOCK_COUNT, slot] + cached_blocks
    free = state.counters[FREE_BLOCKS]
    start = state.slots[HASH_START, slot]
    for place in range(cached_blocks):
        free -= cache.blocks[HOLDERS, find_block(cache, cache.hashes[start + place])] == 0
    return bool(-(-tokens // rules.block_size) - held <= free)


@compiled
def take_blocks(  # noqa: PLR0917 compiled code knows no keyword-only arguments
    state: State, cache: PrefixCache, rules: Rules, slot: int, tokens: int, cached_blocks: int
) -> None:
    """Give a sequence the blocks for `tokens` in all; there must be enough.

    cached_blocks: of them the leading ones that are there already; only for a sequence that holds none yet.
    """
    counters = state.counters
    held = state.slots[BLOCK_COUNT, slot] + cached_blocks
    wanted = max(-(-tokens // rules.block_size), held)
    if not rules.has_prefix_cache:
        counters[FREE_BLOCKS] -= wanted - held
        state.slots[BLOCK_COUNT, slot] = wanted
        return
    start = state.slots[HASH_START, slot]
    if state.slots[BLOCK_COUNT, slot] == 0:
        counters[FREE_ROWS] -= 1
        state.slots[BLOCK_ROW, slot] = state.lists[FREE_ROW_STACK, counters[FREE_ROWS]]
    row = state.slots[BLOCK_ROW, slot]
    for place in range(cached_blocks):
        block = find_block(cache, cache.hashes[start + place])
        if cache.blocks[HOLDERS, block] == 0:
            _take_from_free(state, cache, block)
        cache.blocks[HOLDERS, block] += 1
        cache.block_rows[row, place] = block
    for place in range(held, wanted):
        block = cache.blocks[NEWER, cache.blocks.shape[1] - 1]
        _take_from_free(state, cache, block)
        if cache.blocks[IS_FINDABLE, block] > 0:
            _forget(cache, block)
        cache.blocks[HOLDERS, block] = 1
        cache.block_rows[row, place] = block
    state.slots[BLOCK_COUNT, slot] = wanted


@compiled
def publish_blocks(state: State, cache: PrefixCache, rules: Rules, slot: int, tokens: int) -> None:
    """Let others find the blocks that are full once a sequence has `tokens` computed."""
    row = state.slots[BLOCK_ROW, slot]
    start = state.slots[HASH_START, slot]
    full = min(tokens // rules.block_size, state.slots[HASH_COUNT, slot])
    for place in range(state.slots[COMPUTED_TOKENS, slot] // rules.block_size, full):
        _remember(cache, cache.block_rows[row, place], cache.hashes[start + place])


@compiled
def release_blocks(state: State, cache: PrefixCache, rules: Rules, slot: int) -> None:
    """Free the blocks of a sequence, its last ones first, so that they are also the first to be taken."""
    counters = state.counters
    count = state.slots[BLOCK_COUNT, slot]
    state.slots[BLOCK_COUNT, slot] = 0
    if not rules.has_prefix_cache:
        counters[FREE_BLOCKS] += count
        return
    if count == 0:
        return
    row = state.slots[BLOCK_ROW, slot]
    for place in range(count - 1, -1, -1):
        block = cache.block_rows[row, place]
        cache.blocks[HOLDERS, block] -= 1
        if cache.blocks[HOLDERS, block] == 0:
            _put_to_free(state, cache, block)
    state.lists[FREE_ROW_STACK, counters[FREE_ROWS]] = row
    counters[FREE_ROWS] += 1
