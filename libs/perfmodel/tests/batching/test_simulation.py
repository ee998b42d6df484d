import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.record_schema import problems
from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.load import run_load
from llmpilot_perfmodel.batching.policies import Policy, TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.batching.records import OK, OUT_OF_MEMORY, RequestRecords
from llmpilot_perfmodel.batching.simulation import simulate_arrivals, simulate_users
from llmpilot_perfmodel.steps.step_time import StepTables

Drive = Callable[..., list[list[float]]]
Integers = npt.NDArray[np.int64]
POLICIES: list[Policy] = [
    TgisPolicy(max_batch_weight=120),
    TgisPolicy(max_batch_weight=9000, is_padded=True),
    TgiPolicy(max_batch_total_tokens=120, max_batch_prefill_tokens=90),
    Vllm0Policy(block_count=24, block_size=4, max_num_batched_tokens=100),
    Vllm1Policy(block_count=24, block_size=4, max_num_batched_tokens=40),
    Vllm1Policy(block_count=24, block_size=4, max_num_batched_tokens=40, enable_prefix_caching=False),
]


def token_lists(records: RequestRecords) -> list[list[float]]:
    return [records.token_seconds[start:end].tolist() for start, end in pairwise(records.token_starts)]


def test_one_user_sends_when_the_last_reply_has_ended(tables: StepTables) -> None:
    """Prefill of 4: 3.5, of 8: 4.5; decode of one: 1.5. The third request would end at 19.5, after the test."""
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[4, 8],
        output_tokens=[3, 2],
        users_count=1,
        duration_seconds=18.0,
        order=[0, 1],
    )
    assert records.request_index.tolist() == [0, 1]
    assert records.send_seconds.tolist() == [0, 6.5]
    assert token_lists(records) == [[3.5, 5, 6.5], [11, 12.5]]
    assert records.end_seconds.tolist() == [6.5, 12.5]
    assert records.summary().throughput_tokens_per_second == 5 / 18


def test_order_is_shared_by_the_users_and_starts_again(tables: StepTables) -> None:
    """All of one token: two users at a time, prefill 2 + (4 + 8) / 4 + 1 = 6, then 2 + (12 + 4) / 4 + 1 = 7."""
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[4, 8, 12],
        output_tokens=[1, 1, 1],
        users_count=2,
        duration_seconds=13.0,
        order=[0, 1, 2],
    )
    assert records.request_index.tolist() == [0, 1, 2, 0]
    assert records.user_index.tolist() == [0, 1, 0, 1]
    assert records.end_seconds.tolist() == [6, 6, 13, 13]


def test_turnaround_delays_the_next_request(tables: StepTables) -> None:
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[4],
        output_tokens=[1],
        users_count=1,
        duration_seconds=10.0,
        order=[0],
        turnaround_seconds=0.25,
    )
    assert records.send_seconds.tolist() == [0, 3.75]


def test_replies_under_way_when_the_test_ends_have_time_to_drain(tables: StepTables) -> None:
    """Of three at 6.5 s apart the third begins at 13, a second before users stop, and ends at 19.5."""
    drained, cut_off = (
        simulate_users(
            policy=POLICIES[0],
            tables=tables,
            input_tokens=[4],
            output_tokens=[3],
            users_count=1,
            duration_seconds=14.0,
            draining_seconds=draining_seconds,
            order=[0],
        )
        for draining_seconds in (60.0, 5.0)
    )
    assert drained.send_seconds.tolist() == [0, 6.5, 13]
    assert drained.end_seconds.tolist() == [6.5, 13, 19.5]
    assert drained.summary().throughput_tokens_per_second == 9 / 14
    assert cut_off.end_seconds.tolist() == [6.5, 13]


