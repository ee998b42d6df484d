"""One step of a server: choose its work, say how long it takes, account for its results.

Invariant: the engine that a real-time server drives and the simulations run exactly these functions.
"""

from llmpilot_perfmodel.batching.prefix_cache import PrefixCache, release_blocks
from llmpilot_perfmodel.batching.state import (
    BATCH,
    BY_REMAINING,
    COMPUTED_TOKENS,
    FAILED_COUNT,
    FAILED_SLOTS,
    FINISHED_COUNT,
    FINISHED_SLOTS,
    GENERATED_TOKENS,
    HEAD,
    HELD_TOKENS,
    INPUT_TOKENS,
    IS_OUT_OF_MEMORY,
    IS_PREFILL,
    MUST_DECODE,
    OUTPUT_TOKENS,
    QUEUE,
    RUNNING,
    SCHEDULED_TOKENS,
    TGI,
    TGIS,
    TOKEN_COUNT,
    TOKEN_SLOTS,
    VLLM0,
    VLLM1,
    WAITING,
    WAITING_TOKENS,
    WORK_START,
    Integers,
    Rules,
    State,
    leave_batch,
    length_so_far,
    waiting_slot,
)
from llmpilot_perfmodel.batching.tgi import admit_tgi
from llmpilot_perfmodel.batching.tgis import admit_tgis, forget_finished, longest_length, remember_remaining
from llmpilot_perfmodel.batching.vllm0 import admit_vllm0, free_blocks_vllm0, make_room_vllm0
from llmpilot_perfmodel.batching.vllm1 import plan_vllm1
from llmpilot_perfmodel.compiled import compiled
from llmpilot_perfmodel.steps.step_time import StepLoad, StepTables, step_seconds

LEAST_STEP_SECONDS = 1e-9
"""A step takes time whatever the constants say, so the tokens of a request never coincide."""


@compiled
def plan_step(state: State, cache: PrefixCache, rules: Rules, tables: StepTables) -> float:
    """Choose the work of the next step and return its seconds; negative: there is nothing to do."""
    counters = state.counters
    if counters[RUNNING] + counters[WAITING] == 0:
        return -1.0
    counters[WORK_START] = 0
    counters[IS_PREFILL] = 0
    if rules.kind == VLLM1:
        plan_vllm1(state, cache, rules)
        load = _mixed_load(state)
    else:
        _plan_prefill_or_decode(state, rules)
        load = _prefill_load(state, rules) if counters[IS_PREFILL] > 0 else _decode_load(state, rules)
    if rules.out_of_memory_tokens > 0:
        tokens = batch_tokens(state, rules)
        counters[IS_OUT_OF_MEMORY] = int(tokens > rules.out_of_memory_tokens)
    return max(step_seconds(tables, load), LEAST_STEP_SECONDS)


@compiled
def _plan_prefill_or_decode(state: State, rules: Rules) -> None:
    counters = state.counters
    running = counters[RUNNING]
    if counters[WAITING] > 0:
        if rules.kind == TGIS:
            admit_tgis(state, rules)
        elif rules.kind == TGI:
            admit_tgi(state, rules)
        else:
            admit_vllm0(state, rules)
    if counters[RUNNING] > running:
        counters[IS_PREFILL] = 1
        counters[WORK_START] = running
    elif rules.kind == VLLM0:
        make_room_vllm0(state, rules)
        if counters[RUNNING] == 0:  # the last one had no room for another token either: it is recomputed
            admit_vllm0(state, rules)
            counters[IS_PREFILL] = 1


@compiled
def _decode_load(state: State, rules: Rules) -> StepLoad:
    counters = state.counters
    tokens = batch_tokens(state, rules)
    has_changed = rules.kind == TGIS and (counters[FINISHED_COUNT] > 0 or counters[MUST_DECODE] > 0)
    return StepLoad(0, 0, 0.0, counters[RUNNING], tokens, tokens if has_changed else 0)


@compiled
def _prefill_load(state: State, rules: Rules) -> StepLoad:
    counters = state.counters
    tokens, pairs, longest = 0, 0.0, 0
    for place in range(counters[WORK_START], counters[RUNNING]):
        slot = state.lists[BATCH, place]
        length = length_so_far(state, slot)
        longest = max(longest, length)
        tokens += length
        pairs += token_pairs(0, length)
    requests = counters[RUNNING] - counters[WORK_START]
    if rules.is_padded or rules.max_paddings >= 0:
        tokens = longest * requests
        pairs = token_pairs(0, longest) * requests
    return StepLoad(requests, tokens, pairs, 0, 0, 0)


@compiled
def _mixed_load(state: State) -> StepLoad:
    requests, tokens, pairs, sequences, cached = 0, 0, 0.0, 0, 0
    for place in range(state.counters[RUNNING]):
        slot = state.lists[BATCH, place]
        new, before = state.slots[SCHEDULED_TOKENS, slot], state.slots[COMPUTED_TOKENS, slot]
        if new == 1 and before >= state.slots[INPUT_TOKENS, slot]:
            sequences += 1
            cached += before + 1
        elif new > 0:
            requests += 1
            tokens += new
            pairs += token_pairs(before, new)
    return StepLoad(requests, tokens, pairs, sequences, cached, 0)


