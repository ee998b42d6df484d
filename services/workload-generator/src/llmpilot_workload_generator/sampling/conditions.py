"""Conditions on what is drawn: "input_tokens <= 874", "batch_size = 1", "model in gpt-4, llama".

Invariant: what a restriction admits is the same whether it is asked about a value, about a range of values, or about
the rows of a trace.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import Violation
from llmpilot_workload_generator.model import Column, Floats, Kind, Parameter

FIELD = "conditions"

_COMPARISON = re.compile(r"\s*(?P<name>[^<>=!]*?)\s*(?P<sign><=|>=|==|!=|<|>|=)(?P<value>.*)", re.DOTALL)
_CHOICE = re.compile(r"\s*(?P<name>[^<>=!\s]+)\s+in\s(?P<value>.*)", re.DOTALL)
_ORDERED = frozenset({"<", "<=", ">", ">="})
_SHOWN_LABELS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What all conditions on one parameter say together; values of categories are positions."""

    is_whole: bool
    low: float = -math.inf
    """The smallest value admitted."""
    high: float = math.inf
    """The largest value admitted."""
    chosen: frozenset[float] | None = None
    """The only values admitted; None: all."""
    excluded: frozenset[float] = frozenset()

    def admits(self, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Say of each value whether it satisfies the conditions."""
        admitted = (values >= self.low) & (values <= self.high)
        if self.chosen is not None:
            admitted &= np.isin(values, sorted(self.chosen))
        return admitted & ~np.isin(values, sorted(self.excluded))

    def also(self, sign: str, values: Sequence[float]) -> "Restriction":
        """Return this with one condition more; `values` is one unless the sign is "in"."""
        if sign == "in":
            chosen = frozenset(value for value in values if not self.is_whole or value == round(value))
            return replace(self, chosen=chosen if self.chosen is None else self.chosen & chosen)
        (value,) = values
        if sign == "!=":
            return replace(self, excluded=self.excluded | {value})
        before, after = self.neighbours(value)
        is_reached = not self.is_whole or value == round(value)
        match sign:
            case "<":
                return replace(self, high=min(self.high, before))
            case "<=":
                return replace(self, high=min(self.high, value if is_reached else before))
            case ">":
                return replace(self, low=max(self.low, after))
            case _:
                return replace(self, low=max(self.low, value if is_reached else after))

    def neighbours(self, value: float) -> tuple[float, float]:
        """Return the next values below and above one."""
        if self.is_whole:
            return float(math.ceil(value) - 1), float(math.floor(value) + 1)
        return math.nextafter(value, -math.inf), math.nextafter(value, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Ranges of values inside the bins of a parameter, and how many requests are in each."""

    bins: npt.NDArray[np.intp]
    lows: Floats
    highs: Floats
    """Included; the same as `lows` where there is one value."""
    masses: Floats

    def __len__(self) -> int:
        return len(self.bins)

    def take(self, places: npt.NDArray[Any]) -> "Ranges":
        """Return the ranges at some places, or where a mask is true."""
        return Ranges(
            bins=self.bins[places], lows=self.lows[places], highs=self.highs[places], masses=self.masses[places]
        )


def restrict(ranges: Ranges, restriction: Restriction) -> Ranges:
    """Return the parts of ranges that satisfy conditions, each with its share of the requests.

    Values are taken to be spread evenly over a range. Of fractions a single value has no share of a range: one that is
    chosen stands for all of it, one that is excluded for none.
    """
    kept = _cut(ranges, restriction.low, restriction.high, is_whole=restriction.is_whole)
    if restriction.chosen is not None:
        kept = _only(kept, restriction)
    for value in sorted(restriction.excluded):
        last, first = restriction.neighbours(value)
        parts = (
            _cut(kept, -math.inf, last, is_whole=restriction.is_whole),
            _cut(kept, first, math.inf, is_whole=restriction.is_whole),
        )
        kept = _joined(*parts)
    return kept


def _cut(ranges: Ranges, low: float, high: float, *, is_whole: bool) -> Ranges:
    """Return what is left of ranges from one value to another, both included."""
    lows, highs = np.maximum(ranges.lows, low), np.minimum(ranges.highs, high)
    step = 1.0 if is_whole else 0.0
    widths = ranges.highs - ranges.lows + step
    shares = np.divide(highs - lows + step, widths, out=np.ones(len(ranges)), where=widths > 0)
    cut = Ranges(bins=ranges.bins, lows=lows, highs=highs, masses=ranges.masses * shares)
    return cut.take((lows <= highs) & (shares > 0))


def _only(ranges: Ranges, restriction: Restriction) -> Ranges:
    """Return the chosen values that are in the ranges."""
    values = np.array(sorted(restriction.chosen or ()), np.float64)
    places, found = np.nonzero((ranges.lows[:, None] <= values) & (values <= ranges.highs[:, None]))
    widths = ranges.highs - ranges.lows + 1
    parts = widths if restriction.is_whole else np.bincount(places, minlength=len(ranges)).astype(np.float64)
    chosen = ranges.take(places)
    return replace(chosen, lows=values[found], highs=values[found], masses=chosen.masses / parts[places])


def _joined(first: Ranges, second: Ranges) -> Ranges:
    """Return the ranges of both, in order."""
    joined = Ranges(
        bins=np.concatenate((first.bins, second.bins)),
        lows=np.concatenate((first.lows, second.lows)),
        highs=np.concatenate((first.highs, second.highs)),
        masses=np.concatenate((first.masses, second.masses)),
    )
    return joined.take(np.lexsort((joined.lows, joined.bins)))


def parse_conditions(
    texts: Sequence[str], parameters: Sequence[Parameter], violations: list[Violation]
) -> dict[str, Restriction]:
    """Return what conditions say, by parameter; append what is wrong with them."""
    known = {parameter.name: parameter for parameter in parameters}
    restrictions: dict[str, Restriction] = {}
    for text in texts:
        name, sign, words = _parts(text)
        if not sign or not all(words):
            problem = f'must be like "input_tokens <= 874", is {text!r}; parameters are {", ".join(known)}'
            violations.append(Violation(FIELD, problem))
        elif name not in known:
            problem = f"there is no parameter {name!r} in {text!r}; parameters are {', '.join(known)}"
            violations.append(Violation(FIELD, problem))
        else:
            values = _values(known[name], sign, words, text, violations)
            before = restrictions.get(name, Restriction(is_whole=known[name].kind is not Kind.NUMBER))
            restrictions[name] = before.also(sign, values) if values else before
    return restrictions


def _parts(text: str) -> tuple[str, str, list[str]]:
    """Return the name, the sign and the values of a condition; no sign where it is none."""
    if parts := _CHOICE.fullmatch(text):
        return parts["name"], "in", [word.strip() for word in parts["value"].split(",")]
    if parts := _COMPARISON.fullmatch(text):
        sign = "in" if parts["sign"] in {"=", "=="} else parts["sign"]
        return parts["name"], sign, [parts["value"].strip()]
    return "", "", []


def _values(
    parameter: Parameter, sign: str, words: Sequence[str], text: str, violations: list[Violation]
) -> list[float]:
    """Return what the words of a condition stand for; none, and a violation, where they do not."""
    if parameter.kind is not Kind.CATEGORY:
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = [math.nan]
        if all(map(math.isfinite, values)):
            return values
        violations.append(Violation(FIELD, f"{parameter.name} must be compared with a number in {text!r}"))
        return []
    categories = parameter.bins.categories
    if sign in _ORDERED:
        violations.append(Violation(FIELD, f"{parameter.name} has no order, so {sign} says nothing in {text!r}"))
        return []
    unknown = [word for word in words if word not in categories]
    if unknown:
        problem = f"{parameter.name} is never {', '.join(unknown)} in {text!r}; it is {in_words(parameter)}"
        violations.append(Violation(FIELD, problem))
        return []
    return [float(categories.index(word)) for word in words]


def in_words(parameter: Parameter) -> str:
    """Say what values a parameter has."""
    if parameter.kind is not Kind.CATEGORY:
        return f"{parameter.sketch.low:.15g} to {parameter.sketch.high:.15g}"
    categories = parameter.bins.categories
    shown = ", ".join(categories[:_SHOWN_LABELS])
    return shown if len(categories) <= _SHOWN_LABELS else f"{shown}, ... ({len(categories)} in all)"


def rows_admitted(
    columns: Mapping[str, Column], restrictions: Mapping[str, Restriction], parameters: Sequence[Parameter]
) -> npt.NDArray[np.bool_]:
    """Say of each row of a trace whether it satisfies all conditions."""
    count = len(next(iter(columns.values()), ()))
    admitted = np.ones(count, np.bool_)
    for parameter in parameters:
        restriction = restrictions.get(parameter.name)
        if restriction is not None:
            admitted &= restriction.admits(_numbers(columns[parameter.name], parameter))
    return admitted


def _numbers(column: Column, parameter: Parameter) -> npt.NDArray[Any]:
    """Return a column with positions in place of labels; -1: a label that the parameter does not know."""
    if parameter.kind is not Kind.CATEGORY:
        return column
    labels, places = np.unique(column, return_inverse=True)
    positions = {label: position for position, label in enumerate(parameter.bins.categories)}
    return np.array([positions.get(label, -1) for label in labels.tolist()], np.int64)[places]
