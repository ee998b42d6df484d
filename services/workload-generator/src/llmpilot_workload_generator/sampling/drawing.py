"""The compiled inner loops of drawing requests.

A record is what bins a request is in: byte j of word w (the lowest byte is 0) is the bin of parameter 8 * w + j. So
records of up to eight parameters have one word.
Invariant: what is drawn for request i depends on the stream's key and on i alone.
Random numbers are those of `random_stream.py`, tables those of `alias.py`. All is in one file: what is kept
compiled follows the changes of its own file only.
"""

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.compiled import compiled
from llmpilot_workload_generator.model import Floats, Integers, Keys

CODES_PER_WORD = 8
MOST_CODES = 256

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_THREE = np.uint64(3)
_SEVEN = np.uint64(7)
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(2**32 - 1)
_CODE = np.uint64(255)
_UNIT_SHIFT = np.uint64(11)
_UNIT = 2.0**-53
BLOCK = 1024
"""Requests drawn at once: so few that their records stay in the nearest cache."""


def unpack(records: Keys) -> npt.NDArray[np.uint8]:
    """Return the codes (rows) in records, eight per word: a view of records of one word."""
    words, requests = records.shape
    codes = records.astype("<u8", copy=False).view(np.uint8).reshape(words, requests, CODES_PER_WORD)
    return codes.transpose(0, 2, 1).reshape(words * CODES_PER_WORD, requests)


@compiled
def _mixed(number: np.uint64) -> np.uint64:
    """Return `random_stream.mix` of a number."""
    number = (number ^ (number >> np.uint64(30))) * _FIRST_FACTOR
    number = (number ^ (number >> np.uint64(27))) * _SECOND_FACTOR
    return number ^ (number >> np.uint64(31))


@compiled
def draw_numbers(key: np.uint64, start: np.uint64, numbers: Keys) -> None:
    """Write the numbers of a stream: what drawing takes at least."""
    state = key + start * _GOLDEN
    for i in range(len(numbers)):
        state += _GOLDEN
        numbers[i] = _mixed(state)


@compiled
def _drawn(number: np.uint64, slots: Keys, first: np.uint64, shift: np.uint64) -> np.uint64:
    """Return what an alias table that begins at `first` draws with a random number."""
    slot = (number >> _ONE) >> shift
    word = slots[first + slot]
    return slot if (number & _LOW_HALF) < (word >> _HALF) else word & _LOW_HALF


@compiled
def draw_records(  # noqa: PLR0917 compiled functions are called by position
    slots: Keys, shift: np.uint64, cells: Keys, key: np.uint64, start: np.uint64, records: Keys, count: int
) -> None:
    """Draw a cell for each of `count` requests and write its words, which `cells` has per word (rows) and cell."""
    for word in range(len(cells)):
        cell_row = cells[word]
        for first in range(0, count, BLOCK):
            row = records[word, first : min(first + BLOCK, count)]
            draw_numbers(key, start + np.uint64(first), row)  # in a loop of its own, which vector instructions do
            for i in range(len(row)):
                row[i] = cell_row[_drawn(row[i], slots, np.uint64(0), shift)]


@compiled
def draw_marginal(  # noqa: PLR0917 compiled functions are called by position
    slots: Keys, shift: np.uint64, parameter: np.uint64, key: np.uint64, start: np.uint64, records: Keys
) -> None:
    """Draw the bin of one parameter per request and put it into the records, which have 0 there."""
    row = records[parameter >> _THREE]
    place = (parameter & _SEVEN) << _THREE
    state = key + start * _GOLDEN
    for i in range(len(row)):
        state += _GOLDEN
        row[i] |= _drawn(_mixed(state), slots, np.uint64(0), shift) << place


@compiled
def decode(records: Keys, count: int, points: Integers, rows: Integers, first: int) -> None:
    """Write what stands in `points` for the bin of each parameter, for `count` requests from row place `first` on."""
    for parameter in range(len(rows)):
        codes, words, row = points[parameter], records[parameter >> 3], rows[parameter, first : first + count]
        place = np.uint64((parameter & 7) << 3)
        for i in range(len(row)):
            row[i] = codes[(words[i] >> place) & _CODE]


@compiled
def draw_rows(  # noqa: PLR0917 compiled functions are called by position
    slots: Keys, shift: np.uint64, cells: Keys, key: np.uint64, start: np.uint64, points: Integers, rows: Integers
) -> None:
    """Do what `draw_records` and `decode` do, without keeping the records."""
    requests = rows.shape[1]
    records = np.empty((len(cells), min(BLOCK, requests)), np.uint64)
    for first in range(0, requests, BLOCK):
        count = min(BLOCK, requests - first)
        draw_records(slots, shift, cells, key, start + np.uint64(first), records, count)
        decode(records, count, points, rows, first)


@compiled
def draw_inside(  # noqa: PLR0917
    records: Keys,
    parameter: np.uint64,
    slots: Keys,
    firsts: Keys,
    shifts: Keys,
    lows: Floats,
    highs: Floats,
    is_whole: bool,
    choice_key: np.uint64,
    inside_key: np.uint64,
    start: np.uint64,
    row: Floats,
) -> None:
    """Draw a value per request for one parameter: one of the ranges of its bin, and a value of the range.

    Bin b draws from the alias table that begins at firsts[b]; `lows` and `highs` are those of the slots' ranges, both
    included.
    """
    words = records[parameter >> _THREE]
    place = (parameter & _SEVEN) << _THREE
    choices, insides = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    for first in range(0, len(row), BLOCK):
        count = min(BLOCK, len(row) - first)
        draw_numbers(choice_key, start + np.uint64(first), choices[:count])
        draw_numbers(inside_key, start + np.uint64(first), insides[:count])
        for i in range(count):
            code = (words[first + i] >> place) & _CODE
            slot = firsts[code] + _drawn(choices[i], slots, firsts[code], shifts[code])
            low, high = lows[slot], highs[slot]
            unit = np.float64(insides[i] >> _UNIT_SHIFT) * _UNIT
            value = low + (np.floor(unit * (high - low + 1.0)) if is_whole else unit * (high - low))
            row[first + i] = min(value, high)
