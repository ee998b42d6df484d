"""What vLLM V1 does next: one budget of tokens a step, running sequences first, then prompts in chunks.

Invariant: no step computes more tokens than the budget, and none is computed without a block to keep it in.
Source: the behaviour of the scheduler of vllm-project/vllm, V1, as of 0.19, whose `scheduler_reserve_full_isl` lets a
prompt in only when all of it fits; earlier versions asked for its first chunk alone.
"""

from llmpilot_perfmodel.batching.prefix_cache import (
    PrefixCache,
    cached_block_count,
    has_blocks,
    publish_blocks,
    release_blocks,
    take_blocks,
)
from llmpilot_perfmodel.batching.state import (
    BATCH,
    BLOCK_COUNT,
    COMPUTED_TOKENS,
    GENERATED_TOKENS,
    PREEMPTIONS,
    PREFIX_HIT_TOKENS,
    PREFIX_QUERY_TOKENS,
    RUNNING,
    SCHEDULED_TOKENS,
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
def plan_vllm1(state: State, cache: PrefixCache, rules: Rules) -> None:
    """Say of every sequence in the batch how many tokens the step computes of it, 0 included."""
    counters, slots = state.counters, state.slots
    budget = rules.max_prefill_tokens
    preemptions = counters[PREEMPTIONS]
    place = 0
    while place < counters[RUNNING] and budget > 0:
        slot = int(state.lists[BATCH, place])
        tokens = min(length_so_far(state, slot) - slots[COMPUTED_TOKENS, slot], budget)
        total = slots[COMPUTED_TOKENS, slot] + tokens
        if total > slots[BLOCK_COUNT, slot] * rules.block_size and not _make_room(state, cache, rules, slot, total):
            break
        _schedule(state, cache, rules, slot, tokens)
        budget -= tokens
        place += 1
    for rest in range(place, counters[RUNNING]):
        slots[SCHEDULED_TOKENS, state.lists[BATCH, rest]] = 0
    if counters[PREEMPTIONS] == preemptions:
        _admit(state, cache, rules, budget)


@compiled
def _make_room(state: State, cache: PrefixCache, rules: Rules, slot: int, tokens: int) -> bool:
    """Find blocks for `tokens` of a sequence at the expense of the newest; False: it was the newest itself."""
    while not has_blocks(state, cache, rules, slot, tokens, 0):
        victim = pop_newest(state)
        release_blocks(state, cache, rules, victim)
        state.slots[COMPUTED_TOKENS, victim] = 0
        state.counters[PREEMPTIONS] += 1
        if victim == slot:
            return False
    take_blocks(state, cache, rules, slot, tokens, 0)
    return True


@compiled
def _schedule(state: State, cache: PrefixCache, rules: Rules, slot: int, tokens: int) -> None:
    state.slots[SCHEDULED_TOKENS, slot] = tokens
    if rules.has_prefix_cache:
        publish_blocks(state, cache, rules, slot, state.slots[COMPUTED_TOKENS, slot] + tokens)


@compiled
def _admit(state: State, cache: PrefixCache, rules: Rules, budget: int) -> None:
    """Let in the head of the queue, again and again, while there are tokens, places and blocks for all of it."""
    counters, slots = state.counters, state.slots
    while counters[WAITING] > 0 and budget > 0 and counters[RUNNING] < rules.max_batch_size:
        slot = waiting_slot(state, 0)
        total = length_so_far(state, slot)
        cached = cached_block_count(state, cache, rules, slot) if rules.has_prefix_cache else 0
        hit = cached * rules.block_size
        tokens = min(total - hit, budget)
        if not has_blocks(state, cache, rules, slot, total, cached):
            break
        take_blocks(state, cache, rules, slot, hit + tokens, cached)
        if rules.has_prefix_cache and slots[GENERATED_TOKENS, slot] == 0:
            counters[PREFIX_QUERY_TOKENS] += total
            counters[PREFIX_HIT_TOKENS] += hit
        admit_first(state)
        slots[COMPUTED_TOKENS, slot] = hit
        _schedule(state, cache, rules, slot, tokens)
        budget -= tokens