def test_user_whose_request_failed_sends_the_next_at_once(tables: StepTables) -> None:
    """Prompts of 30 fail after 2 + 7.5 + .5 seconds, over and over; that of 4 takes 3.5 and 1.5."""
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[30, 4],
        output_tokens=[2, 2],
        users_count=1,
        duration_seconds=45.0,
        order=[0, 0, 1],
        out_of_memory_tokens=20,
    )
    assert records.status.tolist() == [OUT_OF_MEMORY, OUT_OF_MEMORY, OK, OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert records.send_seconds.tolist() == [0, 10, 20, 25, 35]
    assert records.summary().out_of_memory_count == 4
    assert problems(records.columns()) == []


def test_failed_request_keeps_the_tokens_it_got(tables: StepTables) -> None:
    """12 + 2 tokens after two; the third step needs 15."""
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[12],
        output_tokens=[9],
        users_count=1,
        duration_seconds=9.0,
        order=[0],
        out_of_memory_tokens=13,
    )
    assert token_lists(records) == [[5.5, 7.0]]
    assert records.end_seconds.tolist() == [8.5]
    assert records.summary().throughput_tokens_per_second == 0


def test_same_seed_gives_the_same_records_and_another_does_not(tables: StepTables) -> None:
    def run(seed: int | np.random.Generator) -> list[int]:
        records = simulate_users(
            policy=POLICIES[0],
            tables=tables,
            input_tokens=np.arange(1, 50),
            output_tokens=np.arange(1, 50),
            users_count=5,
            duration_seconds=2000.0,
            seed=seed,
        )
        return [*map(int, records.request_index)]

    assert run(3) == run(3) == run(np.random.default_rng(3))
    assert run(3) != run(4)


def test_longer_test_begins_as_the_shorter_one(tables: StepTables) -> None:
    """The second needs longer arrays several times over."""
    short, long = (
        simulate_users(
            policy=POLICIES[0],
            tables=tables,
            input_tokens=np.arange(1, 50),
            output_tokens=np.arange(1, 50),
            users_count=3,
            duration_seconds=seconds,
            seed=0,
        )
        for seconds in (500.0, 200_000.0)
    )
    ended = long.end_seconds <= 500
    assert len(long) > 4000
    assert short.request_index.tolist() == long.request_index[ended].tolist()
    assert short.end_seconds.tolist() == long.end_seconds[ended].tolist()


def test_every_request_is_drawn_about_as_often(tables: StepTables) -> None:
    """Binomial, n = 20,000 or more, p = .1: four standard deviations are under .0085."""
    drawn = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=np.full(10, 4),
        output_tokens=np.full(10, 1),
        users_count=1,
        duration_seconds=3.5 * 20_000,
        seed=0,
    ).request_index
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    assert len(drawn) == 20_000
    assert shares == pytest.approx(np.full(10, 0.1), abs=0.0085)


def test_test_that_ends_before_the_first_reply_has_no_records(tables: StepTables) -> None:
    records = simulate_users(
        policy=POLICIES[0],
        tables=tables,
        input_tokens=[4],
        output_tokens=[2],
        users_count=3,
        duration_seconds=1.0,
        seed=0,
    )
    assert len(records) == 0
    assert records.summary().request_count == 0


def test_arrivals_are_recorded_in_the_order_in_which_they_were_sent(tables: StepTables) -> None:
    """The second of the list comes first; prefill 3.5 and 4.5, decode 1.5."""
    records = simulate_arrivals(
        policy=POLICIES[0], tables=tables, arrival_seconds=[20.0, 1.0], input_tokens=[8, 4], output_tokens=[2, 2]
    )
    assert records.request_index.tolist() == [1, 0]
    assert token_lists(records) == [[4.5, 6], [24.5, 26]]
    assert records.duration_seconds == 26
    assert records.columns()["user_index"] == [None, None]
    assert problems(records.columns()) == []


