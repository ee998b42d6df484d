import math
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.fitting import sketch as module
from llmpilot_workload_generator.fitting.counting import Numbers, small_or_float
from llmpilot_workload_generator.fitting.sketch import EXACT_VALUES, SketchBuilder, merge_sketches, round_down
from llmpilot_workload_generator.model import Sketch

FINITE = st.floats(allow_nan=False, allow_infinity=False)
COLUMNS = st.one_of(
    st.lists(st.integers(0, 200), min_size=1, max_size=30).map(lambda values: np.array(values, np.int16)),
    st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=30).map(lambda values: np.array(values, np.int64)),
    st.lists(st.floats(-3, 3) | st.sampled_from([0.0, -0.0, 0.7]), min_size=1, max_size=30).map(np.array),
    st.lists(FINITE, min_size=1, max_size=30).map(np.array),
    st.lists(st.integers(0, 50), min_size=1, max_size=30).map(lambda values: 10**6 + 500 * np.array(values)),
    st.lists(st.floats(0.5, 0.53), min_size=1, max_size=30).map(np.array),
)
"""Of the last two, many different values are one on the grid."""


def sketch_of_columns(columns: Iterable[Numbers]) -> Sketch:
    builder = SketchBuilder()
    for column in columns:
        builder.add(small_or_float(column))
    return builder.sketch()


def fields(sketch: Sketch) -> tuple[list[float], list[int], bool, float, float]:
    return sketch.values.tolist(), sketch.counts.tolist(), sketch.exact, sketch.low, sketch.high


def on_grid(value: float) -> float:
    """The grid as it is described: 512 steps between powers of two."""
    step = 2.0 ** (math.frexp(value)[1] - 10)
    return math.floor(value / step) * step


@given(st.floats(-1e300, 1e300).filter(lambda value: abs(value) > 1e-290))
def test_the_grid_has_512_steps_between_powers_of_two(value: float) -> None:
    assert round_down(np.array([value]))[0] == on_grid(value)


@given(st.lists(FINITE, min_size=2).map(sorted))
def test_rounding_keeps_the_order_and_does_nothing_twice(values: list[float]) -> None:
    rounded = round_down(np.array(values))
    assert (rounded[1:] >= rounded[:-1]).all()
    assert (rounded <= values).all() or min(values) == -np.finfo(np.float64).max
    assert np.array_equal(round_down(rounded), rounded)
    assert np.isfinite(rounded).all()


def test_whole_numbers_up_to_512_and_round_ones_are_on_the_grid() -> None:
    values = np.array([*range(-512, 513), 1500, 2000, 3000, 4096, 128_000, 131_072, 0.5, 0.25], np.float64)
    assert np.array_equal(round_down(values), values)


@given(st.lists(COLUMNS, min_size=1, max_size=5))
def test_few_values_are_counted_exactly(columns: list[Numbers]) -> None:
    expected = Counter(float(value) + 0.0 for column in columns for value in column)
    values = sorted(expected)
    sketch = sketch_of_columns(columns)
    assert fields(sketch) == (values, [expected[value] for value in values], True, values[0], values[-1])
    assert sketch.total == sum(map(len, columns))


@given(st.lists(COLUMNS, min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_merged_sketches_of_parts_are_the_sketch_of_the_whole(
    columns: list[Numbers], exact_values: int, data: st.DataObject
) -> None:
    """In every field, whatever the cut and the grouping, and whether the parts or only the whole are too many."""
    cut = data.draw(st.integers(1, len(columns)))
    with patch.object(module, "EXACT_VALUES", exact_values):
        whole = sketch_of_columns(columns)
        assert whole.exact == (len({float(value) for column in columns for value in column}) <= exact_values)
        single = [sketch_of_columns([column]) for column in columns]
        first, *rest = (sketch_of_columns(part) for part in (columns[:cut], columns[cut:]) if part)
        assert fields(merge_sketches([first, *rest])) == fields(whole)
        assert fields(merge_sketches([first, *single[cut:]])) == fields(whole)
        assert fields(merge_sketches([*single[cut:], *single[:cut]])) == fields(whole)
        assert fields(merge_sketches([merge_sketches(single[:cut]), *single[cut:]])) == fields(whole)


@given(st.lists(COLUMNS, min_size=1, max_size=4), st.integers(1, 10))
def test_many_values_are_counted_on_the_grid_all_of_them(columns: list[Numbers], exact_values: int) -> None:
    """Against a count of rounded values; the extremes stay the true ones."""
    seen = [float(value) + 0.0 for column in columns for value in column]
    with patch.object(module, "EXACT_VALUES", exact_values):
        sketch = sketch_of_columns(columns)
    if len(set(seen)) > exact_values:
        expected = Counter(round_down(np.array(seen)).tolist())
        assert fields(sketch) == (
            sorted(expected),
            [expected[value] for value in sorted(expected)],
            False,
            min(seen),
            max(seen),
        )


@pytest.mark.parametrize("dtype", ["i4", "f8"])
def test_the_limit_is_as_documented(dtype: str) -> None:
    """One value more, and 10 x 1.5 that were 10.5 apart share a value of the grid."""
    assert EXACT_VALUES == 16_384
    values = np.arange(EXACT_VALUES + 1, dtype=dtype)
    assert sketch_of_columns([values[:-1]]).exact
    sketch = sketch_of_columns([values])
    assert not sketch.exact
    assert (sketch.low, sketch.high, sketch.total) == (0, EXACT_VALUES, EXACT_VALUES + 1)
    # exact up to 1023, then 512 steps for each of 1024.., 2048.., 4096.., 8192.. and one for 16384
    assert len(sketch.values) == 1024 + 4 * 512 + 1


def test_only_the_union_being_too_large_puts_all_on_the_grid() -> None:
    """Halves of 10,000 values each are exact, the whole is not."""
    values = np.arange(20_000)
    halves = [sketch_of_columns([part]) for part in (values[:10_000], values[10_000:])]
    assert all(half.exact for half in halves)
    assert fields(merge_sketches(halves)) == fields(sketch_of_columns([values]))
    assert not merge_sketches(halves).exact


def test_parts_that_are_on_the_grid_never_become_exact_again() -> None:
    """Though together they have fewer values there than are counted exactly."""
    halves = [sketch_of_columns([np.arange(start, start + 10**6)]) for start in (0, 10**6)]
    merged = merge_sketches(halves)
    assert not any(one.exact for one in (*halves, merged))
    assert len(merged.values) < EXACT_VALUES


def test_values_that_are_small_in_one_batch_and_not_in_another_are_the_same_values() -> None:
    sketch = sketch_of_columns([np.array([7, 300_000]), np.array([7, 8]), np.array([7.0, 0.5])])
    assert fields(sketch) == ([0.5, 7, 8, 300_000], [1, 3, 1, 1], True, 0.5, 300_000)


def test_different_floats_without_end_take_bounded_memory() -> None:
    """10^6 numbers that never repeat would take 32 MB; the grid between 0.5 and 1 has 512 values, a batch 0.2 MB."""
    generator = np.random.default_rng(0)
    builder = SketchBuilder()
    tracemalloc.start()
    for _ in range(50):
        builder.add(0.5 + generator.random(20_000) / 2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sketch = builder.sketch()
    assert len(sketch.values) == 512
    assert sketch.total == 10**6
    assert peak_bytes < 8e6
