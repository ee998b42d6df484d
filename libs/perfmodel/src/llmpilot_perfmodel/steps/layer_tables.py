"""Reads tables of measured layer times: curves over one number, and attention over four.

Invariant: what a table states is kept to the last digit; what an attention table leaves out lies on a straight line
through what it states.
Source of the layout: the profiler of casys-kaist/LLMServingSim.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.csv_table import CsvTable, Row, read_table

Floats = npt.NDArray[np.float64]

_TIME = "time_us"
_SECONDS_PER_UNIT = 1e-6
_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_FILL_ORDER = (0, 1, 3, 2)
"""The number of decoding sequences last: its largest values are often measured without a prefill only."""
_LEAST_MEASURED_SHARE = 0.25
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds over one number."""

    nodes: Floats
    """At least two, rising."""
    seconds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGrid:
    """Seconds of one layer's attention over the four numbers that describe a step."""

    chunks: Floats
    """The first is 0: nothing prefills."""
    prefill_cached: Floats
    sequences: Floats
    """The first is 0: nothing decodes."""
    decode_cached: Floats
    seconds: Floats
    """One dimension for each of the above."""


def read_curves(path: Path, *, axis: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Curve]:
    """Return each layer's curve; raise `InvalidInputError` with everything that is wrong with the file."""
    table = CsvTable(read_table(path), label=str(path), required=("layer", axis, _TIME), optional=())
    layers: dict[str, dict[int, float]] = {}
    for row in table.rows():
        layer, node, seconds = row.text("layer"), row.count(axis), _seconds(row)
        if layer and layer not in required + optional:
            table.refuse(row.line, "layer", f"is unknown: {layer[:40]!r}; known are {', '.join(required + optional)}")
        elif layer and node is not None and seconds is not None:
            curve = layers.setdefault(layer, {})
            if node in curve:
                table.refuse(row.line, axis, f"{layer} with {node} is stated twice")
            curve[node] = seconds
    table.raise_violations()
    _check_curves(path, layers, axis, required)
    return {layer: _curve(points) for layer, points in layers.items()}


def _seconds(row: Row) -> float | None:
    value = row.number(_TIME)
    return None if value is None else value * _SECONDS_PER_UNIT


def _check_curves(path: Path, layers: dict[str, dict[int, float]], axis: str, required: tuple[str, ...]) -> None:
    found = [Violation(f"{path} {layer}", "layer is missing; measure it") for layer in required if layer not in layers]
    nodes = set().union(*layers.values())
    if layers and len(nodes) < 2:  # noqa: PLR2004 a line takes two points
        found.append(Violation(f"{path} {axis}", "must have two different values or more"))
    for layer, points in layers.items():
        missing = sorted(nodes - points.keys())
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
            found.append(Violation(f"{path} {layer}", f"lacks {axis} {shown}, which other layers have; measure them"))
    if found:
        raise InvalidInputError(found)


def _curve(points: dict[int, float]) -> Curve:
    nodes = sorted(points)
    return Curve(nodes=np.array(nodes, np.float64), seconds=np.array([points[node] for node in nodes]))


def read_attention(path: Path) -> AttentionGrid:
    """Return the grid, filled up; raise `InvalidInputError` with everything that is wrong with the file."""
    table = CsvTable(read_table(path), label=str(path), required=(*_AXES, _TIME), optional=())
    measured: dict[tuple[int, int, int, int], float] = {}
    for row in table.rows():
        chunk, earlier, sequences, context = (row.count(axis) for axis in _AXES)
        seconds = _seconds(row)
        if chunk is None or earlier is None or sequences is None or context is None or seconds is None:
            continue
        if chunk + sequences == 0 or (chunk == 0 and earlier > 0) or (sequences == 0 and context > 0):
            table.refuse(row.line, "", "has cached tokens without a prefill or a decode that uses them, or neither")
        elif (chunk, earlier, sequences, context) in measured:
            table.refuse(row.line, "", "states a step a second time")
        else:
            measured[chunk, earlier, sequences, context] = seconds
    table.raise_violations()
    return _grid(path, measured)


def _grid(path: Path, measured: dict[tuple[int, int, int, int], float]) -> AttentionGrid:
    steps = np.array(list(measured), np.int64).reshape(-1, len(_AXES))
    prefills, decodes = steps[:, 0] > 0, steps[:, 2] > 0
    found = [
        Violation(f"{path} {name}", "no such step is measured; measure some")
        for name, chosen in (("prefill only", prefills & ~decodes), ("decode only", decodes & ~prefills))
        if not chosen.any()
    ]
    axes = [
        np.union1d(0, steps[:, 0]),
        np.unique(steps[prefills, 1]),
        np.union1d(0, steps[:, 2]),
        np.unique(steps[decodes, 3]),
    ]
    found += [
        Violation(f"{path} {name}", "must have two different values or more")
        for name, nodes in zip(_AXES, axes, strict=True)
        if len(nodes) < 2  # noqa: PLR2004 a line takes two points
    ]
    if not found:
        seconds = _spread(axes, steps, np.array(list(measured.values())))
        share = 1 - float(np.isnan(seconds).mean())
        if share < _LEAST_MEASURED_SHARE:
            found.append(Violation(str(path), f"only {share:.0%} of the grid is measured; measure more of it"))
    if found:
        raise InvalidInputError(found)
    nodes = [axis.astype(np.float64) for axis in axes]
    for is_beyond in (False, True):
        for dimension in _FILL_ORDER:
            _fill(np.moveaxis(seconds, dimension, -1), nodes[dimension], is_beyond)
    chunks, prefill_cached, sequences, decode_cached = nodes
    return AttentionGrid(
        chunks=chunks,
        prefill_cached=prefill_cached,
        sequences=sequences,
        decode_cached=decode_cached,
        seconds=seconds,
    )


def _spread(axes: list[npt.NDArray[np.int64]], steps: npt.NDArray[np.int64], values: Floats) -> Floats:
    """Return the values on the grid of the axes, NaN where there is none; a step without prefill has any prompt."""
    seconds = np.full([len(axis) for axis in axes], np.nan)
    chunk, earlier, sequences, context = (
        np.searchsorted(axis, column) for axis, column in zip(axes, steps.T, strict=True)
    )
    seconds[chunk, np.minimum(earlier, len(axes[1]) - 1), sequences, np.minimum(context, len(axes[3]) - 1)] = values
    for index in np.flatnonzero(chunk == 0):
        seconds[0, :, sequences[index], context[index]] = values[index]
    for index in np.flatnonzero(sequences == 0):
        seconds[chunk[index], earlier[index], 0, :] = values[index]
    seconds[0, :, 0, :] = 0.0
    return seconds


def _fill(seconds: Floats, nodes: Floats, is_beyond: bool) -> None:
    """Fill what is missing along the last dimension: between measured nodes, or beyond the last one too."""
    for place in np.argwhere(np.isnan(seconds).any(axis=-1)):
        line = seconds[tuple(place)]
        known = np.flatnonzero(~np.isnan(line))
        if len(known) < 2:  # noqa: PLR2004 a line takes two points
            continue
        missing = np.flatnonzero(np.isnan(line))
        if not is_beyond:
            missing = missing[(missing > known[0]) & (missing < known[-1])]
        line[missing] = np.interp(nodes[missing], nodes[known], line[known])
        after = missing[missing > known[-1]]
        last, before = known[-1], known[-2]
        slope = max(0.0, (line[last] - line[before]) / (nodes[last] - nodes[before]))
        line[after] = line[last] + slope * (nodes[after] - nodes[last])
