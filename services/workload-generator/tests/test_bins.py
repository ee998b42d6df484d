from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.fitting.bins import choose_bins
from llmpilot_workload_generator.model import Kind, Sketch

COUNTS = st.lists(st.integers(1, 9) | st.integers(1, 10**6), min_size=1, max_size=300)


def sketch_of(counts: list[int]) -> Sketch:
    """Values 10, 20, 30 ... that occur so often."""
    values = 10 * np.arange(1, len(counts) + 1, dtype=np.float64)
    return Sketch(values=values, counts=np.array(counts), exact=True, low=values[0], high=values[-1])


def bins_of(counts: list[int], max_bins: int) -> list[list[int]]:
    """Return the counts of the values in each bin."""
    sketch = sketch_of(counts)
    edges = choose_bins("n", Kind.INTEGER, sketch, max_bins=max_bins).edges
    starts = np.searchsorted(sketch.values, edges)
    assert np.array_equal(sketch.values[starts], edges)
    assert starts[0] == 0
    return [part.tolist() for part in np.split(np.array(counts), starts[1:])]


def capacity_of(parts: list[list[int]]) -> int:
    """Return what the fullest bin of several values holds; a value alone in its bin has no limit."""
    return max((sum(part) for part in parts if len(part) > 1), default=0)


def smallest_capacity(counts: list[int], max_bins: int) -> int:
    """Try every division into at most so many bins."""
    return min(
        capacity_of([counts[a:b] for a, b in zip((0, *cuts), (*cuts, len(counts)), strict=True)])
        for cut_count in range(min(max_bins, len(counts)))
        for cuts in combinations(range(1, len(counts)), cut_count)
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(2, 6))
def test_no_other_division_has_a_less_full_bin(counts: list[int], max_bins: int) -> None:
    parts = bins_of(counts, max_bins)
    if len(counts) <= max_bins:
        assert parts == [[count] for count in counts]
    else:
        assert capacity_of(parts) == smallest_capacity(counts, max_bins)


@given(COUNTS, st.integers(2, 256))
def test_bins_are_few_enough_and_a_value_above_the_fullest_is_alone(counts: list[int], max_bins: int) -> None:
    parts = bins_of(counts, max_bins)
    assert len(parts) <= max_bins
    capacity = capacity_of(parts)
    assert all(len(part) == 1 for part in parts for count in part if count > capacity)


@given(COUNTS, st.integers(2, 256))
def test_no_bin_could_take_the_first_value_of_the_next(counts: list[int], max_bins: int) -> None:
    """Bins are packed: a boundary is where the capacity, or a value heavier than that, makes one."""
    parts = bins_of(counts, max_bins)
    if len(counts) > max_bins:
        capacity = capacity_of(parts)
        for part, following in pairwise(parts):
            assert sum(part) + following[0] > capacity


def test_a_heavy_value_takes_nothing_from_the_others() -> None:
    """By hand: one of 100 values is half of all requests; 40 and 59 others fill 4 and 6 bins of up to 10."""
    counts = [1] * 100
    counts[40] = 100
    parts = bins_of(counts, 11)
    assert [100] in parts
    assert capacity_of(parts) == 10
    assert len(parts) == 11


def test_equal_values_are_divided_evenly() -> None:
    assert bins_of([1] * 640, 64) == [[1] * 10] * 64


def test_one_value_has_one_bin() -> None:
    assert bins_of([5], 64) == [[5]]


def test_rare_categories_share_the_last_bins() -> None:
    """Positions are ordered by frequency, so the frequent ones come first and alone."""
    counts = [500, 300, *[1] * 98]
    labels = tuple(map(str, range(100)))
    sketch = Sketch(values=np.arange(100.0), counts=np.array(counts), exact=True, low=0, high=99)
    bins = choose_bins("model", Kind.CATEGORY, sketch, max_bins=4, categories=labels)
    assert bins.edges.tolist() == [0, 1, 2, 51]
    assert (bins.name, bins.kind, bins.categories) == ("model", Kind.CATEGORY, labels)


@pytest.mark.parametrize("max_bins", [-1, 0, 1, 257])
def test_a_number_of_bins_that_cannot_be_is_refused(max_bins: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"max_bins: must be 2 to 256, is {max_bins}"):
        choose_bins("n", Kind.INTEGER, sketch_of([1, 2]), max_bins=max_bins)


def test_the_largest_counts_do_not_overflow() -> None:
    """Sums up to 2^53, which is what a model can hold."""
    parts = bins_of([2**44] * 512, 256)
    assert parts == [[2**44] * 2] * 256
