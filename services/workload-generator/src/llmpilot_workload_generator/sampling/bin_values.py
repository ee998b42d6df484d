"""The values inside the bins of a parameter: which of them a request gets, once its bin is drawn.

Invariant: every value given satisfies the conditions, lies in the true range of its bin, and is whole where the
parameter is an integer.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from llmpilot_workload_generator.model import Floats, Keys, Kind, Parameter, bin_centres
from llmpilot_workload_generator.sampling.alias import build_alias
from llmpilot_workload_generator.sampling.conditions import Ranges, Restriction, restrict

_GRID_STEP_DOUBLES = 2.0**43
"""Doubles in a step of the grid of sketches that are not exact (`sketch.py`)."""


class ValueChoice(StrEnum):
    """Which value of its bin a parameter takes."""

    CENTRE = "centre"
    """The mean of the bin's values (the paper's choice); of categories the most frequent."""
    UNIFORM = "uniform"
    """Any value from the smallest to the largest seen in the bin, all alike; of categories as often as seen."""
    QUANTILES = "quantiles"
    """As often as seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeTables:
    """For each bin an alias table of ranges, as `drawing.draw_inside` takes them."""

    slots: Keys
    firsts: Keys
    shifts: Keys
    lows: Floats
    highs: Floats


def ranges_of(parameter: Parameter) -> Ranges:
    """Return what the sketch of a parameter knows: single values where it is exact, else the steps of its grid.

    A bin of which it knows nothing has one range, from its smallest to its largest value.
    """
    sketch, bins = parameter.sketch, parameter.bins
    found = bins.find(sketch.values)
    lows, highs = sketch.values, sketch.values
    if not sketch.exact:
        highs = np.nextafter(lows + step_widths(lows), -np.inf)
    lows = np.clip(lows, parameter.lows[found], parameter.highs[found])
    highs = np.clip(highs, parameter.lows[found], parameter.highs[found])
    (unknown,) = np.nonzero(np.bincount(found, minlength=len(bins)) == 0)
    places = np.concatenate((found, unknown))
    order = np.argsort(places, kind="stable")
    lows = np.concatenate((lows, parameter.lows[unknown]))[order]
    highs = np.concatenate((highs, parameter.highs[unknown]))[order]
    if parameter.kind is not Kind.NUMBER:
        lows = np.rint(lows) if sketch.exact else np.ceil(lows)
        highs = np.maximum(np.rint(highs) if sketch.exact else np.floor(highs), lows)
    masses = np.concatenate((sketch.counts.astype(np.float64), np.ones(len(unknown))))[order]
    return Ranges(bins=places[order], lows=lows, highs=highs, masses=masses)


def step_widths(values: Floats) -> Floats:
    """Return how far the next value of the grid is above each."""
    widths: Floats = np.abs(np.spacing(np.nextafter(values, np.inf))) * _GRID_STEP_DOUBLES
    return widths


def shares_kept(before: Ranges, after: Ranges, bin_count: int) -> Floats:
    """Return the share of each bin's requests that satisfies the conditions; exactly 0 or 1 where none or all do."""
    was = np.bincount(before.bins, before.masses, bin_count)
    now = np.bincount(after.bins, after.masses, bin_count)
    return now / was


def centres(parameter: Parameter, ranges: Ranges, restriction: Restriction | None) -> Floats:
    """Return the value that stands for each bin, 0 where the conditions leave none of it.

    It is the mean of the bin's values, as `model.bin_centres`; of those that satisfy the conditions, if any.
    """
    bin_count = len(parameter.bins)
    found = np.flatnonzero(np.bincount(ranges.bins, minlength=bin_count))
    firsts = np.searchsorted(ranges.bins, found)
    result = np.zeros(bin_count)
    if parameter.kind is Kind.CATEGORY:  # the most frequent labels come first
        result[found] = ranges.lows[firsts]
        return result
    if restriction is None:
        means = bin_centres(parameter)[found]
    else:
        masses = np.add.reduceat(ranges.masses, firsts)
        means = np.add.reduceat(ranges.masses * ranges.lows, firsts) / masses
    if parameter.kind is Kind.INTEGER:
        means = np.rint(means)
    lows, highs = np.minimum.reduceat(ranges.lows, firsts), np.maximum.reduceat(ranges.highs, firsts)
    means = np.clip(means, lows, highs)  # a mean is a sum divided: of equal values it need not be the value
    if restriction is not None:
        for place in np.flatnonzero(~restriction.admits(means)):
            inside = ranges.take(ranges.bins == found[place])
            nearest = np.clip(means[place], inside.lows, inside.highs)
            means[place] = nearest[np.abs(nearest - means[place]).argmin()]
    result[found] = means
    return result


def values_inside(
    parameter: Parameter, ranges: Ranges, restriction: Restriction | None, choice: ValueChoice
) -> Floats | RangeTables:
    """Return the one value of each bin, where that is all there is to choose from; else how to draw one."""
    if choice is ValueChoice.CENTRE:
        return centres(parameter, ranges, restriction)
    if choice is ValueChoice.UNIFORM and parameter.kind is not Kind.CATEGORY:
        ranges = _whole_bins(ranges)
        if restriction is not None:
            ranges = restrict(ranges, restriction)
    is_single = len(np.unique(ranges.bins)) == len(ranges) and np.array_equal(ranges.lows, ranges.highs)
    return centres(parameter, ranges, restriction) if is_single else _tables(ranges, len(parameter.bins))


def _tables(ranges: Ranges, bin_count: int) -> RangeTables:
    bounds = np.searchsorted(ranges.bins, np.arange(bin_count + 1)).tolist()
    slots, lows, highs = [], [], []
    firsts, shifts = np.zeros(bin_count, np.uint64), np.full(bin_count, 63, np.uint64)
    slot_count = 0
    for place, (first, last) in enumerate(pairwise(bounds)):
        if first == last:  # never drawn
            continue
        table = build_alias(ranges.masses[first:last])
        unused = (0, len(table.slots) - (last - first))
        firsts[place], shifts[place] = slot_count, table.shift
        slots.append(table.slots)
        lows.append(np.pad(ranges.lows[first:last], unused))
        highs.append(np.pad(ranges.highs[first:last], unused))
        slot_count += len(table.slots)
    return RangeTables(
        slots=np.concatenate(slots),
        firsts=firsts,
        shifts=shifts,
        lows=np.concatenate(lows),
        highs=np.concatenate(highs),
    )


def _whole_bins(ranges: Ranges) -> Ranges:
    """Return one range per bin, from the smallest to the largest value of its ranges."""
    found, firsts = np.unique(ranges.bins, return_index=True)
    return Ranges(
        bins=found,
        lows=np.minimum.reduceat(ranges.lows, firsts),
        highs=np.maximum.reduceat(ranges.highs, firsts),
        masses=np.ones(len(found)),
    )
