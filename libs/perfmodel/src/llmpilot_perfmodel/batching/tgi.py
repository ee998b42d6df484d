"""Which waiting requests TGI lets into its batch.

Invariant: the memory of a request, input and largest output, is set aside for its whole life; the queue keeps its
order.
Source: the behaviour of the router of huggingface/text-generation-inference, versions 1 and 2.
"""

from llmpilot_perfmodel.batching.state import (
    INPUT_TOKENS,
    MAX_OUTPUT_TOKENS,
    MUST_DECODE,
    RESERVED_TOKENS,
    RUNNING,
    WAITING,
    WAITING_TOKENS,
    Rules,
    State,
    admit_first,
    waiting_slot,
)
from llmpilot_perfmodel.compiled import compiled


@compiled
def admit_tgi(state: State, rules: Rules) -> None:
    """Append the requests of the next prefill to the batch; none: the server decodes."""
    counters, slots = state.counters, state.slots
    running = counters[RUNNING]
    if counters[MUST_DECODE] > 0 and running > 0:
        return
    smallest = 1
    if running > 0 and counters[WAITING_TOKENS] < rules.max_waiting_tokens:
        smallest = max(1, int(running * rules.waiting_served_ratio))
    chosen, prefill_tokens, reserved = 0, 0, counters[RESERVED_TOKENS]
    while chosen < counters[WAITING] and running + chosen < rules.max_batch_size:
        slot = waiting_slot(state, chosen)
        prefill_tokens += slots[INPUT_TOKENS, slot]
        reserved += slots[INPUT_TOKENS, slot] + slots[MAX_OUTPUT_TOKENS, slot]
        if prefill_tokens > rules.max_prefill_tokens or reserved > rules.max_weight:
            break
        chosen += 1
    if chosen >= smallest:
        for _ in range(chosen):
            admit_first(state)
