"""Published distributions of prompt and reply lengths: a CSV of points of cumulative curves, for several use cases.

Columns: use_case, side (input or output), tokens, cdf. Between two points a curve is straight, so that equal tokens
make a step. No more than the curves is known of a use case, so its lengths are taken as independent.
Invariant: the model's input and output lengths are exactly independent, and each is its curve to 1/10,000.
Source: Papaioannou and Doudali, EuroMLSys '24, Figure 1.
"""

import csv
import io
from collections import defaultdict

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.fitting.bins import choose_bins
from llmpilot_workload_generator.model import (
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    Arrivals,
    Floats,
    Integers,
    Kind,
    Parameter,
    Provenance,
    Sketch,
    WorkloadModel,
    bin_counts,
)

LENGTHS_COUNT = 10_000
"""Lengths of each side; a request for every pair of them makes 10^8."""
SOURCE = (
    "lengths of {use_case}, Figure 1 of Papaioannou and Doudali, EuroMLSys '24: independent, each pair of"
    f" {LENGTHS_COUNT:,} inputs and as many outputs is a request"
)
LICENCE = "MIT"
COLUMNS = ("use_case", "side", "tokens", "cdf")
SIDES = {"input": INPUT_TOKENS, "output": OUTPUT_TOKENS}
_NEITHER = f"must be the pickle published with fmperf, or CSV with the columns {', '.join(COLUMNS)}"
_LARGEST_LENGTH = 1 << 20
_TOLERANCE = 1e-3
"""How far a curve may be from 0 and 1 at its ends: they were read from a figure."""

_Curve = list[tuple[float, float]]


def read_length_cdf(content: bytes, *, label: str, use_case: str | None, command: str = "") -> WorkloadModel:
    """Return the model of a use case. Raises InvalidInputError where the file or the use case is wrong."""
    curves = _curves(content, label)
    if use_case not in curves:
        named = "be named" if use_case is None else f"be one of the file's, is {use_case!r}"
        raise InvalidInputError([Violation("use_case", f"must {named}: {', '.join(curves)}")])
    chosen = curves[use_case]
    missing = [side for side in SIDES if side not in chosen]
    if missing:
        raise InvalidInputError([Violation(f"{label} {use_case}", f"has no curve of the {' and '.join(missing)} side")])
    sketches = {}
    violations = []
    for side, curve in chosen.items():
        try:
            sketches[side] = _sketch(curve)
        except ValueError as error:
            violations.append(Violation(f"{label} {use_case} {side}", str(error)))
    if violations:
        raise InvalidInputError(violations)
    parameters = tuple(_parameter(name, sketches[side]) for side, name in SIDES.items())
    input_counts, output_counts = (bin_counts(parameter) // LENGTHS_COUNT for parameter in parameters)
    counts = np.outer(input_counts, output_counts).ravel()
    (keys,) = np.nonzero(counts)
    return WorkloadModel(
        parameters=parameters,
        keys=keys.astype(np.uint64),
        counts=counts[keys],
        provenance=Provenance(
            source=SOURCE.format(use_case=use_case), licence=LICENCE, command=command, row_count=LENGTHS_COUNT**2
        ),
        arrivals=Arrivals(),
    )


def _curves(content: bytes, label: str) -> dict[str, dict[str, _Curve]]:
    """Return the points of each side of each use case, in the file's order."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError([Violation(label, f"{_NEITHER}: {error}")]) from error
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if len(missing) == len(COLUMNS):
        raise InvalidInputError([Violation(label, f"{_NEITHER}; `workload fit` takes traces")])
    if missing:
        raise InvalidInputError(Violation(f"{label} column {column}", "is missing") for column in missing)
    curves: dict[str, dict[str, _Curve]] = defaultdict(lambda: defaultdict(list))
    violations = []
    for number, row in enumerate(rows, start=2):
        if row["side"] not in SIDES:
            violations.append(Violation(f"{label} line {number}", f"side must be input or output, is {row['side']!r}"))
            continue
        try:
            curves[row["use_case"]][row["side"]].append((float(row["tokens"]), float(row["cdf"])))
        except (TypeError, ValueError):
            violations.append(Violation(f"{label} line {number}", "tokens and cdf must be numbers"))
    if violations:
        raise InvalidInputError(violations)
    return curves


def _sketch(points: _Curve) -> Sketch:
    """Return how many of LENGTHS_COUNT requests have each length, each standing for as many of the other side."""
    values, counts = _lengths(points)
    return Sketch(
        values=values, counts=counts * LENGTHS_COUNT, exact=True, low=float(values[0]), high=float(values[-1])
    )


def _lengths(points: _Curve) -> tuple[Floats, Integers]:
    tokens, shares = np.array(points, np.float64).T
    if not ((tokens >= 0) & (tokens <= _LARGEST_LENGTH)).all() or not (np.diff(tokens) >= 0).all():
        raise ValueError(f"tokens must be from 0 to {_LARGEST_LENGTH:,} and never fall")
    if not (np.diff(shares) >= 0).all() or abs(shares[0]) > _TOLERANCE or abs(shares[-1] - 1) > _TOLERANCE:
        raise ValueError("cdf must never fall, from 0 to 1")
    whole = np.rint(tokens)  # the figure's points lie within 1/50 of whole numbers
    values = np.arange(whole[0], whole[-1] + 1)
    below = np.rint(np.interp(values + 0.5, whole, shares) * LENGTHS_COUNT).astype(np.int64)
    below[:-1] = np.minimum(below[:-1], LENGTHS_COUNT - 1)  # the largest was seen, if only once
    below[-1] = LENGTHS_COUNT
    counts = np.diff(below, prepend=0)
    return values[counts > 0], counts[counts > 0]


def _parameter(name: str, sketch: Sketch) -> Parameter:
    bins = choose_bins(name, Kind.INTEGER, sketch)
    found = bins.find(sketch.values)
    numbers = np.arange(len(bins))
    return Parameter(
        bins=bins,
        sketch=sketch,
        lows=sketch.values[np.searchsorted(found, numbers)],
        highs=sketch.values[np.searchsorted(found, numbers, side="right") - 1],
    )
