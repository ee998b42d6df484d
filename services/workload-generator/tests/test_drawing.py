import numpy as np
import pytest

from llmpilot_workload_generator.model import Floats, Integers, Keys
from llmpilot_workload_generator.sampling import drawing
from llmpilot_workload_generator.sampling.alias import AliasTable, build_alias
from llmpilot_workload_generator.sampling.random_stream import random_numbers, stream_key

START = np.uint64(10**12)
KEY = np.uint64(stream_key(3, 0))
COUNTS = np.array([5, 0, 1, 1000, 30, 7, 7])
SIZES = [0, 1, 1000, drawing.BLOCK, 3 * drawing.BLOCK + 5]


def drawn(table: AliasTable, numbers: Keys) -> Integers:
    """What an alias table draws with these numbers, one after the other."""
    found = []
    for number in numbers.tolist():
        slot = number >> 1 >> int(table.shift)
        threshold, alias = divmod(int(table.slots[slot]), 2**32)
        found.append(slot if number % 2**32 < threshold else alias)
    return np.array(found, np.int64)


@pytest.mark.parametrize("count", SIZES)
def test_compiled_numbers_are_those_of_the_stream(count: int) -> None:
    numbers = np.empty(count, np.uint64)
    drawing.draw_numbers(KEY, START, numbers)
    assert np.array_equal(numbers, random_numbers(int(KEY), int(START), count))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("words", [1, 2])
def test_records_are_those_of_the_cells_drawn(count: int, words: int) -> None:
    table = build_alias(COUNTS)
    cells = random_numbers(0, 0, words * len(COUNTS)).reshape(words, -1)
    records = np.empty((words, count), np.uint64)
    drawing.draw_records(table.slots, table.shift, cells, KEY, START, records, count)
    assert np.array_equal(records, cells[:, drawn(table, random_numbers(int(KEY), int(START), count))])


@pytest.mark.parametrize("count", SIZES)
def test_rows_are_decoded_records(count: int) -> None:
    """Nine parameters, so that records have two words."""
    table = build_alias(COUNTS)
    cells = random_numbers(0, 0, 2 * len(COUNTS)).reshape(2, -1)
    points = random_numbers(1, 0, 9 * 256).view(np.int64).reshape(9, 256)
    rows = np.empty((9, count), np.int64)
    drawing.draw_rows(table.slots, table.shift, cells, KEY, START, points, rows)
    cell = drawn(table, random_numbers(int(KEY), int(START), count))
    for parameter in range(9):
        codes = cells[parameter // 8] >> np.uint64(8 * (parameter % 8)) & np.uint64(255)
        assert np.array_equal(rows[parameter], points[parameter][codes[cell]])


def test_records_unpack_into_codes() -> None:
    records = np.array([[0x0807060504030201, 0x18], [0x0A09, 0]], np.uint64)
    codes = drawing.unpack(records)
    assert codes[:10, 0].tolist() == list(range(1, 11))
    assert codes[:, 1].tolist() == [0x18] + [0] * 15


def test_marginals_are_drawn_each_into_its_place() -> None:
    table = build_alias(COUNTS)
    records = np.zeros((2, 50), np.uint64)
    for parameter in (1, 8):
        key = np.uint64(stream_key(0, parameter))
        drawing.draw_marginal(table.slots, table.shift, np.uint64(parameter), key, START, records)
    codes = drawing.unpack(records)
    for parameter in range(16):
        numbers = random_numbers(stream_key(0, parameter), int(START), 50)
        expected = drawn(table, numbers) if parameter in {1, 8} else np.zeros(50)
        assert np.array_equal(codes[parameter], expected)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("count", SIZES)
def test_values_inside_bins_are_drawn_from_their_ranges(count: int, is_whole: bool) -> None:
    """Two bins: one of three ranges, one of a single range."""
    first, second = build_alias(np.array([1, 2, 3])), build_alias(np.array([1]))
    lows, highs = np.array([0.0, 10.0, 20.0, 0.0, 100.0]), np.array([0.0, 19.0, 22.0, 0.0, 199.0])
    codes = np.arange(count) % 2
    row: Floats = np.empty(count)
    choice_key, inside_key = np.uint64(stream_key(0, 1)), np.uint64(stream_key(0, 2))
    drawing.draw_inside(
        codes[None].astype(np.uint64) << np.uint64(16),
        np.uint64(2),
        np.concatenate((first.slots, second.slots)),
        np.array([0, 4], np.uint64),
        np.array([first.shift, second.shift], np.uint64),
        lows,
        highs,
        is_whole,
        choice_key,
        inside_key,
        START,
        row,
    )
    slots = np.where(codes == 1, 4, drawn(first, random_numbers(int(choice_key), int(START), count)))
    units = (random_numbers(int(inside_key), int(START), count) >> np.uint64(11)) / 2**53
    widths = (highs - lows)[slots]
    expected = lows[slots] + (np.floor(units * (widths + 1)) if is_whole else units * widths)
    assert np.array_equal(row, expected)
