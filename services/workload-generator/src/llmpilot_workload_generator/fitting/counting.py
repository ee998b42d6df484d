"""Counting: how often which keys and small numbers occur, and the keys of the cells that requests fall in.

Invariant: whatever is counted is counted once, whatever the width of the integers, the size of the tables and the cut
into batches. Compiled functions get arrays that are contiguous, read-only where they only read, and unsigned, so that
each is compiled once per width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.compiled import compiled
from llmpilot_workload_generator.model import Bins, Floats, Integers, Keys, strides

SMALL_VALUES = 1 << 18
"""Integers from 0 up to here are looked up in tables; 10 MB per parameter where large ones occur."""
BLOCK_ROWS = 1 << 15
"""Rows whose keys are made at once: so few that they stay in the cache."""

_EMPTY = np.uint64(2**64 - 1)  # no key of a cell, and as float64 not a number
_LEAST_CAPACITY = 1 << 10
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_KEY_BITS = 64
_LANES = 4
_REMEMBERED_VALUES = 1 << 10  # so few that they stay in the fastest cache

_T = TypeVar("_T", bound=np.generic)
Numbers = npt.NDArray[Any]
"""Integers of any width, truth values, or float64."""
Small = npt.NDArray[np.unsignedinteger[Any]]
"""Unsigned integers of any width below SMALL_VALUES."""


@compiled
def _shift_for(table: Keys) -> np.uint64:
    """Return by how much to shift a hash, so that it is the number of a slot."""
    slots, shift = len(table), np.uint64(_KEY_BITS)
    while slots > 1:
        slots >>= 1
        shift -= np.uint64(1)
    return shift


@compiled
def _slot_of(key: np.uint64, table: Keys, shift: np.uint64) -> np.uint64:
    """Return where a key is in a table, or would be."""
    mask = np.uint64(len(table) - 1)
    slot = ((key ^ (key >> _HALF)) * _MULTIPLIER) >> shift
    while table[slot] != key and table[slot] != _EMPTY:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def _count_keys(keys: Keys, start: int, table: Keys, counts: Integers, used: int) -> tuple[int, int]:
    """Count keys from `start` on until the table is half full; return where it stopped and how many slots are used."""
    shift = _shift_for(table)
    for row in range(start, len(keys)):
        slot = _slot_of(keys[row], table, shift)
        if table[slot] == _EMPTY:
            if 2 * used >= len(table):
                return row, used
            table[slot] = keys[row]
            used += 1
        counts[slot] += 1
    return len(keys), used


@compiled
def _move(old_table: Keys, old_counts: Integers, table: Keys, counts: Integers) -> None:
    """Put what one table holds into another one, which is large enough and empty."""
    shift = _shift_for(table)
    for old in range(len(old_table)):
        if old_table[old] != _EMPTY:
            slot = _slot_of(old_table[old], table, shift)
            table[slot] = old_table[old]
            counts[slot] = old_counts[old]


@compiled
def _count_small(values: Small, lanes: npt.NDArray[np.int64]) -> None:
    """Count numbers; neighbours in different lanes, as equal ones would wait for each other."""
    whole = len(values) // _LANES * _LANES
    for row in range(0, whole, _LANES):
        lanes[0, values[row]] += 1
        lanes[1, values[row + 1]] += 1
        lanes[2, values[row + 2]] += 1
        lanes[3, values[row + 3]] += 1
    for row in range(whole, len(values)):
        lanes[0, values[row]] += 1


@compiled
def _add_small(values: Small, steps: Keys, keys: Keys) -> None:
    """Add to each key the step that a table has for the value."""
    for row in range(len(values)):
        keys[row] += steps[values[row]]


class _Search(NamedTuple):
    """What it takes to find the bins of floats; of the values seen last, many are remembered with their steps."""

    edges: Floats
    stride: np.uint64
    ranges: Floats
    """The smallest and the largest value in each bin; infinite in empty ones."""
    remembered: Floats
    steps: Keys


@compiled
def _add_searched(values: Floats, bits: Keys, search: _Search, keys: Keys) -> None:
    """Add to each key the value's bin times the stride, and widen the bin's range to hold the value."""
    shift = _shift_for(search.steps)
    for row in range(len(values)):
        value = values[row]
        slot = ((bits[row] ^ (bits[row] >> _HALF)) * _MULTIPLIER) >> shift
        if search.remembered[slot] != value:
            first = 0
            length = len(search.edges)
            while length > 1:
                half = length // 2
                first += half if search.edges[first + half] <= value else 0
                length -= half
            search.ranges[0, first] = min(search.ranges[0, first], value)
            search.ranges[1, first] = max(search.ranges[1, first], value)
            search.remembered[slot] = value
            search.steps[slot] = np.uint64(first) * search.stride
        keys[row] += search.steps[slot]


class CountTable:
    """How often each of any 64-bit keys but the largest occurs: open addressing, never more than half full."""

    def __init__(self) -> None:
        self._reserve(_LEAST_CAPACITY)
        self._used = 0

    @classmethod
    def of(cls, keys: Keys, counts: Integers) -> "CountTable":
        """Return a table of different keys that were counted elsewhere."""
        table = cls()
        table._reserve(max(_LEAST_CAPACITY, 1 << (2 * len(keys)).bit_length()))
        table._used = len(keys)
        _move(read_only(keys), read_only(counts), table._table, table._counts)
        return table

    def __len__(self) -> int:
        return self._used

    def add(self, keys: Keys) -> None:
        """Count each key once more."""
        keys = read_only(keys)
        row = 0
        while row < len(keys):
            row, self._used = _count_keys(keys, row, self._table, self._counts, self._used)
            if row < len(keys):
                self._grow()

    def items(self) -> tuple[Keys, Integers]:
        """Return the keys, rising, and how often each occurs."""
        slots = np.flatnonzero(self._counts)
        order = slots[np.argsort(self._table[slots])]
        return self._table[order], self._counts[order]

    def _reserve(self, capacity: int) -> None:
        self._table = np.full(capacity, _EMPTY)
        self._counts = np.zeros(capacity, np.int64)

    def _grow(self) -> None:
        keys, counts = read_only(self._table), read_only(self._counts)
        self._reserve(2 * len(keys))
        _move(keys, counts, self._table, self._counts)


class SmallCounts:
    """How often each small number occurs."""

    def __init__(self) -> None:
        self._lanes = np.zeros((_LANES, 0), np.int64)

    def add(self, values: Small) -> None:
        """Count each number once more."""
        needed = table_length(values)
        if needed > self._lanes.shape[1]:
            lanes = np.zeros((_LANES, needed), np.int64)
            lanes[:, : self._lanes.shape[1]] = self._lanes
            self._lanes = lanes
        _count_small(read_only(values), self._lanes)

    def items(self) -> tuple[Floats, Integers]:
        """Return the numbers, rising, and how often each occurs."""
        counts = self._lanes.sum(axis=0)
        found = np.flatnonzero(counts)
        return found.astype(np.float64), counts[found]


class CellCounts:
    """How many requests each cell of some bins holds."""

    def __init__(self, bins: Sequence[Bins]) -> None:
        self.bins = tuple(bins)
        self._table = CountTable()
        radices = [len(one) for one in bins]
        self._steps = [_BinSteps(one, stride) for one, stride in zip(bins, strides(radices), strict=True)]

    def add(self, columns: Sequence[Numbers]) -> None:
        """Count requests, of whose parameters there is a column each as `small_or_float` returns them."""
        for start in range(0, len(columns[0]), BLOCK_ROWS):
            keys = np.zeros(min(BLOCK_ROWS, len(columns[0]) - start), np.uint64)
            for steps, column in zip(self._steps, columns, strict=True):
                steps.add(column[start : start + BLOCK_ROWS], keys)
            self._table.add(keys)

    def items(self) -> tuple[Keys, Integers]:
        """Return the keys of the cells that are not empty, rising, and how many requests each holds."""
        return self._table.items()

    def ranges(self, place: int, small_values: Floats) -> tuple[Floats, Floats]:
        """Return the smallest and the largest value in each bin of a parameter; in an empty one, its edge.

        `small_values`: all values that came as small numbers, and perhaps others that came.
        """
        return self._steps[place].ranges(small_values)


class _BinSteps:
    """What the values of one parameter add to the keys of their cells."""

    def __init__(self, bins: Bins, stride: np.uint64) -> None:
        self._bins = bins
        self._stride = stride
        self._small_steps: Keys = np.zeros(0, np.uint64)
        self._search = _Search(
            edges=read_only(bins.edges),
            stride=stride,
            ranges=np.full((2, len(bins)), [[np.inf], [-np.inf]]),
            remembered=np.full(_REMEMBERED_VALUES, np.nan),
            steps=np.zeros(_REMEMBERED_VALUES, np.uint64),
        )

    def add(self, values: Numbers, keys: Keys) -> None:
        """Add to each key the step of its value."""
        values = read_only(values)
        if values.dtype == np.float64:
            _add_searched(values, values.view(np.uint64), self._search, keys)
            return
        needed = table_length(values)
        if needed > len(self._small_steps):
            found = self._bins.find(np.arange(needed, dtype=np.float64))
            self._small_steps = read_only(found.astype(np.uint64) * self._stride)
        _add_small(values, self._small_steps, keys)

    def ranges(self, small_values: Floats) -> tuple[Floats, Floats]:
        """Return the smallest and the largest value in each bin."""
        found = self._bins.find(small_values)
        lows, highs = self._search.ranges.copy()
        np.minimum.at(lows, found, small_values)
        np.maximum.at(highs, found, small_values)
        edges = self._bins.edges
        return np.where(np.isinf(lows), edges, lows), np.where(np.isinf(highs), edges, highs)


def small_or_float(column: Numbers) -> Numbers:
    """Return a column as unsigned integers below SMALL_VALUES if it is that, as float64 otherwise (without -0)."""
    if column.dtype == np.bool_:
        return column.view(np.uint8)
    if column.dtype.kind in "iu":
        unsigned: Small = column.view(f"u{column.dtype.itemsize}")
        largest = int(unsigned.max(initial=0))
        if largest < SMALL_VALUES and largest <= np.iinfo(column.dtype).max:
            return unsigned
    return column.astype(np.float64, copy=False) + 0.0


def table_length(values: Small) -> int:
    """Return how long a table must be for small numbers; few different lengths, so that it seldom grows."""
    if values.dtype.itemsize == 1:
        return 1 << 8
    return 1 << max(int(values.max(initial=0)).bit_length(), 10)


def sum_equal(values: npt.NDArray[_T], counts: Integers) -> tuple[npt.NDArray[_T], Integers]:
    """Return the different values, rising, and the sum of the counts of each."""
    order = np.argsort(values, kind="stable")
    values, counts = values[order], counts[order]
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))[: len(values)])
    return values[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def read_only(values: npt.NDArray[_T]) -> npt.NDArray[_T]:
    """Return the same values as functions are compiled for that only read them."""
    contiguous = np.ascontiguousarray(values).view()
    contiguous.flags.writeable = False
    return contiguous
