from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.fitting.counting import (
    BLOCK_ROWS,
    SMALL_VALUES,
    CellCounts,
    CountTable,
    SmallCounts,
    small_or_float,
    sum_equal,
)
from llmpilot_workload_generator.model import Bins, Kind, encode_keys

INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
KEYS = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 3) | st.integers(0, 40).map(lambda shift: 1 << shift))


def bins(name: str, *edges: float) -> Bins:
    return Bins(name=name, kind=Kind.NUMBER, edges=np.array(edges))


@given(st.lists(KEYS, max_size=4))
def test_table_counts_as_a_counter_does_whatever_the_batches(batches: list[list[int]]) -> None:
    table = CountTable()
    for batch in batches:
        table.add(np.array(batch, np.uint64))
    expected = sorted(Counter(key for batch in batches for key in batch).items())
    keys, counts = table.items()
    assert list(zip(keys.tolist(), counts.tolist(), strict=True)) == expected
    assert len(table) == len(expected)


def test_table_grows_in_the_midst_of_a_batch_and_loses_nothing() -> None:
    """Far more keys than it starts with, each as often as its number modulo 3 says."""
    numbers = np.arange(1, 50_001, dtype=np.uint64)
    repeated = np.repeat(numbers, (numbers % np.uint64(3) + np.uint64(1)).astype(np.int64))
    table = CountTable()
    table.add(repeated)
    keys, counts = table.items()
    assert np.array_equal(keys, numbers)
    assert np.array_equal(counts, numbers.astype(np.int64) % 3 + 1)


def test_table_of_counts_goes_on_counting() -> None:
    table = CountTable.of(np.arange(5000, dtype=np.uint64), np.full(5000, 7))
    table.add(np.array([4999, 5000], np.uint64))
    keys, counts = table.items()
    assert len(table) == len(keys) == 5001
    assert counts.tolist() == [7] * 4999 + [8, 1]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_small_numbers_of_every_width_are_counted(dtype: str) -> None:
    """One number more than the lanes take at once, and a second batch with a larger number."""
    counts = SmallCounts()
    for batch in ([0, 3, 3, 3, 100], [127, 0]):
        counts.add(small_or_float(np.array(batch, dtype)))
    values, numbers = counts.items()
    assert dict(zip(values.tolist(), numbers.tolist(), strict=True)) == {0: 2, 3: 3, 100: 1, 127: 1}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_small_numbers_are_not_copied(dtype: str) -> None:
    column = np.array([1, 2, 127], dtype)
    assert np.shares_memory(small_or_float(column), column)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (np.array([1, -1], np.int8), [1.0, -1.0]),
        (np.array([-(2**15)], np.int16), [-32768.0]),
        (np.array([SMALL_VALUES, 0], np.int32), [float(SMALL_VALUES), 0.0]),
        (np.array([-1], np.int64), [-1.0]),
        (np.array([2**63], np.uint64), [2.0**63]),
        (np.array([1.5, -0.0]), [1.5, 0.0]),
    ],
)
def test_other_numbers_become_floats(column: np.ndarray, expected: list[float]) -> None:
    floats = small_or_float(column)
    assert floats.dtype == np.float64
    assert floats.tolist() == expected
    assert not np.signbit(floats[floats == 0]).any()


def test_truth_values_are_small_numbers() -> None:
    assert small_or_float(np.array([True, False])).tolist() == [1, 0]


@given(
    st.lists(st.tuples(st.integers(-5, 300), st.floats(-9, 9), st.sampled_from([0.0, 0.7, 1.0])), max_size=60),
    st.integers(1, 60),
)
def test_cells_are_those_of_the_bins_of_every_row(rows: list[tuple[int, float, float]], batch_rows: int) -> None:
    """Against the bins and keys as the model defines them, row by row."""
    all_bins = bins("a", 0, 1, 5, 100), bins("b", -3, 0, 0.5), bins("c", 0.7)
    cells = CellCounts(all_bins)
    for start in range(0, len(rows), batch_rows):
        whole, *floats = (np.array(column) for column in zip(*rows[start : start + batch_rows], strict=True))
        cells.add([small_or_float(column) for column in (whole.astype(np.int16), *floats)])
    codes = [[int(one.find(np.array([value]))[0]) for one, value in zip(all_bins, row, strict=True)] for row in rows]
    expected = Counter(int(encode_keys(np.array([code]).T, [4, 3, 1])[0]) for code in codes)
    keys, counts = cells.items()
    assert list(zip(keys.tolist(), counts.tolist(), strict=True)) == sorted(expected.items())


def test_batches_longer_than_a_block_are_counted_whole() -> None:
    cells = CellCounts([bins("a", 0, 1)])
    cells.add([np.ones(BLOCK_ROWS + 1, np.uint8)])
    assert [part.tolist() for part in cells.items()] == [[1], [BLOCK_ROWS + 1]]


def test_ranges_of_bins_come_from_small_numbers_and_others() -> None:
    cells = CellCounts([bins("a", 0, 10, 20, 30)])
    cells.add([np.array([-3.5, 12.5])])
    lows, highs = cells.ranges(0, np.array([4.0, 11.0, 35.0]))
    assert lows.tolist() == [-3.5, 11, 20, 35]
    assert highs.tolist() == [4, 12.5, 20, 35]


def test_equal_values_are_summed() -> None:
    values, counts = sum_equal(np.array([3.0, 1.0, 3.0]), np.array([2, 5, 1]))
    assert (values.tolist(), counts.tolist()) == ([1, 3], [5, 3])
    assert len(sum_equal(np.zeros(0), np.zeros(0, np.int64))[0]) == 0
