"""What a batching server knows between two steps, as arrays that compiled code works on.

Invariant: a slot is in the batch, in the queue, or free; the counters are sums over those, kept up to date.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.compiled import compiled

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

(
    RUNNING,  # sequences in the batch
    WAITING,  # requests in the queue
    HEAD,  # where the queue begins in its ring
    WORK_START,  # the step works on the batch from this place on
    IS_PREFILL,  # whether the step is a prefill of a server that never mixes
    IS_OUT_OF_MEMORY,  # whether the step will fail
    MUST_DECODE,  # whether the next step has to decode (TGIS, TGI)
    WAITING_TOKENS,  # decode steps since the last prefill, plus one (TGIS, TGI)
    HELD_TOKENS,  # input and generated tokens of all sequences in the batch
    RESERVED_TOKENS,  # input and largest output of all sequences in the batch
    FREE_BLOCKS,
    FREE_ROWS,  # rows of the block table that no sequence has
    TOKEN_COUNT,  # results of the last step: how many entries of its lists count
    FINISHED_COUNT,
    FAILED_COUNT,
    PREEMPTIONS,  # cumulative
    PREFIX_HIT_TOKENS,
    PREFIX_QUERY_TOKENS,
    _COUNTER_COUNT,
) = range(19)
"""Entries of `State.counters`."""

(
    ARRIVAL_NANOS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,  # what the request will generate
    MAX_OUTPUT_TOKENS,  # what the scheduler must expect
    GENERATED_TOKENS,
    COMPUTED_TOKENS,  # tokens in the cache (vLLM V1)
    SCHEDULED_TOKENS,  # tokens that the step under way computes (vLLM V1)
    BLOCK_COUNT,
    BLOCK_ROW,  # of the block table
    HASH_START,  # of its block hashes
    HASH_COUNT,
    RECORD,  # of a simulated load: the number of its record
    NEXT_TOKEN,  # and where its next token's time goes
    _FIELD_COUNT,
) = range(14)
"""Rows of `State.slots`."""

(
    BATCH,  # slots in the order in which they came into the batch
    QUEUE,  # a ring
    BY_REMAINING,  # the batch, those that may still generate the most tokens first (TGIS)
    TOKEN_SLOTS,
    FINISHED_SLOTS,
    FAILED_SLOTS,
    FREE_ROW_STACK,
    CHOSEN,  # places in the queue
    REMAINING,  # tokens that each sequence may still generate, most first
    LENGTH,  # tokens that each has so far
    _LIST_COUNT,
) = range(11)
"""Rows of `State.lists`."""

NANOS_PER_SECOND = 1_000_000_000


class Rules(NamedTuple):
    """A policy as numbers; what the policy lacks has its default."""

    kind: int
    max_batch_size: int
    max_weight: int = 0
    max_waiting_tokens: int = 0
    waiting_served_ratio: float = 0.0
    max_prefill_tokens: int = 0
    max_paddings: int = -1
    """-1: prompts are not padded."""
    is_padded: bool = False
    block_count: int = 0
    block_size: int = 1
    watermark_blocks: int = 0
    has_prefix_cache: bool = False
    out_of_memory_tokens: int = 0
    """0: never."""


TGIS, TGI, VLLM0, VLLM1 = range(4)
"""Values of `Rules.kind`."""


class State(NamedTuple):
    """All of the server but the content of its blocks; few arrays, because each costs time wherever they are passed."""

    counters: Integers
    slots: Integers
    """Two dimensions: a field, a slot."""
    lists: Integers
    """Two dimensions: a list, a place in it."""


def new_state(rules: Rules, capacity: int) -> State:
    """Return an idle server with room for `capacity` requests, which must be a power of two."""
    state = State(
        np.zeros(_COUNTER_COUNT, np.int64),
        np.zeros((_FIELD_COUNT, capacity), np.int64),
        np.zeros((_LIST_COUNT, capacity), np.int64),
    )
    rows = min(capacity, rules.max_batch_size)
    state.lists[FREE_ROW_STACK, :rows] = np.arange(rows)[::-1]
    state.counters[FREE_ROWS] = rows
    state.counters[FREE_BLOCKS] = rules.block_count
    state.counters[WAITING_TOKENS] = 1
    return state


def grown(state: State, rules: Rules, capacity: int) -> State:
    """Return the same server with room for more requests, a power of two."""
    old = state.slots.shape[1]
    larger = new_state(rules, capacity)
    counters = state.counters.copy()
    larger.slots[:, :old] = state.slots
    larger.lists[:, :old] = state.lists
    head, count = counters[HEAD], counters[WAITING]
    larger.lists[QUEUE, :count] = state.lists[QUEUE, (head + np.arange(count)) % old]
    counters[HEAD] = 0
    old_rows, rows = min(old, rules.max_batch_size), min(capacity, rules.max_batch_size)
    free = counters[FREE_ROWS]
    larger.lists[FREE_ROW_STACK, : rows - old_rows] = np.arange(old_rows, rows)
    larger.lists[FREE_ROW_STACK, rows - old_rows : rows - old_rows + free] = state.lists[FREE_ROW_STACK, :free]
    counters[FREE_ROWS] += rows - old_rows
    return larger._replace(counters=counters)


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count` and 2."""
    return 1 << max(count - 1, 1).bit_length()


