"""Pictures of a workload model: marginal CDFs as in Fig. 6, and the correlations of Fig. 3, Lazuka et al., 2024.

Invariant: the empirical curves are the sketches and the model's are the centres of the bins, so that what binning loses
can be seen.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from llmpilot_workload_generator.model import Floats, Kind, Parameter, WorkloadModel
from llmpilot_workload_generator.statistics import Description, Marginal, describe

FORMATS = ("png", "svg")
DOTS_PER_INCH = 150
SHOWN_CATEGORIES = 12
_WIDE = 50
"""A range whose ends differ by this factor is drawn on a logarithmic axis."""
_FEW = 6
"""Of so few different values each gets a tick."""
_LABELS: Mapping[str, str] = {"batch_size": "batch size, prompts", "is_greedy": "greedy: 1, sampling: 0"}
_EMPIRICAL, _MODEL = "#8fb8de", "#b3202c"


def model_figures(model: WorkloadModel, *, title: str) -> Mapping[str, bytes]:
    """Return the pictures by file name: cdf.png, cdf.svg, correlations.png, correlations.svg.

    There are no correlations where fewer than two parameters are numbers.
    """
    description = describe(model)
    drawings = {"cdf": _cdf_figure(model, description, title)}
    if len(_correlated(description)) > 1:
        drawings["correlations"] = _correlation_figure(description, title)
    return {f"{name}.{form}": _picture(figure, form) for name, figure in drawings.items() for form in FORMATS}


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 half a second, only for a picture
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _picture(figure: Any, form: str) -> bytes:
    content = BytesIO()
    figure.savefig(content, format=form, dpi=DOTS_PER_INCH)
    return content.getvalue()


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _cdf_figure(model: WorkloadModel, description: Description, title: str) -> Any:
    count = len(model.parameters)
    columns = min(count, 2 if count <= 4 else 4)  # noqa: PLR2004 two rows as long as they are readable
    rows = -(-count // columns)
    figure = _figure(3.6 * columns + 0.4, 3.0 * rows + 0.9)
    for place, (parameter, marginal) in enumerate(zip(model.parameters, description.marginals, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, place)
        if parameter.kind is Kind.CATEGORY:
            _draw_categories(axes, parameter)
        else:
            _draw_cdf(axes, parameter, marginal)
            if (place - 1) % columns == 0:
                axes.set_ylabel("share of requests ≤ x")
    curves = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles, labels = max(curves, key=lambda found: len(found[0]))
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}: marginal distributions of {description.request_count:,} requests", parse_math=False)
    return figure


def _draw_cdf(axes: Any, parameter: Parameter, marginal: Marginal) -> None:
    sketch = parameter.sketch
    held = marginal.counts > 0
    _draw_steps(axes, sketch.values, sketch.counts, color=_EMPIRICAL, linewidth=4, label="empirical")
    centres, counts = marginal.centres[held], marginal.counts[held]
    _draw_steps(axes, centres, counts, color=_MODEL, linewidth=1.1, label="model: the means of its bins")
    axes.set_xlabel(_label(parameter.name), parse_math=False)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(visible=True, alpha=0.3)
    if len(sketch.values) <= _FEW:
        axes.set_xticks(sketch.values, [f"{value:,.10g}" for value in sketch.values])
        return
    _scale(axes, sketch.low, sketch.high, smallest_above_zero=_smallest_above_zero(sketch.values))


def _draw_steps(axes: Any, values: Floats, counts: Any, **style: Any) -> None:
    below = np.cumsum(counts) / counts.sum()
    axes.step(np.concatenate([values[:1], values]), np.concatenate([[0.0], below]), where="post", **style)


def _smallest_above_zero(values: Floats) -> float:
    return float(values[values > 0].min(initial=np.inf))


def _scale(axes: Any, low: float, high: float, *, smallest_above_zero: float) -> None:
    """Choose a logarithmic axis for wide ranges, straight around 0 where that occurs; plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: PLC0415

    if low < 0 or high < _WIDE * smallest_above_zero or high < _WIDE:
        margin = (high - low) * 0.03 or 0.5
        axes.set_xlim(low - margin, high + margin)
        return
    if low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
    else:
        axes.set_xscale("symlog", linthresh=smallest_above_zero, linscale=0.3)
        axes.set_xlim(-0.15 * smallest_above_zero, high * 1.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_categories(axes: Any, parameter: Parameter) -> None:
    """Draw the most frequent categories as bars; a CDF of what has no order says nothing."""
    sketch = parameter.sketch
    order = np.argsort(-sketch.counts, kind="stable")[:SHOWN_CATEGORIES]
    names = [_shortened(parameter.bins.categories[int(sketch.values[index])]) for index in order]
    shares = sketch.counts[order] / sketch.total
    places = np.arange(len(order))
    axes.barh(places, shares, color=_EMPIRICAL)
    axes.set_yticks(places, names, fontsize="small", parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, float(shares.max()) * 1.1)
    axes.grid(visible=True, axis="x", alpha=0.3)
    left_out = len(order) < len(sketch.values)
    rarer = f", the {len(order)} most frequent of {len(sketch.values):,}" if left_out else ""
    axes.set_title(f"{_label(parameter.name)}{rarer}", fontsize="medium", parse_math=False)
    axes.set_xlabel("share of requests")


def _shortened(text: str) -> str:
    longest = 24
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _correlated(description: Description) -> list[int]:
    """Return the parameters that are correlated with themselves: of more than one value, and not categorical."""
    return [index for index in range(len(description.marginals)) if description.spearman[index][index] is not None]


def _correlation_figure(description: Description, title: str) -> Any:
    shown = _correlated(description)
    names = [description.marginals[index].name.replace("_", " ") for index in shown]
    values = np.array([[description.spearman[row][column] for column in shown] for row in shown], np.float64)
    size = 0.75 * len(shown) + 2.6
    figure = _figure(size + 0.5, size - 0.5)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    places = range(len(shown))
    axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.tick_params(length=0)
    for row in places:
        for column in places:
            value = float(values[row, column])
            value = round(value, 2) + 0.0
            dark = abs(value) > 0.6  # noqa: PLR2004 from here on black is hard to read
            text = f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize="small")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(shown) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(shown) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, shrink=0.8, label="Spearman's correlation")
    figure.suptitle(f"{title}: correlations", parse_math=False)
    return figure