def workloads() -> st.SearchStrategy[tuple[list[tuple[int, int, int]], list[list[int]]]]:
    one = st.tuples(st.integers(0, 200), st.integers(1, 40), st.integers(1, 40))
    return st.lists(one, min_size=1, max_size=30).flatmap(
        lambda rows: st.tuples(
            st.just(sorted(rows)),
            st.tuples(*(st.integers(0, 2) for _ in rows)).map(
                lambda kinds: [
                    [100 * kind + block for block in range(row[1] // 4)]
                    for kind, row in zip(kinds, sorted(rows), strict=True)
                ]
            ),
        )
    )


@pytest.mark.parametrize("policy", POLICIES)
@given(workload=workloads(), out_of_memory_tokens=st.sampled_from([None, 60]))
@settings(deadline=None, max_examples=60)
def test_simulation_is_the_engine_step_by_step_and_every_request_gets_its_tokens(
    drive: Drive,
    tables: StepTables,
    policy: Policy,
    workload: tuple[list[tuple[int, int, int]], list[list[int]]],
    out_of_memory_tokens: int | None,
) -> None:
    rows, hashes = workload
    engine = Engine(policy=policy, tables=tables, out_of_memory_tokens=out_of_memory_tokens)
    by_engine = drive(engine, rows, hashes)
    arrivals, inputs, outputs = (list(column) for column in zip(*rows, strict=True))
    records = simulate_arrivals(
        policy=policy,
        tables=tables,
        arrival_seconds=arrivals,
        input_tokens=inputs,
        output_tokens=outputs,
        block_hashes=np.array([key for keys in hashes for key in keys], np.int64),
        block_hash_starts=np.cumsum([0, *(len(keys) for keys in hashes)]),
        out_of_memory_tokens=out_of_memory_tokens,
    )
    assert token_lists(records) == by_engine
    is_ok = records.is_ok
    assert is_ok.all() or out_of_memory_tokens
    assert records.output_tokens[is_ok].tolist() == np.array(outputs)[is_ok].tolist()
    assert all(earlier < later for times in by_engine for earlier, later in pairwise(times))
    assert (records.end_seconds > records.send_seconds).all()
    assert (engine.running_count, engine.waiting_count, engine.used_memory_share) == (0, 0, 0)
    assert problems(records.columns()) == []


@pytest.mark.parametrize("policy", POLICIES)
@given(workload=workloads())
@settings(deadline=None, max_examples=40)
def test_memory_is_never_overdrawn(
    tables: StepTables, policy: Policy, workload: tuple[list[tuple[int, int, int]], list[list[int]]]
) -> None:
    engine = Engine(policy=policy, tables=tables)
    for _, input_tokens, output_tokens in workload[0]:
        engine.submit(arrival_seconds=0.0, input_tokens=input_tokens, output_tokens=output_tokens)
    while engine.start_step(0.0) is not None:
        assert 0 < engine.used_memory_share <= 1
        engine.finish_step()
        assert 0 <= engine.used_memory_share <= 1
    assert engine.used_memory_share == 0


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_requests_cancelled_at_any_time_leave_nothing_behind(tables: StepTables, policy: Policy, seed: int) -> None:
    generator = np.random.default_rng(seed)
    engine = Engine(policy=policy, tables=tables, capacity=2)
    alive: set[int] = set()
    for _ in range(60):
        for _ in range(generator.integers(0, 4)):
            tokens, output = generator.integers(1, 40, 2).tolist()
            hashes = np.arange(tokens // 4) + 100 * generator.integers(0, 2)
            alive.add(
                engine.submit(arrival_seconds=0.0, input_tokens=tokens, output_tokens=output, block_hashes=hashes)
            )
        is_under_way = engine.start_step(0.0) is not None
        for slot in [slot for slot in alive if generator.random() < 0.1]:
            engine.cancel(slot)
            alive.remove(slot)
        if is_under_way:
            outcome = engine.finish_step()
            assert alive.issuperset(outcome.token_slots.tolist())
            alive.difference_update(outcome.finished_slots.tolist())
    assert engine.running_count + engine.waiting_count == len(alive)
    for slot in alive:
        engine.cancel(slot)
    assert (engine.running_count, engine.waiting_count, engine.used_memory_share) == (0, 0, 0)
    slot = engine.submit(arrival_seconds=0.0, input_tokens=40, output_tokens=1)
    engine.start_step(0.0)
    assert engine.finish_step().finished_slots.tolist() == [slot]


def test_prefix_that_returns_makes_a_load_faster(tables: StepTables) -> None:
    """Prompts of 40 with 36 tokens in common: 2 + 10 + .5 once, then 2 + 1 + .5."""
    records = simulate_users(
        policy=POLICIES[4],
        tables=tables,
        input_tokens=[40],
        output_tokens=[1],
        block_hashes=np.arange(9),
        block_hash_starts=np.array([0, 9]),
        users_count=1,
        duration_seconds=20.0,
        order=[0],
    )
    assert records.end_seconds.tolist() == [12.5, 16, 19.5]


def test_arrays_of_any_kind_run_the_same_machine_code(tables: StepTables) -> None:
    """Compiling it again would take ten seconds."""
    machine_code: Any = run_load
    starts = np.array([0, -1, 2, -1, 3])[::2]
    hashes = np.arange(3)
    hashes.flags.writeable = False
    for kind in (np.int32, np.int64, np.uint8):
        lengths = np.arange(8, 12, dtype=kind)[::2]
        simulate_arrivals(
            policy=POLICIES[4],
            tables=tables,
            arrival_seconds=np.zeros(4, np.float32)[::2],
            input_tokens=lengths,
            output_tokens=lengths,
            block_hashes=hashes,
            block_hash_starts=starts,
        )
    assert len(machine_code.signatures) == 1


def test_everything_wrong_with_a_load_is_listed(tables: StepTables) -> None:
    with pytest.raises(InvalidInputError) as caught:
        simulate_users(
            policy=POLICIES[0],
            tables=tables,
            input_tokens=[4, 0, 100],
            output_tokens=[1, 1, 21],
            users_count=0,
            duration_seconds=-1.0,
            turnaround_seconds=math.nan,
            draining_seconds=-1.0,
            order=[3],
            seed=1,
            block_hashes=np.arange(2),
            block_hash_starts=np.array([0, 2]),
        )
    assert [violation.field for violation in caught.value.violations] == [
        "users_count",
        "duration_seconds",
        "turnaround_seconds",
        "draining_seconds",
        "seed",
        "request 1 input_tokens",
        "request 2 max_output_tokens",
        "block_hash_starts",
        "order",
    ]


def test_only_the_first_wrong_requests_are_listed(tables: StepTables) -> None:
    with pytest.raises(InvalidInputError) as caught:
        simulate_arrivals(
            policy=POLICIES[0],
            tables=tables,
            arrival_seconds=np.zeros(100),
            input_tokens=np.zeros(100, np.int64),
            output_tokens=np.ones(100, np.int64),
        )
    assert len(caught.value.violations) == 21
    assert caught.value.violations[-1].description == "there may be more; these are the first"


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ([0.0], r"must have 2 entries, has shape \(1,\)"),
        ([0.0, -1.0], "must be finite and >= 0"),
        ([0.0, math.nan], "must be finite and >= 0"),
    ],
)
def test_wrong_arrivals_are_refused(tables: StepTables, arrivals: list[float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        simulate_arrivals(
            policy=POLICIES[0], tables=tables, arrival_seconds=arrivals, input_tokens=[1, 1], output_tokens=[1, 1]
        )


@pytest.mark.parametrize("lengths", [[], [1.5], [[1, 2]]])
def test_lengths_that_are_no_row_of_whole_numbers_are_refused(tables: StepTables, lengths: list[object]) -> None:
    with pytest.raises(InvalidInputError, match="input_tokens"):
        simulate_arrivals(
            policy=POLICIES[0],
            tables=tables,
            arrival_seconds=[],
            input_tokens=lengths,  # type: ignore[arg-type]
            output_tokens=[1],
        )


def test_more_block_hashes_than_blocks_are_refused(tables: StepTables) -> None:
    with pytest.raises(InvalidInputError, match="request 0 has 3, more than full blocks in its 9 tokens"):
        simulate_arrivals(
            policy=POLICIES[4],
            tables=tables,
            arrival_seconds=[0.0],
            input_tokens=[8],
            output_tokens=[1],
            block_hashes=np.arange(3),
            block_hash_starts=np.array([0, 3]),
        )


def test_wrong_server_is_refused_with_all_that_is_wrong(tables: StepTables) -> None:
    with pytest.raises(InvalidInputError) as caught:
        simulate_users(
            policy=Vllm1Policy(block_count=10, block_size=0),
            tables=tables,
            input_tokens=[1],
            output_tokens=[1],
            users_count=0,
            duration_seconds=1.0,
            seed=0,
            out_of_memory_tokens=0,
        )
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["policy.block_size", "out_of_memory_tokens", "users_count"]
