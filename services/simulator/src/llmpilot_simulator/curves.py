"""The three curves of Fig. 7, Lazuka et al., 2024: latency against throughput, and against throughput per dollar.

Invariant: a curve has the points of its ladder that have both coordinates, in the order of the users.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from llmpilot_simulator.ladder import Ladder, Level

TERMINAL_ROWS = 16
SECONDS_PER_HOUR = 3600
TICK_COUNT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One of the figure's parts."""

    title: str
    x_label: str
    latency: Callable[[Level], float | None]
    is_per_dollar: bool = False


CHARTS = (
    Chart(title="median TTFT, ms", x_label="tokens/s", latency=lambda level: level.ttft_ms_median),
    Chart(title="median ITL, ms", x_label="tokens/s", latency=lambda level: level.itl_ms_median),
    Chart(
        title="median ITL, ms",
        x_label="1000 tokens per dollar",
        latency=lambda level: level.itl_ms_median,
        is_per_dollar=True,
    ),
)


def points(chart: Chart, ladder: Ladder) -> tuple[list[float], list[float]]:
    """Return throughput and latency of a ladder's levels; empty where the chart needs a price and there is none."""
    if chart.is_per_dollar and ladder.price_per_hour is None:
        return [], []
    scale = SECONDS_PER_HOUR / ladder.price_per_hour / 1000 if chart.is_per_dollar and ladder.price_per_hour else 1.0
    found = [(level.tokens_per_second * scale, chart.latency(level)) for level in ladder.levels]
    known = [(x, y) for x, y in found if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def drawn_charts(ladders: Sequence[Ladder]) -> list[Chart]:
    """Return the charts that have a point to show."""
    return [chart for chart in CHARTS if any(points(chart, ladder)[0] for ladder in ladders)]


def terminal_curves(ladders: Sequence[Ladder], *, width: int) -> str:
    """Return the charts side by side as text of `width` columns; "" where there is nothing to draw."""
    import plotext  # noqa: PLC0415 only a terminal needs it

    charts = drawn_charts(ladders)
    if not charts:
        return ""
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, TERMINAL_ROWS)
    figure.subplots(1, len(charts))
    for column, chart in enumerate(charts, start=1):
        part = figure.subplot(1, column)
        part.theme("colorless")
        part.title(chart.title)
        part.label(chart.x_label)
        _set_ticks(part, chart, ladders)
        for ladder in ladders:
            x, y = points(chart, ladder)
            if x:
                signal = part.signal(x, np.log10(y).tolist(), marker="braille")
                signal.lines()
                if len(ladders) > 1:
                    signal.label(ladder.name)
                part.draw(signal)
    return str(plotext.uncolorize(figure.build().string()))


def _set_ticks(part: Any, chart: Chart, ladders: Sequence[Ladder]) -> None:
    """Write numbers that people read at the axes, with y as its logarithm; plotext's own are such as 6.3e3."""
    found = [points(chart, ladder) for ladder in ladders]
    xs, ys = ([value for axis in axes for value in axis] for axes in zip(*found, strict=True))
    x_ticks = np.linspace(min(xs), max(xs), TICK_COUNT)
    part.ruler("x").ticks(x_ticks.tolist(), [number_text(x) for x in x_ticks])
    y_ticks = np.geomspace(min(ys), max(ys), TICK_COUNT)
    part.ruler("y").ticks(np.log10(y_ticks).tolist(), [number_text(y) for y in y_ticks])


def number_text(value: float) -> str:
    """Return a number with three digits, or whole from 1,000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"  # noqa: PLR2004 three digits


def figure_file(ladders: Sequence[Ladder], *, title: str, file_format: str) -> bytes:
    """Return the charts as a picture; file_format: "png" or "svg"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 half a second, only for a picture
    from matplotlib.figure import Figure  # noqa: PLC0415

    charts = drawn_charts(ladders)
    figure = Figure(figsize=(4.5 * max(len(charts), 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, chart in enumerate(charts, start=1):
        axes = figure.add_subplot(1, len(charts), column)
        for ladder in ladders:
            x, y = points(chart, ladder)
            axes.plot(x, y, marker="o", markersize=4, label=ladder.name)
        axes.set_yscale("log")
        axes.set_xlabel(chart.x_label)
        axes.set_title(chart.title)
        axes.grid(visible=True, alpha=0.3)
    if charts:
        figure.axes[0].legend(fontsize="small")
    figure.suptitle(title)
    picture = BytesIO()
    figure.savefig(picture, format=file_format, dpi=150)
    return picture.getvalue()
