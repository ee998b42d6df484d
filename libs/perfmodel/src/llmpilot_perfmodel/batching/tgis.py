"""Which waiting requests TGIS lets into its batch.

Invariant: when a request is let in, no sequence that ends before it or with it could end in a batch that weighs more
than the policy allows, whatever they all generate.
Source: the behaviour of the router of IBM/text-generation-inference, October 2023. It looks ahead: the batch is
heaviest when one of its sequences ends, so those are the moments at which the weight is checked. As the router, it
overlooks that a prefill puts the new sequences a token ahead, so that a batch may weigh a few tokens more in the end.
"""

from llmpilot_perfmodel.batching.state import (
    ARRIVAL_NANOS,
    BATCH,
    BY_REMAINING,
    CHOSEN,
    GENERATED_TOKENS,
    HEAD,
    HELD_TOKENS,
    INPUT_TOKENS,
    LENGTH,
    MAX_OUTPUT_TOKENS,
    MUST_DECODE,
    NANOS_PER_SECOND,
    OUTPUT_TOKENS,
    QUEUE,
    REMAINING,
    RESERVED_TOKENS,
    RUNNING,
    WAITING,
    WAITING_TOKENS,
    Integers,
    Rules,
    State,
    enter_batch,
    length_so_far,
    may_remain,
    waiting_slot,
)
from llmpilot_perfmodel.compiled import compiled

_OVERTAKING_NANOS = NANOS_PER_SECOND
"""How much later than a request that does not fit a smaller one may have arrived and still overtake it."""
_FOREVER = 2**62