@compiled
def token_pairs(before: int, new: int) -> float:
    """Return the attention scores of `new` tokens, each with itself and all that come before it."""
    return float(new) * before + new * (new + 1.0) / 2


@compiled
def batch_tokens(state: State, rules: Rules) -> int:
    """Return the tokens of all sequences in the batch, padding included where the server pads."""
    counters = state.counters
    if not rules.is_padded:
        return int(counters[HELD_TOKENS])
    return int(longest_length(state, rules) * counters[RUNNING])


@compiled
def complete_step(state: State, cache: PrefixCache, rules: Rules) -> None:
    """Account for the planned step: who got a token, who has finished, who has failed."""
    counters = state.counters
    counters[TOKEN_COUNT] = 0
    counters[FINISHED_COUNT] = 0
    counters[FAILED_COUNT] = 0
    if counters[IS_OUT_OF_MEMORY] > 0:
        _fail_work(state, cache, rules)
    else:
        _emit_tokens(state, cache, rules)
    if rules.kind <= TGI:
        _remember_turn(state, rules)


@compiled
def _emit_tokens(state: State, cache: PrefixCache, rules: Rules) -> None:
    counters = state.counters
    start = counters[WORK_START]
    tokens, finished, write = 0, 0, start
    for place in range(start, counters[RUNNING]):
        slot = state.lists[BATCH, place]
        state.lists[BATCH, write] = slot
        write += 1
        if rules.kind == VLLM1:
            state.slots[COMPUTED_TOKENS, slot] += state.slots[SCHEDULED_TOKENS, slot]
            if state.slots[COMPUTED_TOKENS, slot] < length_so_far(state, slot):
                continue
        generated = state.slots[GENERATED_TOKENS, slot] + 1
        state.slots[GENERATED_TOKENS, slot] = generated
        state.lists[TOKEN_SLOTS, tokens] = slot
        tokens += 1
        if generated >= state.slots[OUTPUT_TOKENS, slot]:
            state.lists[FINISHED_SLOTS, finished] = slot
            finished += 1
            write -= 1
    counters[HELD_TOKENS] += tokens
    counters[TOKEN_COUNT] = tokens
    counters[FINISHED_COUNT] = finished
    counters[RUNNING] = write
    for index in range(finished):
        leave_server(state, cache, rules, state.lists[FINISHED_SLOTS, index])


@compiled
def _fail_work(state: State, cache: PrefixCache, rules: Rules) -> None:
    counters = state.counters
    failed = 0
    for place in range(counters[WORK_START], counters[RUNNING]):
        state.lists[FAILED_SLOTS, failed] = state.lists[BATCH, place]
        failed += 1
    counters[RUNNING] = counters[WORK_START]
    counters[FAILED_COUNT] = failed
    for index in range(failed):
        leave_server(state, cache, rules, state.lists[FAILED_SLOTS, index])


@compiled
def leave_server(state: State, cache: PrefixCache, rules: Rules, slot: int) -> None:
    """Free what a sequence holds; the caller takes it out of `running`."""
    leave_batch(state, slot)
    if rules.kind == VLLM1:
        release_blocks(state, cache, rules, slot)
    elif rules.kind == VLLM0:
        free_blocks_vllm0(state, slot)


@compiled
def _remember_turn(state: State, rules: Rules) -> None:
    """Keep what TGIS and TGI decide by: decodes since the last prefill, and the order of the remaining tokens."""
    counters = state.counters
    start, running = counters[WORK_START], counters[RUNNING]
    if counters[IS_PREFILL] > 0:
        counters[WAITING_TOKENS] = 1
        # A prefill for a batch that was there is followed by a decode of both; a new batch asks the queue once more.
        counters[MUST_DECODE] = int(start > 0 and running > 0)
    else:
        counters[WAITING_TOKENS] += 1
        counters[MUST_DECODE] = 0
    if rules.kind == TGIS:
        if counters[IS_PREFILL] > 0:
            for place in range(start, running):
                remember_remaining(state, state.lists[BATCH, place], place)
        elif counters[FINISHED_COUNT] > 0:
            forget_finished(state, running + counters[FINISHED_COUNT])


@compiled
def withdraw(state: State, cache: PrefixCache, rules: Rules, slot: int) -> None:
    """Take a request out of the queue or of the batch, between two steps."""
    counters = state.counters
    lists = state.lists
    mask = lists.shape[1] - 1
    write = 0
    for read in range(counters[WAITING]):
        other = waiting_slot(state, read)
        lists[QUEUE, (counters[HEAD] + write) & mask] = other
        write += other != slot
    if write < counters[WAITING]:
        counters[WAITING] = write
        return
    running = counters[RUNNING]
    counters[RUNNING] = _without(lists[BATCH], running, slot)
    if rules.kind == TGIS:
        _without(lists[BY_REMAINING], running, slot)
    leave_server(state, cache, rules, slot)


@compiled
def _without(slots: Integers, count: int, slot: int) -> int:
    write = 0
    for read in range(count):
        slots[write] = slots[read]
        write += slots[read] != slot
    return write
