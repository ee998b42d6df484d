import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.fitting.sketch import round_down
from llmpilot_workload_generator.model import Bins, Kind, Parameter, Sketch, bin_centres
from llmpilot_workload_generator.sampling.bin_values import (
    RangeTables,
    ValueChoice,
    centres,
    ranges_of,
    shares_kept,
    step_widths,
    values_inside,
)
from llmpilot_workload_generator.sampling.conditions import Restriction, restrict

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False)


def parameter(
    values: list[float], counts: list[int], edges: list[float], *, kind: Kind = Kind.INTEGER, exact: bool = True
) -> Parameter:
    bins = Bins(name="x", kind=kind, edges=np.array(edges, np.float64), categories=("a", "b", "c", "d"))
    sketch = Sketch(
        values=np.array(values, np.float64), counts=np.array(counts), exact=exact, low=values[0], high=values[-1]
    )
    places = bins.find(sketch.values)
    inside = [sketch.values[places == place] for place in range(len(bins))]
    lows = [float(found.min()) if len(found) else edge for found, edge in zip(inside, edges, strict=True)]
    highs = [float(found.max()) if len(found) else edge for found, edge in zip(inside, edges, strict=True)]
    return Parameter(bins=bins, sketch=sketch, lows=np.array(lows), highs=np.array(highs))


@given(NUMBERS)
def test_a_step_of_the_grid_ends_where_the_sketch_says(value: float) -> None:
    """Independent source: what the sketch rounds down to. 0 stands for itself alone."""
    low = round_down(np.array([value]))
    end = low + step_widths(low)
    assert round_down(end)[0] == end[0]
    assert round_down(np.nextafter(end, -np.inf))[0] == low[0]


def test_the_centre_is_the_mean_rounded_where_values_are_whole() -> None:
    """By hand: (1 * 2 + 2 * 3) / 5 = 1.6; 10."""
    whole = parameter([1, 2, 10], [2, 3, 1], [1, 10])
    assert centres(whole, ranges_of(whole), None).tolist() == [2, 10]
    numbers = parameter([1, 2, 10], [2, 3, 1], [1, 10], kind=Kind.NUMBER)
    assert centres(numbers, ranges_of(numbers), None).tolist() == bin_centres(numbers).tolist() == [1.6, 10]


def test_a_bin_of_one_value_has_exactly_that_value() -> None:
    """The sum of three times 0.1, divided by three, is not 0.1."""
    one = parameter([0.1], [3], [0.1], kind=Kind.NUMBER)
    assert bin_centres(one)[0] != 0.1
    assert centres(one, ranges_of(one), None)[0] == 0.1


def test_the_centre_satisfies_the_conditions() -> None:
    """By hand: 4 and 6 have the mean 5, which is excluded; 4 and 6 are equally near, the first is taken."""
    bins = parameter([4, 5, 6, 9], [1, 1, 1, 1], [4, 9])
    restriction = Restriction(is_whole=True, excluded=frozenset({5.0}))
    assert centres(bins, restrict(ranges_of(bins), restriction), restriction).tolist() == [4, 9]
    below = Restriction(is_whole=True, high=5)
    left = restrict(ranges_of(bins), below)
    assert centres(bins, left, below).tolist() == [4, 0]  # the mean 4.5 is rounded to even; nothing is left of bin 2
    assert shares_kept(ranges_of(bins), left, 2).tolist() == pytest.approx([2 / 3, 0])


def test_categories_are_their_most_frequent_label_or_as_often_as_seen() -> None:
    labels = parameter([0, 1, 2, 3], [9, 5, 3, 1], [0, 1, 2], kind=Kind.CATEGORY)
    ranges = ranges_of(labels)
    assert centres(labels, ranges, None).tolist() == [0, 1, 2]
    for choice in (ValueChoice.UNIFORM, ValueChoice.QUANTILES):
        tables = values_inside(labels, ranges, None, choice)
        assert isinstance(tables, RangeTables)
        last = tables.slots[tables.firsts[2].astype(int) :]
        assert (last >> np.uint64(32)).min() / 2**32 == pytest.approx(0.5)  # 1 of 4 in two slots


def test_bins_of_one_value_each_need_no_tables() -> None:
    single = parameter([1, 5], [2, 3], [1, 5])
    for choice in ValueChoice:
        values = values_inside(single, ranges_of(single), None, choice)
        assert not isinstance(values, RangeTables)
        assert values.tolist() == [1, 5]


def test_uniform_values_are_between_the_smallest_and_the_largest_seen() -> None:
    bins = parameter([1, 4, 6, 20], [1, 1, 1, 1], [1, 20])
    tables = values_inside(bins, ranges_of(bins), None, ValueChoice.UNIFORM)
    assert isinstance(tables, RangeTables)
    assert (tables.lows.tolist(), tables.highs.tolist()) == ([1, 20], [6, 20])
    restriction = Restriction(is_whole=True, low=3, excluded=frozenset({5.0}))
    left = restrict(ranges_of(bins), restriction)
    tables = values_inside(bins, left, restriction, ValueChoice.UNIFORM)
    assert isinstance(tables, RangeTables)
    assert (tables.lows.tolist(), tables.highs.tolist()) == ([4, 6, 20], [4, 6, 20])


def test_what_is_on_the_grid_is_spread_over_its_step_and_no_further() -> None:
    """By hand: from 1024 to 2048 a step is 2, from 2048 on 4; the largest value seen is 2050."""
    bins = Bins(name="x", kind=Kind.INTEGER, edges=np.array([1024.0, 1500.0]))
    sketch = Sketch(values=np.array([1024.0, 1026, 2048]), counts=np.array([1, 2, 3]), exact=False, low=1025, high=2050)
    found = ranges_of(
        Parameter(bins=bins, sketch=sketch, lows=np.array([1025.0, 2048]), highs=np.array([1027.0, 2050]))
    )
    assert found.lows.tolist() == [1025, 1026, 2048]
    assert found.highs.tolist() == [1025, 1027, 2050]


def test_a_bin_that_the_sketch_does_not_know_has_its_whole_range() -> None:
    bins = Bins(name="x", kind=Kind.NUMBER, edges=np.array([0.0, 5, 7]))
    sketch = Sketch(values=np.array([1.0, 8]), counts=np.array([4, 4]), exact=True, low=1, high=8)
    found = ranges_of(Parameter(bins=bins, sketch=sketch, lows=np.array([1.0, 5, 8]), highs=np.array([1.0, 6, 8])))
    assert found.bins.tolist() == [0, 1, 2]
    assert (found.lows.tolist(), found.highs.tolist()) == ([1, 5, 8], [1, 6, 8])
