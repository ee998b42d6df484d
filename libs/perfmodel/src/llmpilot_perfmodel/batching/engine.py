"""A server's scheduler and batch, one step at a time, for whoever owns the clock.

Invariant: a slot belongs to one request from `submit` until it has finished, failed or been cancelled.
"""

from dataclasses import dataclass

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.batching.policies import Policy, TgiPolicy, TgisPolicy
from llmpilot_perfmodel.batching.prefix_cache import empty_prefix_cache, with_room
from llmpilot_perfmodel.batching.rules import rules_of
from llmpilot_perfmodel.batching.state import (
    FAILED_COUNT,
    FAILED_SLOTS,
    FINISHED_COUNT,
    FINISHED_SLOTS,
    FREE_BLOCKS,
    HASH_COUNT,
    HASH_START,
    PREEMPTIONS,
    PREFIX_HIT_TOKENS,
    PREFIX_QUERY_TOKENS,
    RESERVED_TOKENS,
    RUNNING,
    TOKEN_COUNT,
    TOKEN_SLOTS,
    WAITING,
    Integers,
    enqueue,
    grown,
    new_state,
    power_of_two,
)
from llmpilot_perfmodel.batching.step import complete_step, plan_step, withdraw
from llmpilot_perfmodel.batching.tgis import held_weight
from llmpilot_perfmodel.batching.validation import request_violations, server_violations
from llmpilot_perfmodel.steps.step_time import StepTables

