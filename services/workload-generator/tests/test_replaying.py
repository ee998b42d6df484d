from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_workload_generator.model import (
    ArrivalKind,
    Arrivals,
    Bins,
    Kind,
    Parameter,
    Provenance,
    Replay,
    Sketch,
    WorkloadModel,
)
from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler, ValueChoice

INPUTS = np.array([16, 40, 33, 5])
REPLAY = Replay(
    columns={
        "input_tokens": INPUTS,
        "output_tokens": np.array([10, 20, 30, 40]),
        "model": np.array(["b", "a", "a", "c"]),
    },
    arrival_nanos=np.array([0, 100, 150, 900]),
    prefix_ids=np.array([1, 1, 2, 3, 1, 2, 9, 4]),
    prefix_starts=np.array([0, 1, 4, 7, 8]),
    prefix_block_tokens=16,
)


def one_bin(name: str, kind: Kind, low: float, high: float, categories: tuple[str, ...] = ()) -> Parameter:
    bins = Bins(name=name, kind=kind, edges=np.array([low]), categories=categories)
    sketch = Sketch(values=np.array([low, high]), counts=np.array([2, 2]), exact=True, low=low, high=high)
    return Parameter(bins=bins, sketch=sketch, lows=np.array([low]), highs=np.array([high]))


def model(replay: Replay | None = REPLAY, arrivals: Arrivals = Arrivals()) -> WorkloadModel:  # noqa: B008 frozen
    return WorkloadModel(
        parameters=(
            one_bin("input_tokens", Kind.INTEGER, 5, 40),
            one_bin("output_tokens", Kind.INTEGER, 10, 40),
            one_bin("model", Kind.CATEGORY, 0, 2, ("a", "b", "c")),
        ),
        keys=np.array([0], np.uint64),
        counts=np.array([4]),
        provenance=Provenance(source="by hand"),
        replay=replay,
        arrivals=arrivals,
    )


def test_a_replay_gives_all_rows_in_their_order() -> None:
    sampler = Sampler(model(), SampleOptions(replay=True))
    sample = sampler.draw(0, 10)
    assert sampler.request_count == len(sample) == 4
    for name, column in REPLAY.columns.items():
        assert np.array_equal(sample.columns[name], column)
    assert sample.arrival_nanos is not None
    assert sample.arrival_nanos.tolist() == [0, 100, 150, 900]
    assert sample.prefix_ids is not None
    assert sample.prefix_starts is not None
    assert sample.prefix_ids.tolist() == REPLAY.prefix_ids.tolist()
    assert sample.prefix_starts.tolist() == REPLAY.prefix_starts.tolist()
    assert sample.prefix_block_tokens == 16


@given(st.integers(0, 6), st.integers(0, 6))
def test_a_replay_may_begin_anywhere(start: int, count: int) -> None:
    sample = Sampler(model(), SampleOptions(replay=True)).draw(start, count)
    assert sample.columns["input_tokens"].tolist() == INPUTS[start : start + count].tolist()
    assert sample.arrival_nanos is not None
    assert sample.arrival_nanos.tolist() == REPLAY.arrival_nanos[start : start + count].tolist()
    assert sample.prefix_ids is not None
    assert sample.prefix_starts is not None
    starts = REPLAY.prefix_starts
    ids = [REPLAY.prefix_ids[starts[row] : starts[row + 1]].tolist() for row in range(4)][start : start + count]
    bounds = sample.prefix_starts.tolist()
    assert [sample.prefix_ids[low:high].tolist() for low, high in pairwise(bounds)] == ids


def test_conditions_leave_rows_out_and_the_first_that_is_left_arrives_at_zero() -> None:
    options = SampleOptions(replay=True, conditions=("model != b", "input_tokens > 5"))
    sample = Sampler(model(), options).draw(0, 4)
    assert sample.columns["input_tokens"].tolist() == [40, 33]
    assert sample.arrival_nanos is not None
    assert sample.arrival_nanos.tolist() == [0, 50]
    assert sample.prefix_ids is not None
    assert sample.prefix_ids.tolist() == [1, 2, 3, 1, 2, 9]


def test_speed_and_other_arrivals_apply() -> None:
    twice = SampleOptions(replay=True, arrivals=Arrivals(kind=ArrivalKind.TRACE, speed=2))
    times = Sampler(model(), twice).draw(0, 4).arrival_nanos
    assert times is not None
    assert times.tolist() == [0, 50, 75, 450]
    slow = model(arrivals=Arrivals(kind=ArrivalKind.TRACE, speed=0.5))
    times = Sampler(slow, SampleOptions(replay=True)).draw(3, 1).arrival_nanos
    assert times is not None
    assert times.tolist() == [1800]
    closed = SampleOptions(replay=True, arrivals=Arrivals())
    assert Sampler(model(), closed).draw(0, 4).arrival_nanos is None


def test_drawn_requests_may_arrive_as_those_of_the_trace_did() -> None:
    """By hand: the mean gap is 300, so the second round begins at 1,200."""
    options = SampleOptions(arrivals=Arrivals(kind=ArrivalKind.TRACE))
    times = Sampler(model(), options).draw(3, 3).arrival_nanos
    assert times is not None
    assert times.tolist() == [900, 1200, 1300]


def test_scaled_prompts_have_no_prefix_ids() -> None:
    options = SampleOptions(replay=True, scales={"input_tokens": 2.0, "output_tokens": 0.5})
    sample = Sampler(model(), options).draw(0, 4)
    assert sample.columns["input_tokens"].tolist() == [32, 80, 66, 10]
    assert sample.columns["output_tokens"].tolist() == [5, 10, 15, 20]
    assert (sample.prefix_ids, sample.prefix_starts, sample.prefix_block_tokens) == (None, None, 0)


def test_prompts_cut_to_a_context_keep_the_ids_of_what_is_left() -> None:
    """By hand, in a context of 42: inputs become 16, 22, 12, 2, which are blocks of 16: 1, 2, 1, 1."""
    sample = Sampler(model(), SampleOptions(replay=True, context_length=42)).draw(0, 4)
    assert sample.columns["input_tokens"].tolist() == [16, 22, 12, 2]
    assert sample.prefix_ids is not None
    assert sample.prefix_ids.tolist() == [1, 1, 2, 1, 4]


def test_a_trace_without_ids_has_none() -> None:
    bare = Replay(
        columns=REPLAY.columns,
        arrival_nanos=REPLAY.arrival_nanos,
        prefix_ids=np.zeros(0, np.int64),
        prefix_starts=np.zeros(0, np.int64),
    )
    sample = Sampler(model(bare), SampleOptions(replay=True)).draw(1, 2)
    assert (sample.prefix_ids, sample.prefix_starts, sample.prefix_block_tokens) == (None, None, 0)


def test_what_does_not_go_with_a_replay_is_said_at_once() -> None:
    options = SampleOptions(
        replay=True, independent=True, value_choice=ValueChoice.UNIFORM, scales={"x": 1.0}, conditions=("x = 1",)
    )
    with pytest.raises(InvalidInputError) as caught:
        Sampler(model(replay=None), options)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["replay", "independent", "value_choice", "scales", "conditions"]


def test_conditions_that_no_row_satisfies_say_so() -> None:
    with pytest.raises(InvalidInputError, match="no requests of the trace satisfy"):
        Sampler(model(), SampleOptions(replay=True, conditions=("input_tokens < 20", "model = a")))


def test_a_replay_has_no_records() -> None:
    with pytest.raises(PreconditionError, match="draw its columns"):
        Sampler(model(), SampleOptions(replay=True)).draw_records(0, 1)