@compiled
def enqueue(  # noqa: PLR0917 compiled code knows no keyword-only arguments
    state: State, slot: int, arrival_seconds: float, input_tokens: int, output_tokens: int, most: int
) -> None:
    """Put a request at the end of the queue; most: the output tokens that the scheduler must expect."""
    counters, slots = state.counters, state.slots
    slots[ARRIVAL_NANOS, slot] = int(arrival_seconds * NANOS_PER_SECOND)
    slots[INPUT_TOKENS, slot] = input_tokens
    slots[OUTPUT_TOKENS, slot] = output_tokens
    slots[MAX_OUTPUT_TOKENS, slot] = most
    slots[GENERATED_TOKENS, slot] = 0
    slots[COMPUTED_TOKENS, slot] = 0
    slots[BLOCK_COUNT, slot] = 0
    state.lists[QUEUE, (counters[HEAD] + counters[WAITING]) & (slots.shape[1] - 1)] = slot
    counters[WAITING] += 1


@compiled
def length_so_far(state: State, slot: int) -> int:
    """Return a request's input and generated tokens."""
    return int(state.slots[INPUT_TOKENS, slot] + state.slots[GENERATED_TOKENS, slot])


@compiled
def may_remain(state: State, slot: int) -> int:
    """Return the most tokens that a request may still generate."""
    return int(state.slots[MAX_OUTPUT_TOKENS, slot] - state.slots[GENERATED_TOKENS, slot])


@compiled
def waiting_slot(state: State, place: int) -> int:
    """Return the slot at a place of the queue, 0 for its head."""
    return int(state.lists[QUEUE, (state.counters[HEAD] + place) & (state.lists.shape[1] - 1)])


@compiled
def admit_first(state: State) -> None:
    """Move the head of the queue to the end of the batch."""
    counters = state.counters
    slot = waiting_slot(state, 0)
    counters[HEAD] = (counters[HEAD] + 1) & (state.lists.shape[1] - 1)
    counters[WAITING] -= 1
    enter_batch(state, slot)


@compiled
def enter_batch(state: State, slot: int) -> None:
    """Put a slot at the end of the batch."""
    counters = state.counters
    state.lists[BATCH, counters[RUNNING]] = slot
    counters[RUNNING] += 1
    counters[HELD_TOKENS] += length_so_far(state, slot)
    counters[RESERVED_TOKENS] += state.slots[INPUT_TOKENS, slot] + state.slots[MAX_OUTPUT_TOKENS, slot]


@compiled
def leave_batch(state: State, slot: int) -> None:
    """Take a slot's tokens out of the sums; the caller takes it out of the batch."""
    counters = state.counters
    counters[HELD_TOKENS] -= length_so_far(state, slot)
    counters[RESERVED_TOKENS] -= state.slots[INPUT_TOKENS, slot] + state.slots[MAX_OUTPUT_TOKENS, slot]


@compiled
def pop_newest(state: State) -> int:
    """Move the newest of the batch to the head of the queue and return its slot; the caller frees its blocks."""
    counters = state.counters
    counters[RUNNING] -= 1
    slot = int(state.lists[BATCH, counters[RUNNING]])
    leave_batch(state, slot)
    counters[HEAD] = (counters[HEAD] - 1) & (state.lists.shape[1] - 1)
    state.lists[QUEUE, counters[HEAD]] = slot
    counters[WAITING] += 1
    return slot