NO_BLOCK_HASHES: Integers = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step brought."""

    token_slots: Integers
    """Slots that got one token each, in the order in which the server sends them."""
    finished_slots: Integers
    """Those of them whose last token this was."""
    failed_slots: Integers
    """Slots whose request failed because the GPU ran out of memory."""


class Engine:
    """A server's scheduler and batch; the caller owns the clock (seconds, any origin)."""

    def __init__(
        self,
        *,
        policy: Policy,
        tables: StepTables,
        out_of_memory_tokens: int | None = None,
        capacity: int = 1024,
    ) -> None:
        """Start idle; it grows when more than `capacity` requests are in it.

        out_of_memory_tokens: a step whose batch holds more tokens (padded ones where the policy pads) fails as on a
        real GPU, after as long as if it had worked: the prefilling requests in a prefill, all running ones in a decode;
        None: never. Raises InvalidInputError.
        """
        violations = server_violations(policy, tables, out_of_memory_tokens)
        if violations:
            raise InvalidInputError(violations)
        self._policy = policy
        self._tables = tables
        self._rules = rules_of(policy, out_of_memory_tokens=out_of_memory_tokens)
        self._capacity = power_of_two(capacity)
        self._state = new_state(self._rules, self._capacity)
        self._hash_width = 0
        self._cache = empty_prefix_cache(self._rules, capacity=self._capacity, longest_blocks=0, hashes=NO_BLOCK_HASHES)
        self._free_slots = list(range(self._capacity))[::-1]
        self._taken = np.zeros(self._capacity, np.bool_)
        self._cancelled: set[int] = set()
        self._is_in_step = False

    def submit(
        self,
        *,
        arrival_seconds: float,
        input_tokens: int,
        output_tokens: int,
        max_output_tokens: int | None = None,
        block_hashes: Integers = NO_BLOCK_HASHES,
    ) -> int:
        """Queue a request and return its slot, its own until it has finished, failed or been cancelled.

        output_tokens: what it will really generate; max_output_tokens: what the scheduler must expect; None: the same.
        block_hashes: one per full block of the prompt, or of prompt and output, chained, so that equal hashes mean
        equal prefixes; they matter to a prefix cache only. Raises InvalidInputError where it could never be scheduled.
        """
        most = output_tokens if max_output_tokens is None else max_output_tokens
        violations = list(request_violations(self._policy, input_tokens, output_tokens, most))
        if violations:
            raise InvalidInputError(violations)
        if not self._free_slots:
            self._grow(2 * self._capacity)
        slot = self._free_slots.pop()
        self._taken[slot] = True
        if self._rules.has_prefix_cache:
            self._keep_hashes(slot, input_tokens + output_tokens, block_hashes)
        enqueue(self._state, slot, float(arrival_seconds), int(input_tokens), int(output_tokens), int(most))
        return slot

    def cancel(self, slot: int) -> None:
        """Take a request out; its place and memory are free before the next step. Raises PreconditionError."""
        if not 0 <= slot < self._capacity or not self._taken[slot] or slot in self._cancelled:
            raise PreconditionError(f"slot {slot} holds no request; cancel only what was submitted and has not ended")
        if self._is_in_step:
            self._cancelled.add(slot)
        else:
            withdraw(self._state, self._cache, self._rules, slot)
            self._free(slot)

    def start_step(self, now_seconds: float) -> float | None:
        """Choose the work of a step that starts now and return when it ends; None: nothing to do until `submit`."""
        if self._is_in_step:
            raise PreconditionError("a step is under way; call finish_step before start_step")
        seconds = plan_step(self._state, self._cache, self._rules, self._tables)
        if seconds < 0:
            return None
        self._is_in_step = True
        return now_seconds + seconds

    def finish_step(self) -> StepOutcome:
        """Return what the step under way brought. Finished and failed slots are free afterwards."""
        if not self._is_in_step:
            raise PreconditionError("no step is under way; call start_step before finish_step")
        complete_step(self._state, self._cache, self._rules)
        self._is_in_step = False
        state, counters = self._state, self._state.counters
        tokens = state.lists[TOKEN_SLOTS, : counters[TOKEN_COUNT]].copy()
        finished = state.lists[FINISHED_SLOTS, : counters[FINISHED_COUNT]].copy()
        failed = state.lists[FAILED_SLOTS, : counters[FAILED_COUNT]].copy()
        gone = [*finished.tolist(), *failed.tolist()]
        if self._cancelled:
            for slot in self._cancelled.difference(gone):
                withdraw(state, self._cache, self._rules, slot)
            gone = list(self._cancelled.union(gone))
            tokens, finished, failed = (self._without_cancelled(slots) for slots in (tokens, finished, failed))
            self._cancelled.clear()
        self._free_slots += gone
        self._taken[gone] = False
        return StepOutcome(token_slots=tokens, finished_slots=finished, failed_slots=failed)

    @property
    def running_count(self) -> int:
        """Sequences in the batch."""
        return int(self._state.counters[RUNNING])

    @property
    def waiting_count(self) -> int:
        """Requests in the queue, preempted ones included."""
        return int(self._state.counters[WAITING])

    @property
    def used_memory_share(self) -> float:
        """Share of the blocks, or of the largest batch weight, that is taken, 0 to 1."""
        counters, rules = self._state.counters, self._rules
        match self._policy:
            case TgisPolicy():
                return min(1.0, held_weight(self._state, rules) / rules.max_weight)
            case TgiPolicy():
                return float(counters[RESERVED_TOKENS]) / rules.max_weight
            case _:
                return 1.0 - float(counters[FREE_BLOCKS]) / rules.block_count

    @property
    def preemption_count(self) -> int:
        """Sequences sent back to the queue since the start."""
        return int(self._state.counters[PREEMPTIONS])

    @property
    def prefix_hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache since the start."""
        return int(self._state.counters[PREFIX_HIT_TOKENS])

    @property
    def prefix_query_tokens(self) -> int:
        """Prompt tokens looked up in the prefix cache since the start."""
        return int(self._state.counters[PREFIX_QUERY_TOKENS])

    def _without_cancelled(self, slots: Integers) -> Integers:
        return slots[~np.isin(slots, list(self._cancelled))]

    def _free(self, slot: int) -> None:
        self._free_slots.append(slot)
        self._taken[slot] = False

    def _grow(self, capacity: int) -> None:
        self._state = grown(self._state, self._rules, capacity)
        self._free_slots = list(range(self._capacity, capacity))[::-1]
        self._taken = np.concatenate([self._taken, np.zeros(capacity - self._capacity, np.bool_)])
        self._capacity = capacity
        self._make_cache_room(self._hash_width)

    def _make_cache_room(self, longest_blocks: int) -> None:
        if self._rules.has_prefix_cache:
            self._cache = with_room(
                self._cache, self._rules, capacity=self._capacity, old=self._hash_width, longest_blocks=longest_blocks
            )
            self._hash_width = longest_blocks
            self._state.slots[HASH_START] = np.arange(self._capacity) * longest_blocks

    def _keep_hashes(self, slot: int, tokens: int, block_hashes: Integers) -> None:
        blocks = -(-tokens // self._rules.block_size)
        if blocks > self._hash_width:
            self._make_cache_room(power_of_two(blocks))
        hashes = np.asarray(block_hashes, np.int64)[:blocks]
        start = self._state.slots[HASH_START, slot]
        self._cache.hashes[start : start + len(hashes)] = hashes
        self._state.slots[HASH_COUNT, slot] = len(hashes)