@compiled
def admit_tgis(state: State, rules: Rules) -> None:
    """Append the requests of the next prefill to the batch; none: the server decodes."""
    counters = state.counters
    running = counters[RUNNING]
    if counters[MUST_DECODE] > 0 and running > 0:
        return
    smallest = 1
    if running == 1:
        if may_remain(state, state.lists[BATCH, 0]) == 1:  # about to complete
            return
    elif running > 1 and counters[WAITING_TOKENS] < rules.max_waiting_tokens:
        left = rules.max_waiting_tokens - counters[WAITING_TOKENS]
        smallest = max(1, running * left // rules.max_waiting_tokens)
    if counters[WAITING] < smallest or running + smallest > rules.max_batch_size:
        return
    chosen, seen = _choose(state, rules, smallest)
    if chosen > 0:
        _let_in(state, chosen, seen)


@compiled
def _choose(state: State, rules: Rules, smallest: int) -> tuple[int, int]:
    """List the places of the chosen requests; return their number and how many were looked at; too few: (0, 0)."""
    counters, slots, lists = state.counters, state.slots, state.lists
    running, waiting = counters[RUNNING], counters[WAITING]
    chosen, seen = 0, 0
    entries = -1  # in the table of remaining tokens; -1: it is not made yet
    cutoff = _FOREVER
    reserved, held, longest = counters[RESERVED_TOKENS], counters[HELD_TOKENS], longest_length(state, rules)
    least = may_remain(state, lists[BY_REMAINING, running - 1]) if running > 0 else _FOREVER
    while seen < waiting and running + chosen < rules.max_batch_size:
        slot = waiting_slot(state, seen)
        if slots[ARRIVAL_NANOS, slot] > cutoff:
            break
        tokens, output = slots[INPUT_TOKENS, slot], slots[MAX_OUTPUT_TOKENS, slot]
        # The first sequence to end is a moment at which the weight counts, and a cheap one to look at.
        fits = _weight(rules, held + tokens, max(longest, tokens), running + chosen + 1, min(least, output)) <= (
            rules.max_weight
        )
        if fits and (rules.is_padded or reserved + tokens + output > rules.max_weight):
            if entries < 0:
                entries = _tabulate(state, chosen)
            fits = not _is_too_heavy(lists, entries, rules, tokens, output)
        if not fits and chosen + waiting < smallest + seen + 1:
            return 0, 0
        seen += 1
        if not fits:
            cutoff = min(cutoff, slots[ARRIVAL_NANOS, slot] + _OVERTAKING_NANOS)
            continue
        if entries >= 0:
            entries = _insert(lists, entries, output, tokens)
        lists[CHOSEN, chosen] = seen - 1
        chosen += 1
        reserved, held = reserved + tokens + output, held + tokens
        longest, least = max(longest, tokens), min(least, output)
    return chosen, seen


@compiled
def longest_length(state: State, rules: Rules) -> int:
    """Return the length of the longest sequence of the batch where the server pads; else 0."""
    longest = 0
    if rules.is_padded:
        for place in range(state.counters[RUNNING]):
            longest = max(longest, length_so_far(state, state.lists[BATCH, place]))
    return longest


@compiled
def _tabulate(state: State, chosen: int) -> int:
    """List what runs and what is chosen, the longest output still to come first; return their number."""
    lists = state.lists
    entries = int(state.counters[RUNNING])
    for place in range(entries):
        slot = lists[BY_REMAINING, place]
        lists[REMAINING, place] = may_remain(state, slot)
        lists[LENGTH, place] = length_so_far(state, slot)
    for index in range(chosen):
        slot = waiting_slot(state, lists[CHOSEN, index])
        entries = _insert(lists, entries, state.slots[MAX_OUTPUT_TOKENS, slot], state.slots[INPUT_TOKENS, slot])
    return entries


@compiled
def _insert(lists: Integers, entries: int, output: int, length: int) -> int:
    place = entries
    while place > 0 and lists[REMAINING, place - 1] < output:
        lists[REMAINING, place] = lists[REMAINING, place - 1]
        lists[LENGTH, place] = lists[LENGTH, place - 1]
        place -= 1
    lists[REMAINING, place] = output
    lists[LENGTH, place] = length
    return entries + 1


@compiled
def _is_too_heavy(lists: Integers, entries: int, rules: Rules, length: int, output: int) -> bool:
    """Return whether one more request makes the batch too heavy at the end of it or of a sequence that ends earlier."""
    total, longest, place = length, length, 0
    while place < entries and lists[REMAINING, place] >= output:
        total += lists[LENGTH, place]
        longest = max(longest, lists[LENGTH, place])
        place += 1
    if _weight(rules, total, longest, place + 1, output) > rules.max_weight:
        return True
    while place < entries:
        total += lists[LENGTH, place]
        longest = max(longest, lists[LENGTH, place])
        place += 1
        if _weight(rules, total, longest, place + 1, lists[REMAINING, place - 1]) > rules.max_weight:
            return True
    return False


@compiled
def _weight(rules: Rules, total: int, longest: int, count: int, more: int) -> int:
    """Return the weight of `count` sequences, now `total` tokens, after `more` tokens each."""
    if not rules.is_padded:
        return int(total + more * count)
    length = longest + more
    return int(length * length * count)


@compiled
def held_weight(state: State, rules: Rules) -> int:
    """Return the weight of the batch as it is."""
    return _weight(rules, state.counters[HELD_TOKENS], longest_length(state, rules), state.counters[RUNNING], 0)


@compiled
def _let_in(state: State, chosen: int, seen: int) -> None:
    """Append the chosen to the batch and close the gaps in the queue towards its tail."""
    counters, lists = state.counters, state.lists
    mask = lists.shape[1] - 1
    head = counters[HEAD]
    for index in range(chosen):
        enter_batch(state, waiting_slot(state, lists[CHOSEN, index]))
    unmoved = chosen - 1
    write = seen - 1
    for read in range(seen - 1, -1, -1):
        if unmoved >= 0 and lists[CHOSEN, unmoved] == read:
            unmoved -= 1
        else:
            lists[QUEUE, (head + write) & mask] = lists[QUEUE, (head + read) & mask]
            write -= 1
    counters[HEAD] = (head + chosen) & mask
    counters[WAITING] -= chosen


@compiled
def remember_remaining(state: State, slot: int, place_count: int) -> None:
    """Insert a slot into the first `place_count` of BY_REMAINING: all lose one token per decode, so order lasts."""
    remaining = may_remain(state, slot)
    place = place_count
    while place > 0 and may_remain(state, state.lists[BY_REMAINING, place - 1]) < remaining:
        state.lists[BY_REMAINING, place] = state.lists[BY_REMAINING, place - 1]
        place -= 1
    state.lists[BY_REMAINING, place] = slot


@compiled
def forget_finished(state: State, place_count: int) -> None:
    """Take those that have finished out of the first `place_count` of BY_REMAINING."""
    write = 0
    for read in range(place_count):
        slot = state.lists[BY_REMAINING, read]
        state.lists[BY_REMAINING, write] = slot
        write += state.slots[GENERATED_TOKENS, slot] < state.slots[OUTPUT_TOKENS, slot]
