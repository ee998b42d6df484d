from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.steps.step_time import ProfileSizes, StepConstants, StepLoad, StepTables, step_seconds

CONSTANTS = StepConstants(
    decode_seconds=0.020,
    decode_seconds_per_sequence=0.001,
    decode_seconds_per_cached_token=0.000_002,
    prefill_seconds=0.030,
    prefill_seconds_per_token=0.000_1,
    prefill_seconds_per_request=0.004,
    prefill_seconds_per_token_pair=0.000_000_5,
)
NOTHING = StepLoad(0, 0, 0.0, 0, 0)
DECODE = StepLoad(0, 0, 0.0, 8, 1000)
PREFILL = StepLoad(2, 300, 25_000.0, 0, 0)
MIXED = StepLoad(2, 300, 25_000.0, 8, 1000)

DENSE_TOKENS, DENSE_SECONDS = [1.0, 5.0, 9.0], [10.0, 30.0, 70.0]
HEAD_SEQUENCES, HEAD_SECONDS = [1.0, 3.0], [1.0, 2.0]
CHUNKS, PREFILL_CACHED, SEQUENCES, DECODE_CACHED = [0.0, 4.0, 8.0], [0.0, 10.0], [0.0, 2.0], [16.0, 32.0]


def attention_at(chunk: float, earlier: float, sequences: float, context: float) -> float:
    """Linear in each of the four, so that interpolation between nodes has to give it everywhere."""
    return chunk * (3 + 0.5 * earlier) + sequences * (1 + 0.25 * context) + 0.125 * chunk * sequences * context


def tiny_profile() -> StepTables:
    axes = (CHUNKS, PREFILL_CACHED, SEQUENCES, DECODE_CACHED)
    attention = [
        attention_at(chunk, earlier, sequences, context)
        for chunk in CHUNKS
        for earlier in PREFILL_CACHED
        for sequences in SEQUENCES
        for context in DECODE_CACHED
    ]
    parts = (DENSE_TOKENS, DENSE_SECONDS, HEAD_SEQUENCES, HEAD_SECONDS, *axes, attention)
    return StepTables((0.0,) * 8, ProfileSizes(3, 2, 3, 2, 2, 2), np.concatenate(parts))


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        (NOTHING, 0.0),
        (DECODE, 0.020 + 8 * 0.001 + 1000 * 0.000_002),
        (PREFILL, 0.030 + 300 * 0.000_1 + 2 * 0.004 + 25_000 * 0.000_000_5),
        (MIXED, 0.030 + 0.008 + 0.002 + 0.030 + 0.008 + 0.0125),
    ],
)
def test_constants_add_up_as_by_hand(load: StepLoad, seconds: float) -> None:
    assert step_seconds(CONSTANTS.tables(), load) == pytest.approx(seconds)


def test_every_constant_that_is_no_time_is_listed() -> None:
    wrong = StepConstants(
        decode_seconds=-1,
        decode_seconds_per_sequence=float("nan"),
        decode_seconds_per_cached_token=float("inf"),
        prefill_seconds=-0.1,
        prefill_seconds_per_token=-2,
        prefill_seconds_per_request=float("-inf"),
        prefill_seconds_per_token_pair=-1e-9,
        decode_seconds_per_moved_token=-1e-9,
    )
    with pytest.raises(InvalidInputError) as caught:
        wrong.tables()
    assert [violation.field for violation in caught.value.violations] == [
        f"constants.{field.name}" for field in fields(StepConstants)
    ]
    assert caught.value.violations[0].description == "must be a finite number of seconds >= 0, is -1.0"


def test_constants_alone_have_no_profile() -> None:
    tables = CONSTANTS.tables()
    assert tables.sizes == ProfileSizes()
    assert not len(tables.profile)


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        # one prompt of 4 tokens, 10 before it: 4 x 10 + (1 + 2 + 3 + 4) scores
        (StepLoad(1, 4, 50.0, 0, 0), 25.0 + 1.0 + attention_at(4, 10, 0, 0)),
        # two decodes with 16 tokens each
        (StepLoad(0, 0, 0.0, 2, 32), 15.0 + 1.5 + attention_at(0, 0, 2, 16)),
        # both
        (StepLoad(1, 4, 50.0, 2, 32), 40.0 + 2.0 + attention_at(4, 10, 2, 16)),
        # between all nodes: 6 tokens after 5, one decode with 24
        (StepLoad(1, 6, 6 * 5 + 21.0, 1, 24), 50.0 + 1.5 + attention_at(6, 5, 1, 24)),
        # beyond the last node of every axis, on the same lines
        (StepLoad(1, 12, 12 * 20 + 78.0, 4, 256), 140.0 + 3.0 + attention_at(12, 20, 4, 64)),
        (NOTHING, 0.0),
    ],
)
def test_a_profile_is_interpolated_as_by_hand(load: StepLoad, seconds: float) -> None:
    assert step_seconds(tiny_profile(), load) == pytest.approx(seconds)


def test_several_prompts_cost_the_attention_of_one_with_as_many_scores() -> None:
    """Three prompts of 2 tokens have 3 scores each, 9 in all: fewer than one of 4 tokens, not as many as one of 6."""
    chunk = (np.sqrt(1 + 8 * 9) - 1) / 2
    seconds = step_seconds(tiny_profile(), StepLoad(3, 6, 9.0, 0, 0))
    assert seconds == pytest.approx(40.0 + 2.0 + attention_at(chunk, 0, 0, 0))


def test_constants_and_profile_add_up() -> None:
    both = tiny_profile()._replace(constants=CONSTANTS.tables().constants)
    load = StepLoad(1, 4, 50.0, 2, 32)
    assert step_seconds(both, load) == pytest.approx(
        step_seconds(CONSTANTS.tables(), load) + step_seconds(tiny_profile(), load)
    )


@given(
    load=st.builds(
        StepLoad,
        prefill_requests=st.integers(0, 9),
        prefill_tokens=st.integers(0, 5000),
        prefill_pairs=st.floats(0, 1e7),
        decode_sequences=st.integers(0, 300),
        decode_cached_tokens=st.integers(0, 10**6),
        moved_tokens=st.integers(0, 10**6),
    ),
    field=st.sampled_from(StepLoad._fields),
    factor=st.integers(1, 4),
)
@settings(deadline=None)  # the first call compiles
def test_more_work_never_takes_less_time_by_constants(load: StepLoad, field: str, factor: int) -> None:
    more = load._replace(**{field: getattr(load, field) * factor})
    assert step_seconds(CONSTANTS.tables(), more) >= step_seconds(CONSTANTS.tables(), load)


@given(
    prompt=st.integers(0, 20),
    earlier=st.integers(0, 40),
    sequences=st.integers(0, 6),
    context=st.integers(16, 100),
    added=st.tuples(*[st.integers(0, 5)] * 4),
)
@settings(deadline=None)
def test_more_work_never_takes_less_time_by_a_rising_profile(
    prompt: int, earlier: int, sequences: int, context: int, added: tuple[int, int, int, int]
) -> None:
    def seconds(chunk: int, before: int, decodes: int, each: int) -> float:
        pairs = chunk * before + chunk * (chunk + 1) / 2
        return step_seconds(tiny_profile(), StepLoad(int(chunk > 0), chunk, pairs, decodes, decodes * each))

    less = (prompt, earlier, sequences, context)
    more = [one + other for one, other in zip(less, added, strict=True)]
    assert seconds(*more) >= seconds(*less) - 1e-9
