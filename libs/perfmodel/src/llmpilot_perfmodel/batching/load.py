"""The loop of a simulated load test: requests arrive, the server steps, users answer a reply with their next request.

Invariant: the loop stops only between two steps with everything accounted for, so it goes on with longer arrays where
it left off.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.prefix_cache import PrefixCache
from llmpilot_perfmodel.batching.records import OK, OUT_OF_MEMORY
from llmpilot_perfmodel.batching.state import (
    FAILED_COUNT,
    FAILED_SLOTS,
    FINISHED_COUNT,
    FINISHED_SLOTS,
    HASH_COUNT,
    HASH_START,
    NEXT_TOKEN,
    RECORD,
    TOKEN_COUNT,
    TOKEN_SLOTS,
    Floats,
    Integers,
    Rules,
    State,
    enqueue,
)
from llmpilot_perfmodel.batching.step import complete_step, plan_step
from llmpilot_perfmodel.batching.workload import Workload
from llmpilot_perfmodel.compiled import compiled
from llmpilot_perfmodel.steps.step_time import StepTables

DONE, NEEDS_ORDER, NEEDS_ROOM = range(3)

NEXT_IN_ORDER, RECORD_COUNT, TOKENS_TAKEN, PENDING_HEAD, PENDING_COUNT, PROGRESS_COUNT = range(6)
NOT_ENDED = -1

_Number = TypeVar("_Number", np.int64, np.float64)


class Load(NamedTuple):
    """Who sends what and when, and what came of it."""

    clock: Floats
    """One entry: now."""
    progress: Integers
    order: Integers
    """Requests in the order in which they are sent."""
    pending_seconds: Floats
    """A ring by time, as long as there are slots: when a slot will send its next request."""
    pending_slots: Integers
    request_index: Integers
    """From here on by record, but for the last array."""
    slot: Integers
    send_seconds: Floats
    end_seconds: Floats
    status: Integers
    token_start: Integers
    """With one more entry, for where the tokens of the last record end once only those that ended are kept."""
    token_count: Integers
    token_seconds: Floats


def new_load(*, order: Integers, send_seconds: Floats, record_room: int, token_room: int) -> Load:
    """Return a load in which slot i sends its first request at `send_seconds[i]`, which must not decrease."""
    slots = len(send_seconds)
    progress = np.zeros(PROGRESS_COUNT, np.int64)
    progress[PENDING_COUNT] = slots
    return Load(
        clock=np.zeros(1),
        progress=progress,
        order=order,
        pending_seconds=send_seconds.copy(),
        pending_slots=np.arange(slots),
        request_index=np.empty(record_room, np.int64),
        slot=np.empty(record_room, np.int64),
        send_seconds=np.empty(record_room),
        end_seconds=np.empty(record_room),
        status=np.empty(record_room, np.int64),
        token_start=np.empty(record_room + 1, np.int64),
        token_count=np.empty(record_room, np.int64),
        token_seconds=np.empty(token_room),
    )


def with_more_room(load: Load) -> Load:
    """Return the same load with twice the room for records."""
    sent, tokens = load.progress[RECORD_COUNT], load.progress[TOKENS_TAKEN]
    records = 2 * len(load.slot)
    return load._replace(
        request_index=_longer(load.request_index, sent, records),
        slot=_longer(load.slot, sent, records),
        send_seconds=_longer(load.send_seconds, sent, records),
        end_seconds=_longer(load.end_seconds, sent, records),
        status=_longer(load.status, sent, records),
        token_start=_longer(load.token_start, sent, records + 1),
        token_count=_longer(load.token_count, sent, records),
        token_seconds=_longer(load.token_seconds, tokens, 2 * len(load.token_seconds)),
    )


def _longer(values: npt.NDArray[_Number], count: int, room: int) -> npt.NDArray[_Number]:
    longer = np.empty(room, values.dtype)
    longer[:count] = values[:count]
    return longer


@compiled
def keep_ended(load: Load) -> int:
    """Move the records that have ended, and their tokens, together at the beginning; return their number."""
    write, tokens = 0, 0
    for read in range(load.progress[RECORD_COUNT]):
        if load.status[read] == NOT_ENDED:
            continue
        start, count = load.token_start[read], load.token_count[read]
        load.request_index[write] = load.request_index[read]
        load.slot[write] = load.slot[read]
        load.send_seconds[write] = load.send_seconds[read]
        load.end_seconds[write] = load.end_seconds[read]
        load.status[write] = load.status[read]
        load.token_start[write] = tokens
        if start > tokens:
            for place in range(count):
                load.token_seconds[tokens + place] = load.token_seconds[start + place]
        tokens += count
        write += 1
    load.token_start[write] = tokens
    return write


@compiled
def run_load(  # noqa: PLR0917 compiled code knows no keyword-only arguments
    state: State,
    cache: PrefixCache,
    rules: Rules,
    tables: StepTables,
    workload: Workload,
    load: Load,
    until_seconds: float,
    sending_seconds: float,
    turnaround_seconds: float,
) -> int:
    """Run until a step would end after `until_seconds` or nothing is left to do; say what is missing to go on.

    sending_seconds: when a slot sends its last request. turnaround_seconds: from the end of a reply to the next request
    of the same slot; negative: there is none.
    """
    progress = load.progress
    while True:
        missing = _send_due(state, workload, load)
        if missing != DONE:
            return missing
        seconds = plan_step(state, cache, rules, tables)
        if seconds < 0:
            if progress[PENDING_COUNT] == 0:
                return DONE
            load.clock[0] = load.pending_seconds[progress[PENDING_HEAD]]
            if load.clock[0] > until_seconds:
                return DONE
            continue
        end = load.clock[0] + seconds
        if end > until_seconds:
            return DONE
        load.clock[0] = end
        complete_step(state, cache, rules)
        _record(state, load, end, sending_seconds, turnaround_seconds)


@compiled
def _send_due(state: State, workload: Workload, load: Load) -> int:
    """Send every request whose time has come."""
    progress = load.progress
    while progress[PENDING_COUNT] > 0 and load.pending_seconds[progress[PENDING_HEAD]] <= load.clock[0]:
        if progress[NEXT_IN_ORDER] == len(load.order):
            return NEEDS_ORDER
        request = load.order[progress[NEXT_IN_ORDER]]
        record, start = progress[RECORD_COUNT], progress[TOKENS_TAKEN]
        output = workload.output_tokens[request]
        if record == len(load.slot) or start + output > len(load.token_seconds):
            return NEEDS_ROOM
        seconds = load.pending_seconds[progress[PENDING_HEAD]]
        slot = load.pending_slots[progress[PENDING_HEAD]]
        progress[PENDING_HEAD] = (progress[PENDING_HEAD] + 1) % len(load.pending_slots)
        progress[PENDING_COUNT] -= 1
        progress[NEXT_IN_ORDER] += 1
        progress[RECORD_COUNT] += 1
        progress[TOKENS_TAKEN] += output
        state.slots[RECORD, slot] = record
        state.slots[NEXT_TOKEN, slot] = start
        load.request_index[record] = request
        load.slot[record] = slot
        load.send_seconds[record] = seconds
        load.token_start[record] = start
        load.status[record] = NOT_ENDED
        state.slots[HASH_START, slot] = workload.hash_starts[request]
        state.slots[HASH_COUNT, slot] = workload.hash_starts[request + 1] - workload.hash_starts[request]
        enqueue(state, slot, seconds, workload.input_tokens[request], output, workload.max_output_tokens[request])
    return DONE


@compiled
def _record(state: State, load: Load, now: float, sending_seconds: float, turnaround_seconds: float) -> None:
    """Write down what a step brought; whoever has got an answer gets ready to send again."""
    counters = state.counters
    for index in range(counters[TOKEN_COUNT]):
        slot = state.lists[TOKEN_SLOTS, index]
        place = state.slots[NEXT_TOKEN, slot]
        load.token_seconds[place] = now
        state.slots[NEXT_TOKEN, slot] = place + 1
    for index in range(counters[FINISHED_COUNT]):
        _end(state, load, state.lists[FINISHED_SLOTS, index], OK, now, sending_seconds, turnaround_seconds)
    for index in range(counters[FAILED_COUNT]):
        _end(state, load, state.lists[FAILED_SLOTS, index], OUT_OF_MEMORY, now, sending_seconds, turnaround_seconds)


@compiled
def _end(  # noqa: PLR0917 compiled code knows no keyword-only arguments
    state: State,
    load: Load,
    slot: int,
    status: int,
    now: float,
    sending_seconds: float,
    turnaround_seconds: float,
) -> None:
    record = state.slots[RECORD, slot]
    load.end_seconds[record] = now
    load.status[record] = status
    load.token_count[record] = state.slots[NEXT_TOKEN, slot] - load.token_start[record]
    if turnaround_seconds >= 0 and now + turnaround_seconds < sending_seconds:
        progress = load.progress
        place = (progress[PENDING_HEAD] + progress[PENDING_COUNT]) % len(load.pending_slots)
        load.pending_seconds[place] = now + turnaround_seconds
        load.pending_slots[place] = slot
        progress[PENDING_COUNT] += 1
