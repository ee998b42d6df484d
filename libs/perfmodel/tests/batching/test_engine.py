import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import Policy, TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants, StepTables

Drive = Callable[..., list[list[float]]]
POLICIES: list[Policy] = [
    TgisPolicy(max_batch_weight=400),
    TgisPolicy(max_batch_weight=40_000, is_padded=True),
    TgiPolicy(max_batch_total_tokens=400),
    Vllm0Policy(block_count=100, block_size=4),
    Vllm1Policy(block_count=100, block_size=4),
    Vllm1Policy(block_count=100, block_size=4, enable_prefix_caching=False),
]


def submit(engine: Engine, input_tokens: int = 8, output_tokens: int = 4) -> int:
    return engine.submit(arrival_seconds=0.0, input_tokens=input_tokens, output_tokens=output_tokens)


def step(engine: Engine) -> tuple[list[int], list[int], list[int]]:
    assert engine.start_step(0.0) is not None
    outcome = engine.finish_step()
    return outcome.token_slots.tolist(), outcome.finished_slots.tolist(), outcome.failed_slots.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_engine_has_nothing_to_do(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables)
    assert engine.start_step(5.0) is None
    assert (engine.running_count, engine.waiting_count, engine.used_memory_share) == (0, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_step_starts_when_the_caller_says(policy: Policy, tables: StepTables) -> None:
    """Prefill of 8 tokens: 2 + 2 + .5."""
    engine = Engine(policy=policy, tables=tables)
    submit(engine)
    assert engine.start_step(1e6) == 1e6 + 4.5


def test_decode_is_paid_by_the_tokens_so_far(constants: StepConstants) -> None:
    """Two sequences, 8 + 1 and 4 + 1 tokens; padded to the longest, 2 x 9."""
    per_token = replace(constants, decode_seconds_per_cached_token=1.0).tables()
    for is_padded, tokens in ((False, 9 + 5), (True, 2 * 9)):
        engine = Engine(policy=TgisPolicy(max_batch_weight=400, is_padded=is_padded), tables=per_token)
        submit(engine, 8)
        submit(engine, 4)
        step(engine)
        assert engine.start_step(0.0) == 2.0 + tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_cancelled_request_in_the_queue_leaves_no_trace(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables)
    slots = [submit(engine) for _ in range(3)]
    engine.cancel(slots[1])
    assert engine.waiting_count == 2
    assert step(engine)[0] == [slots[0], slots[2]]


@pytest.mark.parametrize("policy", POLICIES)
def test_cancelled_request_in_the_batch_frees_its_memory(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables)
    slots = [submit(engine) for _ in range(3)]
    step(engine)
    share = engine.used_memory_share
    engine.cancel(slots[1])
    assert engine.used_memory_share == pytest.approx(share * 2 / 3)
    assert step(engine)[0] == [slots[0], slots[2]]
    for slot in (slots[0], slots[2]):
        engine.cancel(slot)
    assert (engine.running_count, engine.used_memory_share, engine.start_step(0.0)) == (0, 0, None)


@pytest.mark.parametrize("policy", POLICIES)
def test_request_cancelled_during_a_step_gets_no_token_of_it(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables)
    slots = [submit(engine, output_tokens=tokens) for tokens in (4, 4, 1, 1)]
    engine.start_step(0.0)
    engine.cancel(slots[1])
    engine.cancel(slots[2])
    outcome = engine.finish_step()
    assert outcome.token_slots.tolist() == [slots[0], slots[3]]
    assert outcome.finished_slots.tolist() == [slots[3]]
    assert engine.running_count == 1
    step(engine), step(engine), step(engine)
    assert (engine.running_count, engine.used_memory_share) == (0, 0)


def test_cancelled_slot_is_not_given_away_before_the_step_ends(tables: StepTables) -> None:
    engine = Engine(policy=POLICIES[0], tables=tables)
    slot = submit(engine)
    engine.start_step(0.0)
    engine.cancel(slot)
    assert submit(engine) != slot
    engine.finish_step()
    assert submit(engine) == slot


@pytest.mark.parametrize("policy", POLICIES)
def test_last_cancellation_between_prefill_and_decode_does_not_stop_the_next_request(
    policy: Policy, tables: StepTables
) -> None:
    engine = Engine(policy=policy, tables=tables)
    slots = [submit(engine)]
    step(engine)
    slots.append(submit(engine))
    step(engine)  # a prefill beside the batch, after which TGIS and TGI have to decode
    for slot in slots:
        engine.cancel(slot)
    slot = submit(engine)
    assert step(engine)[0] == [slot]


@pytest.mark.parametrize("slot", [-1, 0, 10**9])
def test_slot_without_a_request_cannot_be_cancelled(tables: StepTables, slot: int) -> None:
    with pytest.raises(PreconditionError, match=f"slot {slot} holds no request"):
        Engine(policy=POLICIES[0], tables=tables).cancel(slot)


def test_request_cannot_be_cancelled_twice(tables: StepTables) -> None:
    engine = Engine(policy=POLICIES[0], tables=tables)
    slot = submit(engine)
    engine.start_step(0.0)
    engine.cancel(slot)
    with pytest.raises(PreconditionError, match="holds no request"):
        engine.cancel(slot)


def test_steps_must_alternate(tables: StepTables) -> None:
    engine = Engine(policy=POLICIES[0], tables=tables)
    with pytest.raises(PreconditionError, match="call start_step before"):
        engine.finish_step()
    submit(engine)
    engine.start_step(0.0)
    with pytest.raises(PreconditionError, match="call finish_step before"):
        engine.start_step(0.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_changes_nothing(drive: Drive, policy: Policy, tables: StepTables) -> None:
    generator = np.random.default_rng(1)
    requests = [(number / 2, *generator.integers(1, 60, 2).tolist()) for number in range(100)]
    hashes = [range(generator.integers(0, 3) * 100, 10**6)[: tokens // 4] for _, tokens, _ in requests]
    small, large = (
        drive(Engine(policy=policy, tables=tables, capacity=capacity), requests, hashes) for capacity in (1, 4096)
    )
    assert small == large


def test_prefill_that_does_not_fit_into_memory_fails_and_spares_the_others(tables: StepTables) -> None:
    """8 tokens run; with 8 and 8 more there are 25, a prefill of 2 + 4 + 1; the batch goes on alone."""
    engine = Engine(policy=POLICIES[0], tables=tables, out_of_memory_tokens=24)
    first = submit(engine)
    step(engine)
    others = [submit(engine), submit(engine)]
    assert engine.start_step(0.0) == 7.0
    assert engine.finish_step().failed_slots.tolist() == others
    assert step(engine) == ([first], [], [])


def test_decode_that_does_not_fit_into_memory_fails_all_running(tables: StepTables) -> None:
    """8 + 8 tokens and one each are 18; after the next decode there would be 20."""
    engine = Engine(policy=POLICIES[0], tables=tables, out_of_memory_tokens=18)
    slots = [submit(engine), submit(engine)]
    assert step(engine) == (slots, [], [])
    assert step(engine) == (slots, [], [])
    assert engine.start_step(0.0) == 2.0
    assert engine.finish_step().failed_slots.tolist() == slots
    assert (engine.running_count, engine.used_memory_share) == (0, 0)


def test_padding_takes_memory_too(tables: StepTables) -> None:
    """2 x 16 tokens of which 20 are real."""
    engine = Engine(policy=POLICIES[1], tables=tables, out_of_memory_tokens=31)
    slots = [submit(engine, 16), submit(engine, 4)]
    assert step(engine) == ([], [], slots)


@pytest.mark.parametrize("policy", POLICIES)
def test_engine_recovers_from_out_of_memory(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables, out_of_memory_tokens=40)
    failed = [submit(engine, 30), submit(engine, 30)]
    assert step(engine) == ([], [], failed)
    slot = submit(engine)
    assert step(engine) == ([slot], [], [])


@pytest.mark.parametrize("policy", POLICIES)
def test_wrong_lengths_are_listed_together(policy: Policy, tables: StepTables) -> None:
    engine = Engine(policy=policy, tables=tables)
    with pytest.raises(InvalidInputError) as caught:
        engine.submit(arrival_seconds=0.0, input_tokens=0, output_tokens=-1, max_output_tokens=-2)
    assert [violation.field for violation in caught.value.violations] == [
        "input_tokens",
        "output_tokens",
        "max_output_tokens",
    ]


@pytest.mark.parametrize(
    ("policy", "input_tokens", "output_tokens", "message"),
    [
        (POLICIES[0], 300, 101, "input and output may have 401 tokens, which weigh 401; max_batch_weight is 400"),
        (POLICIES[1], 100, 101, "201 tokens, which weigh 40401; max_batch_weight is 40000"),
        (POLICIES[2], 300, 101, "input and output may have 401 tokens, max_batch_total_tokens is 400"),
        (
            TgiPolicy(max_batch_total_tokens=9000, max_batch_prefill_tokens=50),
            51,
            1,
            "input_tokens: must be at most max_batch_prefill_tokens 50, is 51",
        ),
        (POLICIES[3], 300, 98, "need 100 blocks of 4 tokens, the server has 99 for a request"),
        (
            Vllm0Policy(block_count=100, max_num_batched_tokens=50),
            40,
            12,
            "have 52 tokens, which max_num_batched_tokens 50 cannot recompute in one piece",
        ),
        (POLICIES[4], 300, 102, "need 101 blocks of 4 tokens, the server has 100 for a request"),
    ],
)
def test_request_that_can_never_run_is_refused_with_both_numbers(
    policy: Policy, input_tokens: int, output_tokens: int, message: str, tables: StepTables
) -> None:
    engine = Engine(policy=policy, tables=tables)
    with pytest.raises(InvalidInputError, match=message):
        submit(engine, input_tokens, output_tokens)
    assert engine.waiting_count == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_longest_request_that_is_accepted_runs_to_its_end(drive: Drive, policy: Policy, tables: StepTables) -> None:
    for input_tokens in (1, 100):
        accepted = 0
        for output_tokens in range(1, 500):
            engine = Engine(policy=policy, tables=tables)
            try:
                submit(engine, input_tokens, output_tokens)
            except InvalidInputError:
                break
            accepted = output_tokens
        tokens = drive(Engine(policy=policy, tables=tables), [(0, input_tokens, accepted)] * 3)
        assert [len(times) for times in tokens] == [accepted] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_every_wrong_number_of_a_policy_is_named(policy: Policy, tables: StepTables) -> None:
    names = [name for name in policy.__dataclass_fields__ if isinstance(getattr(policy, name), int | float)]
    names = [name for name in names if not isinstance(getattr(policy, name), bool)]
    wrong = replace(policy, **dict.fromkeys(names, -1))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError) as caught:
        Engine(policy=wrong, tables=tables, out_of_memory_tokens=0)
    assert [violation.field for violation in caught.value.violations] == [
        *(f"policy.{name}" for name in names),
        "out_of_memory_tokens",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_constants_that_are_no_numbers_are_refused(tables: StepTables, value: float) -> None:
    wrong = tables._replace(constants=(value, *tables.constants[1:]))
    with pytest.raises(InvalidInputError, match=r"tables\.constants"):
        Engine(policy=POLICIES[0], tables=wrong)


def test_ratio_that_is_no_number_is_refused(tables: StepTables) -> None:
    policy = TgiPolicy(max_batch_total_tokens=1, waiting_served_ratio=math.nan)
    with pytest.raises(InvalidInputError, match=r"policy\.waiting_served_ratio: must be a finite number >= 0, is nan"):
        Engine(policy=policy, tables=tables)


def test_fraction_of_a_block_is_refused(tables: StepTables) -> None:
    policy = Vllm1Policy(block_count=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"policy\.block_count: must be a whole number, is 2\.5"):
        Engine(policy=policy, tables=tables)


def test_step_takes_time_even_if_the_constants_say_none() -> None:
    nothing = StepConstants(
        decode_seconds=0,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=0,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    )
    engine = Engine(policy=POLICIES[0], tables=nothing.tables())
    submit(engine)
    end = engine.start_step(0.0)
    assert end is not None
    assert end > 0
