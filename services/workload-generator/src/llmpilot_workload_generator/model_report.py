"""What `llm-pilot workload describe|compare|profiles` show: tables for people, JSON for programs.

Invariant: the JSON holds all that the tables show, unrounded.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Kind, WorkloadModel
from llmpilot_workload_generator.profiles import DESCRIPTIONS
from llmpilot_workload_generator.statistics import Comparison, Description, Distance, Marginal

SHOWN_CATEGORIES = 3
NARROWEST_TERMINAL = 80
COLUMN_GAP = 2
WIDTH_OFF_TERMINAL = 120
_UNKNOWN = "-"

Json = dict[str, Any]


def print_description(model: WorkloadModel, description: Description, *, console: Console | None = None) -> None:
    """Print what `describe` found in a model."""
    _print(description_report(model, description), console)


def print_comparison(comparison: Comparison, *, names: tuple[str, str], console: Console | None = None) -> None:
    """Print what `compare` found; `names` are what to call the two models."""
    _print(comparison_report(comparison, names=names), console)


def print_profiles(profiles: Mapping[str, WorkloadModel], *, console: Console | None = None) -> None:
    """Print what the profiles are and where they come from."""
    _print([profile_table(profiles)], console)


def description_report(model: WorkloadModel, description: Description) -> list[RenderableType]:
    """Return what is known of a model: where it comes from, its marginals, correlations and entropy."""
    report: list[RenderableType] = [
        Text("\n".join(_origin_lines(model))),
        "",
        _marginal_table(description.marginals),
    ]
    report += _category_lines(model, description.marginals)
    if any(value is not None for row in description.spearman for value in row):
        for abreast in _abreast([marginal.name for marginal in description.marginals]):
            report += ["", _correlation_table(description, abreast)]
    report += [
        "",
        Text(
            f"entropy {description.entropy_bits:.3f} bits; of the parameters one by one"
            f" {description.marginal_entropy_bits:.3f} bits; total correlation"
            f" {description.total_correlation_bits:.3f} bits"
        ),
    ]
    return report


def comparison_report(comparison: Comparison, *, names: tuple[str, str]) -> list[RenderableType]:
    """Return how far two models are apart."""
    titles = names if names[0] != names[1] else (f"{names[0]} (1)", f"{names[1]} (2)")
    counts = " and ".join(
        f"{title}: {count:,} requests" for title, count in zip(titles, comparison.request_counts, strict=True)
    )
    report: list[RenderableType] = [Text(counts), "", _distance_table(comparison.distances, titles)]
    if comparison.correlations:
        report += ["", _difference_table(comparison, titles)]
    for title, only in zip(titles, (comparison.only_first, comparison.only_second), strict=True):
        if only:
            report.append(Text(f"only {title} has {', '.join(only)}"))
    return report


def profile_table(profiles: Mapping[str, WorkloadModel]) -> Table:
    """Return one row for each profile."""
    table = Table("profile", "what it is", box=box.SIMPLE_HEAD)
    for name, model in profiles.items():
        lines = (
            DESCRIPTIONS[name],
            f"parameters: {', '.join(model.names)}",
            f"arrivals: {arrival_words(model.arrivals)}",
            f"source: {model.provenance.source}; {model.provenance.licence}",
        )
        table.add_row(name, Text("\n".join((*lines, ""))))
    return table


def arrival_words(arrivals: Arrivals) -> str:
    """Return an arrival process in words."""
    match arrivals.kind:
        case ArrivalKind.CONSTANT | ArrivalKind.POISSON:
            return f"{arrivals.kind.value}, {arrivals.rate_per_second:g}/s"
        case ArrivalKind.GAMMA:
            return f"gamma, {arrivals.rate_per_second:g}/s, burstiness {arrivals.burstiness:g}"
        case ArrivalKind.TRACE if arrivals.speed != 1:
            return f"as in the trace, {arrivals.speed:g} times as fast"
        case ArrivalKind.TRACE:
            return "as in the trace"
        case ArrivalKind.CLOSED:
            return "closed loop"
        case ArrivalKind.ALL_AT_ONCE:
            return "all at once"


def description_json(model: WorkloadModel, description: Description) -> Json:
    """Return a description for `json.dumps`."""
    provenance = model.provenance
    return {
        "source": provenance.source,
        "licence": provenance.licence,
        "command": provenance.command,
        "row_count": provenance.row_count,
        "skipped_row_count": provenance.skipped_row_count,
        "first_time": provenance.first_time.isoformat() if provenance.first_time else None,
        "last_time": provenance.last_time.isoformat() if provenance.last_time else None,
        "arrivals": {
            "kind": model.arrivals.kind.value,
            "rate_per_second": model.arrivals.rate_per_second,
            "burstiness": model.arrivals.burstiness,
            "speed": model.arrivals.speed,
        },
        "replay_request_count": len(model.replay) if model.replay is not None else 0,
        "request_count": description.request_count,
        "cell_count": description.cell_count,
        "marginals": [_marginal_json(marginal) for marginal in description.marginals],
        "spearman": {
            marginal.name: dict(zip(model.names, row, strict=True))
            for marginal, row in zip(description.marginals, description.spearman, strict=True)
        },
        "entropy_bits": description.entropy_bits,
        "marginal_entropy_bits": description.marginal_entropy_bits,
        "total_correlation_bits": description.total_correlation_bits,
    }


def comparison_json(comparison: Comparison) -> Json:
    """Return a comparison for `json.dumps`."""
    return {
        "request_counts": list(comparison.request_counts),
        "distances": [
            {
                "parameter": distance.name,
                "kind": distance.kind.value,
                "distance": distance.distance,
                "critical_5_percent": distance.critical,
                "means": list(distance.means) if distance.means else None,
            }
            for distance in comparison.distances
        ],
        "spearman": [
            {"parameter": one.name, "other_parameter": one.other_name, "first": one.first, "second": one.second}
            for one in comparison.correlations
        ],
        "only_first": list(comparison.only_first),
        "only_second": list(comparison.only_second),
    }


def number_text(value: float | None) -> str:
    """Return a number with four digits, or whole from 1,000 on."""
    if value is None:
        return _UNKNOWN
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"  # noqa: PLR2004 four digits


def _print(report: Iterable[RenderableType], console: Console | None) -> None:
    target = console or Console(width=None if sys.stdout.isatty() else WIDTH_OFF_TERMINAL, highlight=False)
    for part in report:
        target.print(part)


def _origin_lines(model: WorkloadModel) -> list[str]:
    provenance = model.provenance
    times = (provenance.first_time, provenance.last_time)
    facts = {
        "source": provenance.source,
        "licence": provenance.licence,
        "made by": provenance.command,
        "period": " to ".join(f"{time:%Y-%m-%d %H:%M:%S %Z}".strip() for time in times if time),
        "requests": f"{model.request_count:,} in {len(model.keys):,} cells",
        "left out": f"{provenance.skipped_row_count:,} failed requests" if provenance.skipped_row_count else "",
        "kept": f"{len(model.replay):,} requests in their order, to replay" if model.replay is not None else "",
        "arrivals": arrival_words(model.arrivals),
    }
    return [f"{name + ':':10}{text}" for name, text in facts.items() if text]


def _table(title: str, first: str, columns: Iterable[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


def _correlation_text(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{round(value, 3) + 0.0:.3f}"


def _marginal_table(marginals: Sequence[Marginal]) -> Table:
    columns = ("bins", "values", "min", "mean", "median", "p90", "p99", "max", "entropy, bits")
    table = _table("Marginal distributions", "parameter", columns)
    for marginal in marginals:
        is_category = marginal.kind is Kind.CATEGORY
        ends = [None if is_category else end for end in (marginal.low, marginal.high)]
        numbers = (ends[0], marginal.mean, marginal.median, marginal.p90, marginal.p99, ends[1])
        table.add_row(
            Text(marginal.name),
            str(len(marginal.counts)),
            f"{marginal.distinct_count:,}",
            *map(number_text, numbers),
            f"{marginal.entropy_bits:.3f}",
        )
    return table


def _category_lines(model: WorkloadModel, marginals: Sequence[Marginal]) -> list[Text]:
    """Return the most frequent categories of each parameter that has some."""
    lines = []
    for parameter, marginal in zip(model.parameters, marginals, strict=True):
        if parameter.kind is Kind.CATEGORY:
            sketch = parameter.sketch
            order = sketch.counts.argsort(kind="stable")[::-1][:SHOWN_CATEGORIES]
            shares = [
                f"{parameter.bins.categories[int(sketch.values[index])]!r} {sketch.counts[index] / sketch.total:.1%}"
                for index in order
            ]
            more = len(sketch.values) - len(order)
            lines.append(Text(f"{marginal.name}: {', '.join(shares)}{f' and {more:,} more' if more else ''}"))
    return lines


def _abreast(names: Sequence[str]) -> Iterator[slice]:
    """Yield the columns of each table of correlations, so that it is no wider than the narrowest terminal."""
    first_width = COLUMN_GAP + max(map(len, names))
    start, width = 0, first_width
    for place, name in enumerate(names):
        needed = COLUMN_GAP + max(len("-0.123"), *map(len, name.split("_")))
        if place > start and width + needed > NARROWEST_TERMINAL:
            yield slice(start, place)
            start, width = place, first_width
        width += needed
    yield slice(start, len(names))


def _correlation_table(description: Description, abreast: slice) -> Table:
    """Return the correlations of all parameters with some."""
    names = [marginal.name for marginal in description.marginals]
    table = _table("Spearman's correlations", "", [name.replace("_", "\n") for name in names[abreast]])
    for name, row in zip(names, description.spearman, strict=True):
        table.add_row(Text(name), *map(_correlation_text, row[abreast]))
    return table


def _distance_table(distances: Sequence[Distance], titles: tuple[str, str]) -> Table:
    columns = ("distance", "5 % critical", "", f"mean, {titles[0]}", f"mean, {titles[1]}")
    table = _table("Distributions: KS distance; of categories, total variation", "parameter", columns)
    for one in distances:
        critical = _UNKNOWN if one.critical is None else f"{one.critical:.4f}"
        verdict = "" if one.critical is None else ("differ" if one.distance > one.critical else "alike")
        means = map(number_text, one.means or (None, None))
        table.add_row(Text(one.name), f"{one.distance:.4f}", critical, verdict, *means)
    return table


def _difference_table(comparison: Comparison, titles: tuple[str, str]) -> Table:
    table = _table("Spearman's correlations", "", (*titles, "difference"))
    for one in comparison.correlations:
        values = (one.first, one.second, one.second - one.first)
        table.add_row(Text(f"{one.name}, {one.other_name}"), *map(_correlation_text, values))
    return table


def _marginal_json(marginal: Marginal) -> Json:
    is_category = marginal.kind is Kind.CATEGORY
    return {
        "parameter": marginal.name,
        "kind": marginal.kind.value,
        "distinct_count": marginal.distinct_count,
        "min": None if is_category else marginal.low,
        "mean": marginal.mean,
        "median": marginal.median,
        "p90": marginal.p90,
        "p99": marginal.p99,
        "max": None if is_category else marginal.high,
        "entropy_bits": marginal.entropy_bits,
        "categories": list(marginal.categories),
        "bins": [
            {"low": low, "high": high, "centre": centre, "count": count}
            for low, high, centre, count in zip(
                marginal.lows.tolist(),
                marginal.highs.tolist(),
                marginal.centres.tolist(),
                marginal.counts.tolist(),
                strict=True,
            )
        ],
    }
