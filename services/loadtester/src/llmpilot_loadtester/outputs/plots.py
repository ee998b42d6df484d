"""Line charts as SVG text that goes into a page: no library, no script, colours by CSS class.

Invariant: every text in a chart is escaped, and a chart of nothing is an empty text. Classes c0, c1 ... are of series,
`grid`, `axis` and `window` of what their names say; the page gives them colours, so that it may be dark or light.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.outputs.number_format import shown

Values = npt.NDArray[np.float64]

WIDTH, HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 14, 44
_TICK_COUNT = 5
_LOG_RATIO = 20
"""A positive axis whose values span more is logarithmic, if it may."""
_POINT_RADIUS = 4.5
_ROOM = 0.06
_NAME_WIDTH, _NAME_HEIGHT = 24, 13
"""Points nearer to one with a name than this have theirs only in the title."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    x: Values
    y: Values
    """NaN: a gap in the line."""
    label: str = ""
    colour: int = 0
    dashed: bool = False
    point_labels: tuple[str, ...] = ()
    """A text at each point, which then is marked; empty: a bare line."""
    hollow: tuple[bool, ...] = ()
    """Which of the points do not count."""
    dots: bool = False
    """Points without a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis shows."""

    label: str
    may_be_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    is_log: bool
    begin: float
    end: float

    def at(self, values: Values) -> Values:
        scaled = np.log(np.maximum(values, self.low)) if self.is_log else values
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        return np.asarray(self.begin + (scaled - low) / (high - low) * (self.end - self.begin))

    def ticks(self) -> list[float]:
        if not self.is_log:
            return _linear_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 10**3 else (1,)
        return [tick for decade in decades for step in steps if self.low <= (tick := step * 10.0**decade) <= self.high]


def line_chart(
    x_axis: Axis, y_axis: Axis, series: Sequence[Series], *, window: tuple[float, float] | None = None
) -> str:
    """Return an SVG element, or nothing if there is nothing to draw; `window` shades a range of x."""
    finite = [_finite(line) for line in series]
    if not any(len(line.x) for line in finite):
        return ""
    x = _scale(x_axis, np.concatenate([line.x for line in finite]), _LEFT, WIDTH - _RIGHT)
    y = _scale(y_axis, np.concatenate([line.y for line in finite]), HEIGHT - _BOTTOM, _TOP)
    name = escape(f"{y_axis.label} by {x_axis.label}")
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">',
        *_shade(window, x),
        *_axes(x_axis, y_axis, x, y),
    ]
    for line in series:
        parts += _line(line, x, y)
    return "".join([*parts, "</svg>"])


def _finite(line: Series) -> Series:
    known = np.isfinite(line.x) & np.isfinite(line.y)
    return Series(x=line.x[known], y=line.y[known])


def _scale(axis: Axis, values: Values, begin: float, end: float) -> _Scale:
    low, high = float(values.min()), float(values.max())
    is_log = axis.may_be_log and low > 0 and high / low > _LOG_RATIO
    if is_log:
        return _Scale(low / 1.15, high * 1.15, True, begin, end)
    if axis.from_zero:
        low = min(low, 0.0)
    room = (high - low) * _ROOM or max(abs(high), 1.0) * _ROOM
    return _Scale(low if low == 0 and axis.from_zero else low - room, high + room, False, begin, end)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / _TICK_COUNT
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first = math.ceil(low / step)
    return [tick * step for tick in range(first, math.floor(high / step) + 1)]


def _shade(window: tuple[float, float] | None, x: _Scale) -> list[str]:
    if window is None:
        return []
    begin, end = (float(at) for at in np.clip(x.at(np.array(window)), _LEFT, WIDTH - _RIGHT))
    return [
        f'<rect class="window" x="{begin:.1f}" y="{_TOP}" width="{end - begin:.1f}" height="{HEIGHT - _BOTTOM - _TOP}">'
        "<title>measured window</title></rect>"
    ]


def _axes(x_axis: Axis, y_axis: Axis, x: _Scale, y: _Scale) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = float(y.at(np.array([tick]))[0])
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:,.10g}</text>')
    for tick in x.ticks():
        at = float(x.at(np.array([tick]))[0])
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,.10g}</text>')
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return [
        *parts,
        f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>',
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_axis.label)}</text>',
        f'<text transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}</text>',
    ]


def _line(line: Series, x: _Scale, y: _Scale) -> list[str]:
    known = np.isfinite(line.x) & np.isfinite(line.y)
    across, down = x.at(line.x), y.at(line.y)
    name = f"<title>{escape(line.label)}</title>" if line.label else ""
    if line.dots:
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(across[known], down[known], strict=True))
        return [f'<path class="dots c{line.colour}" d="{dots}">{name}</path>']
    pen_down = np.concatenate([[False], known[:-1]])
    path = "".join(
        f"{'L' if goes_on else 'M'}{a:.1f} {b:.1f}"
        for a, b, goes_on in zip(across[known], down[known], pen_down[known], strict=True)
    )
    style = "line dashed" if line.dashed else "line"
    parts = [f'<path class="{style} c{line.colour}" d="{path}">{name}</path>']
    named: list[tuple[float, float]] = []
    for index, text in enumerate(line.point_labels):
        if known[index]:
            at = (float(across[index]), float(down[index]))
            has_name = not line.dashed and all(
                abs(at[0] - other[0]) > _NAME_WIDTH or abs(at[1] - other[1]) > _NAME_HEIGHT for other in named
            )
            parts += _point(line, index, text, at, has_name=has_name)
            named += [at] * has_name
    return parts


def _point(line: Series, index: int, text: str, at: tuple[float, float], *, has_name: bool) -> list[str]:
    across, down = at
    is_hollow = bool(line.hollow) and line.hollow[index]
    place = "end" if across > WIDTH - _RIGHT - 60 else "start"
    shift = -8 if place == "end" else 8
    title = f"{text}: {shown(float(line.y[index]))} at {shown(float(line.x[index]))}"
    circle = "hollow" if is_hollow else "point"
    name = f'<text class="tag" x="{across + shift:.1f}" y="{down + 15:.1f}" text-anchor="{place}">{escape(text)}</text>'
    return [
        f'<circle class="{circle} c{line.colour}" cx="{across:.1f}" cy="{down:.1f}" r="{_POINT_RADIUS}">'
        f"<title>{escape(title)}{' (not valid)' if is_hollow else ''}</title></circle>",
        *[name] * has_name,
    ]
