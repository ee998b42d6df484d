"""Simulated load tests: users in a closed loop, or requests that arrive by a schedule.

Invariant: the same arguments and seed give the same records, and those the engine would give step by step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.load import (
    DONE,
    NEEDS_ORDER,
    Load,
    keep_ended,
    new_load,
    run_load,
    with_more_room,
)
from llmpilot_perfmodel.batching.policies import Policy, policy_violations
from llmpilot_perfmodel.batching.prefix_cache import PrefixCache, empty_prefix_cache
from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.batching.rules import rules_of
from llmpilot_perfmodel.batching.state import Integers, Rules, State, new_state, power_of_two
from llmpilot_perfmodel.batching.validation import server_violations
from llmpilot_perfmodel.batching.workload import Workload, read_workload, whole_numbers
from llmpilot_perfmodel.steps.step_time import StepTables

_FIRST_RECORD_ROOM = 256
_FIRST_TOKEN_ROOM = 8192
_LARGEST_USERS_COUNT = 1_000_000


def simulate_users(
    *,
    policy: Policy,
    tables: StepTables,
    input_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    users_count: int,
    duration_seconds: float,
    max_output_tokens: npt.ArrayLike | None = None,
    block_hashes: Integers | None = None,
    block_hash_starts: Integers | None = None,
    seed: int | np.random.Generator | None = None,
    order: npt.ArrayLike | None = None,
    turnaround_seconds: float = 0.0,
    draining_seconds: float = 0.0,
    out_of_memory_tokens: int | None = None,
) -> RequestRecords:
    """Return the records of users who all start at once and send their next request when the last one has ended.

    input_tokens, output_tokens, max_output_tokens: one entry per request of the workload. Requests are drawn with
    `seed`, or sent in the given `order` of indices, over and over: user i sends the i-th first, then whoever is free
    sends the next, `turnaround_seconds` after the last reply has ended. block_hashes, block_hash_starts: those of all
    requests one after the other, see `Engine.submit`, and where each request's begin, with one more entry for the end.
    After `duration_seconds` nobody sends any more; replies under way have `draining_seconds` to end in, and requests
    that have not ended then do not count. Raises InvalidInputError.
    """
    violations = [
        *server_violations(policy, tables, out_of_memory_tokens),
        *_count_violations("users_count", users_count),
        *_seconds_violations("duration_seconds", duration_seconds, is_positive=True),
        *_seconds_violations("turnaround_seconds", turnaround_seconds),
        *_seconds_violations("draining_seconds", draining_seconds),
    ]
    if (seed is None) == (order is None):
        violations.append(Violation("seed", "give either a seed, to draw requests, or their order"))
    workload, hashes = read_workload(
        None if any(policy_violations(policy)) else policy,
        lengths=(input_tokens, output_tokens, max_output_tokens),
        block_hashes=block_hashes,
        block_hash_starts=block_hash_starts,
        violations=violations,
    )
    request_count = len(workload.input_tokens)
    given = None if order is None else _order(order, request_count, violations)
    if violations:
        raise InvalidInputError(violations)
    generator = np.random.default_rng(seed)
    first = generator.integers(request_count, size=max(users_count, _FIRST_RECORD_ROOM)) if given is None else given
    server = _server(
        policy,
        tables,
        out_of_memory_tokens=out_of_memory_tokens,
        slots=users_count,
        workload=workload,
        hashes=hashes,
    )
    load = new_load(
        order=first,
        send_seconds=np.zeros(users_count),
        record_room=max(_FIRST_RECORD_ROOM, 2 * users_count),
        token_room=max(_FIRST_TOKEN_ROOM, int(workload.output_tokens.max())),
    )
    end_seconds = duration_seconds + draining_seconds
    while (
        missing := server.run(
            load, until_seconds=end_seconds, sending_seconds=duration_seconds, turnaround_seconds=turnaround_seconds
        )
    ) != DONE:
        if missing == NEEDS_ORDER:
            more = generator.integers(request_count, size=len(load.order)) if given is None else load.order
            load = load._replace(order=np.concatenate([load.order, more]))
        else:
            load = with_more_room(load)
    return _records(load, workload, duration_seconds, is_closed_loop=True)


def simulate_arrivals(
    *,
    policy: Policy,
    tables: StepTables,
    arrival_seconds: npt.ArrayLike,
    input_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    max_output_tokens: npt.ArrayLike | None = None,
    block_hashes: Integers | None = None,
    block_hash_starts: Integers | None = None,
    out_of_memory_tokens: int | None = None,
) -> RequestRecords:
    """Return the records of requests that arrive by a schedule, one entry per request and in that order, all ended.

    The length of the test is the time until the last one has ended. Raises InvalidInputError.
    """
    violations = server_violations(policy, tables, out_of_memory_tokens)
    workload, hashes = read_workload(
        None if any(policy_violations(policy)) else policy,
        lengths=(input_tokens, output_tokens, max_output_tokens),
        block_hashes=block_hashes,
        block_hash_starts=block_hash_starts,
        violations=violations,
    )
    arrivals = np.atleast_1d(np.asarray(arrival_seconds, np.float64))
    count = len(workload.input_tokens)
    if arrivals.shape != (count,):
        violations.append(Violation("arrival_seconds", f"must have {count} entries, has shape {arrivals.shape}"))
    elif not (np.isfinite(arrivals).all() and (arrivals >= 0).all()):
        violations.append(Violation("arrival_seconds", "must be finite and >= 0"))
    if violations:
        raise InvalidInputError(violations)
    order = np.argsort(arrivals, kind="stable")
    server = _server(
        policy,
        tables,
        out_of_memory_tokens=out_of_memory_tokens,
        slots=count,
        workload=workload,
        hashes=hashes,
    )
    load = new_load(
        order=order,
        send_seconds=arrivals[order],
        record_room=count,
        token_room=int(workload.output_tokens.sum()),
    )
    server.run(load, until_seconds=math.inf, sending_seconds=math.inf, turnaround_seconds=-1.0)
    return _records(load, workload, float(load.clock[0]), is_closed_loop=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    state: State
    cache: PrefixCache
    rules: Rules
    tables: StepTables
    workload: Workload

    def run(self, load: Load, *, until_seconds: float, sending_seconds: float, turnaround_seconds: float) -> int:
        return run_load(
            self.state,
            self.cache,
            self.rules,
            self.tables,
            self.workload,
            load,
            float(until_seconds),
            float(sending_seconds),
            float(turnaround_seconds),
        )


def _server(
    policy: Policy,
    tables: StepTables,
    *,
    out_of_memory_tokens: int | None,
    slots: int,
    workload: Workload,
    hashes: Integers,
) -> _Server:
    rules = rules_of(policy, out_of_memory_tokens=out_of_memory_tokens)
    capacity = power_of_two(slots)
    longest = int((workload.input_tokens + workload.output_tokens).max())
    longest_blocks = -(-longest // rules.block_size)
    cache = empty_prefix_cache(rules, capacity=capacity, longest_blocks=longest_blocks, hashes=hashes)
    return _Server(
        state=new_state(rules, capacity),
        cache=cache,
        rules=rules,
        tables=tables,
        workload=workload,
    )


def _count_violations(name: str, count: int) -> Iterator[Violation]:
    if not 1 <= count <= _LARGEST_USERS_COUNT:
        yield Violation(name, f"must be between 1 and {_LARGEST_USERS_COUNT}, is {count}")


def _seconds_violations(name: str, seconds: float, *, is_positive: bool = False) -> Iterator[Violation]:
    if not math.isfinite(seconds) or seconds < 0 or (is_positive and seconds == 0):
        yield Violation(name, f"must be finite and {'> 0' if is_positive else '>= 0'}, is {seconds:g}")


def _order(order: npt.ArrayLike, request_count: int, violations: list[Violation]) -> Integers:
    indices = whole_numbers("order", order)
    if not len(indices) or indices.min() < 0 or indices.max() >= request_count:
        violations.append(Violation("order", f"must be indices from 0 to {request_count - 1}, at least one"))
    return indices


def _records(load: Load, workload: Workload, duration_seconds: float, *, is_closed_loop: bool) -> RequestRecords:
    count = keep_ended(load)
    request = load.request_index[:count]
    send_seconds = load.send_seconds[:count]
    return RequestRecords(
        duration_seconds=float(duration_seconds),
        request_index=request,
        user_index=load.slot[:count] if is_closed_loop else np.full(count, -1),
        scheduled_seconds=send_seconds,
        send_seconds=send_seconds,
        end_seconds=load.end_seconds[:count],
        input_tokens=workload.input_tokens[request],
        status=load.status[:count],
        token_starts=load.token_start[: count + 1],
        token_seconds=load.token_seconds[: load.token_start[count]],
    )
