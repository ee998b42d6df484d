"""Memory against weight, one line per corner case, as SVG text that goes into a page.

Invariant: the picture has one axis each way, names no address, and is the same for the same report.
"""

import re
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

from llmpilot_tuner.outputs.report import Report

_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 4.6
_COLOURS = ("#2563eb", "#c2410c", "#0891b2", "#9333ea", "#b45309", "#be185d", "#4d7c0f", "#475569", "#7f1d1d")
_STYLES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (3, 3)), (0, (1, 2)))
"""Solid first, the others with gaps: cases that need the same memory lie on one another."""
_CAPACITY_COLOUR, _FOUND_COLOUR, _FAILED_COLOUR = "#1d2129", "#15703f", "#a31b1b"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llm-pilot",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_ROOM = 1.06


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    case: str
    weights: list[int]
    predicted: list[float]
    """In the unit of the axis."""


def memory_plot(report: Report) -> str:
    """Return an SVG element; empty where there is neither a prediction nor a measurement to draw."""
    from matplotlib import rc_context  # noqa: PLC0415 half a second, only for a picture
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    unit, size = _unit(report.memory.capacity_bytes)
    lines, (passed, failed) = _lines(report, size), _points(report, size)
    if not lines and not passed:
        return ""
    with rc_context(_STYLE):  # type: ignore[arg-type] # its keys are literals
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _draw(axes, report, lines, passed, failed)
        axes.set_xlabel(f"maximum batch weight, {report.weight_unit}")
        axes.set_ylabel(f"memory of each GPU at the peak, {unit}" if report.probe != "cpu" else f"peak memory, {unit}")
        figure.legend(loc="outside right upper", frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    return _inline(text.getvalue())


def _unit(byte_count: int) -> tuple[str, int]:
    return next(((unit, size) for unit, size in _UNITS if byte_count >= size), _UNITS[-1])


def _lines(report: Report, size: int) -> list[_Line]:
    """Return the cases that exist at more than one weight, those that need most first."""
    lines: dict[str, _Line] = {}
    for point in report.curve:
        line = lines.setdefault(point.case, _Line(case=point.case, weights=[], predicted=[]))
        line.weights.append(point.weight)
        line.predicted.append(point.predicted_bytes / size)
    drawn = [line for line in lines.values() if len(line.weights) > 1]
    return sorted(drawn, key=lambda line: max(line.predicted), reverse=True)


_Points = dict[str, tuple[list[int], list[float]]]


def _points(report: Report, size: int) -> tuple[_Points, _Points]:
    """Return measured peaks by case: of runs that passed, and of those that did not, at what they had reached."""
    passed: _Points = {}
    failed: _Points = {}
    for probe in report.probes:
        for run in probe.runs:
            if run.peak_bytes is not None:
                points = passed if run.outcome == "passed" else failed
                weights, peaks = points.setdefault(run.case, ([], []))
                weights.append(probe.weight)
                peaks.append(run.peak_bytes / size)
    return passed, failed


def _draw(axes: Any, report: Report, lines: list[_Line], passed: _Points, failed: _Points) -> None:
    found, capacity = report.max_batch_weight, report.memory.capacity_bytes / _unit(report.memory.capacity_bytes)[1]
    cases = [*(line.case for line in lines), *passed, *failed]
    colours = dict(zip(dict.fromkeys(cases), cycle(_COLOURS), strict=False))
    for line, style in zip(lines, cycle(_STYLES), strict=False):
        axes.plot(line.weights, line.predicted, color=colours[line.case], ls=style, linewidth=1.8, label=line.case)
    labelled = {line.case for line in lines}
    for case, (weights, peaks) in passed.items():
        label = "_" if case in labelled else case
        axes.plot(weights, peaks, "o", color=colours[case], markersize=5, label=label)
    for case, (weights, peaks) in failed.items():
        axes.plot(weights, peaks, "x", color=colours[case], markersize=6, markeredgewidth=1.8, label="_")
    axes.axhline(capacity, color=_CAPACITY_COLOUR, linestyle="--", linewidth=1.2, label="capacity")
    axes.axvline(found, color=_FOUND_COLOUR, linewidth=1.6, label=f"found: {found:,}")
    if passed:
        what = "counted" if report.probe == "dry" else "predicted peak" if report.probe == "analytic" else "measured"
        axes.plot([], [], "o", color=_CAPACITY_COLOUR, markersize=5, linestyle="", label=what)
    if failed:
        axes.plot([], [], "x", color=_FAILED_COLOUR, markersize=6, linestyle="", label="out of memory")
    axes.set_ylim(bottom=0, top=_ROOM * max([capacity, *(peak for _, peaks in passed.values() for peak in peaks)]))
    weights_shown = [found, *(weight for line in lines for weight in line.weights)]
    weights_shown += [weight for points in (passed, failed) for weights, _ in points.values() for weight in weights]
    axes.set_xlim(left=min(0, *weights_shown), right=min(max(weights_shown), 2 * found) * 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(visible=True, alpha=0.25)


def _inline(text: str) -> str:
    """Return the element alone, as a page wants it: without a prolog, a document type, and names of namespaces."""
    element = text[text.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element).replace("xlink:href=", "href=")
    return re.sub(r'(<svg[^>]*?)\swidth="[^"]*"|(<svg[^>]*?)\sheight="[^"]*"', r"\1\2", element, count=1)
