"""What vLLM 0.2 does next: prefill whole prompts if any fits, else give every running sequence room for one token.

Invariant: the blocks of the running sequences and the free blocks add up to all blocks.
Source: the behaviour of the scheduler of vllm-project/vllm, versions 0.2.0 to 0.2.7.
"""

from llmpilot_perfmodel.batching.state import (
    BATCH,
    BLOCK_COUNT,
    FREE_BLOCKS,
    PREEMPTIONS,
    RUNNING,
    WAITING,
    Rules,
    State,
    admit_first,
    length_so_far,
    pop_newest,
    waiting_slot,
)
from llmpilot_perfmodel.compiled import compiled


@compiled
def admit_vllm0(state: State, rules: Rules) -> None:
    """Append the requests of the next prefill to the batch and give them their blocks; none: the server decodes."""
    counters = state.counters
    count, longest, total = 0, 0, 0
    while counters[WAITING] > 0 and counters[RUNNING] < rules.max_batch_size:
        slot = waiting_slot(state, 0)
        tokens = length_so_far(state, slot)  # a preempted request is recomputed with all it has generated
        blocks = -(-tokens // rules.block_size)
        if counters[FREE_BLOCKS] - blocks < rules.watermark_blocks:
            break
        longest = max(longest, tokens)
        batched = total + tokens if rules.max_paddings < 0 else longest * (count + 1)
        if batched > rules.max_prefill_tokens:
            break
        if rules.max_paddings >= 0 and batched - total - tokens > rules.max_paddings:
            break
        count += 1
        total += tokens
        counters[FREE_BLOCKS] -= blocks
        state.slots[BLOCK_COUNT, slot] = blocks
        admit_first(state)


@compiled
def make_room_vllm0(state: State, rules: Rules) -> None:
    """Give every running sequence a place for its next token; the newest give up their blocks where there are none."""
    counters, slots = state.counters, state.slots
    place = 0
    while place < counters[RUNNING]:
        slot = int(state.lists[BATCH, place])
        while counters[FREE_BLOCKS] < 1:  # the server asks for a free block even where the sequence needs none
            victim = pop_newest(state)
            free_blocks_vllm0(state, victim)
            counters[PREEMPTIONS] += 1
            if victim == slot:
                return
        blocks = -(-length_so_far(state, slot) // rules.block_size)
        counters[FREE_BLOCKS] -= blocks - slots[BLOCK_COUNT, slot]
        slots[BLOCK_COUNT, slot] = blocks
        place += 1


@compiled
def free_blocks_vllm0(state: State, slot: int) -> None:
    """Take all blocks from a sequence."""
    state.counters[FREE_BLOCKS] += state.slots[BLOCK_COUNT, slot]
    state.slots[BLOCK_COUNT, slot] = 0
