"""A load test as one HTML file that needs nothing else: no network, no script, plots inline.

Invariant: every text in it is escaped, so that what a server says in an error cannot become part of the page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined

from llmpilot_loadtester.domain.results import Interval, LatencySummary, StageMetrics, Verdict
from llmpilot_loadtester.domain.spec import ServiceLevel
from llmpilot_loadtester.outputs.number_format import NOTHING, moment, percent, shown
from llmpilot_loadtester.outputs.plots import Axis, Series, line_chart
from llmpilot_loadtester.outputs.run_facts import RunFacts
from llmpilot_loadtester.outputs.stage_report import StageReport
from llmpilot_loadtester.outputs.stage_series import StageSeries

COLOUR_COUNT = 8
_THROUGHPUT = Axis(label="output tokens/s", from_zero=True)
_TIME = Axis(label="seconds since the start of the stage", from_zero=True)
_SHARE = Axis(label="share of values", from_zero=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plot and what stands under it."""

    title: str
    svg: str
    """Empty: nothing to draw."""
    legend: tuple[tuple[str, int, bool], ...] = ()
    """Text, colour and whether the line is dashed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number and its interval, either may be empty."""

    text: str
    interval: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One stage of the page."""

    report: StageReport
    charts: tuple[Chart, ...]
    figures: tuple[tuple[str, tuple[Cell, ...]], ...]
    """Latencies: name and cells."""
    throughput: tuple[tuple[str, str], ...]


def html_report(facts: RunFacts, reports: Sequence[StageReport]) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("llmpilot_loadtester.outputs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "percent": percent, "moment": moment}
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        reports=reports,
        headline=_headline(facts, reports),
        verdicts=_verdicts(reports),
        limits=_limits(facts.service_level),
        charts=[chart for chart in _charts(reports) if chart.svg],
        sections=[_section(report) for report in reports],
        latency_columns=_LATENCY_COLUMNS,
        colour_count=COLOUR_COUNT,
    )


def _headline(facts: RunFacts, reports: Sequence[StageReport]) -> list[str]:
    profiles = sorted({report.facts.gpu_profile for report in reports})
    began = [moment(report.facts.start_unix_nanos) for report in reports[:1]]
    return [text for text in (facts.target_url, facts.protocol, *profiles, *began) if text]


def _verdicts(reports: Sequence[StageReport]) -> list[tuple[list[str], Verdict]]:
    """Return every different verdict once, with the stages that got it."""
    verdicts: dict[Verdict, list[str]] = {}
    for report in reports:
        verdicts.setdefault(report.result.verdict, []).append(report.facts.label)
    return [(labels, verdict) for verdict, labels in verdicts.items()]


def _limits(level: ServiceLevel) -> str:
    named = (
        ("TTFT", level.ttft_ms),
        ("nTTFT", level.nttft_ms),
        ("ITL", level.itl_ms),
        ("TPOT", level.tpot_ms),
        ("end to end", level.end_to_end_ms),
    )
    texts = [f"{name} {shown(limit)} ms" for name, limit in named if limit is not None]
    return f"{', '.join(texts)} for {percent(level.share)} of the requests" if texts else ""


def _charts(reports: Sequence[StageReport]) -> list[Chart]:
    distributions = [
        _distribution("Time to first token", reports, lambda series: series.ttft_ms),
        _distribution("Inter-token latency", reports, lambda series: series.itl_ms),
        _distribution("End-to-end latency", reports, lambda series: series.end_to_end_ms),
    ]
    if len(reports) == 1:
        return distributions
    return [
        _against_throughput("Time to first token", "TTFT, ms", reports, lambda metrics: metrics.ttft),
        _against_throughput("Inter-token latency", "ITL, ms", reports, lambda metrics: metrics.itl),
        *distributions,
    ]


def _against_throughput(
    title: str, y_label: str, reports: Sequence[StageReport], latency: Callable[[StageMetrics], LatencySummary]
) -> Chart:
    x = np.array([report.result.metrics.output_tokens_per_second for report in reports])
    labels = tuple(_short(report) for report in reports)
    hollow = tuple(not report.result.verdict.is_valid for report in reports)
    summaries = [latency(report.result.metrics) for report in reports]
    lines = [
        Series(
            x=x, y=_numbers([summary.p95_ms for summary in summaries]), label="p95", colour=1, dashed=True,
            point_labels=labels, hollow=hollow,
        ),
        Series(
            x=x, y=_numbers([summary.median_ms for summary in summaries]), label="median", point_labels=labels,
            hollow=hollow,
        ),
    ]  # fmt: skip
    return Chart(
        title=f"{title} against throughput",
        svg=line_chart(_THROUGHPUT, Axis(label=y_label, may_be_log=True, from_zero=True), lines),
        legend=(("median", 0, False), ("p95", 1, True), *([("hollow: not valid", 0, False)] if any(hollow) else [])),
    )


def _distribution(
    title: str, reports: Sequence[StageReport], curve: Callable[[StageSeries], npt.NDArray[np.float64]]
) -> Chart:
    lines, legend = [], []
    for number, report in enumerate(reports):
        values = curve(report.series)
        if len(values):
            label, colour = report.facts.label, number % COLOUR_COUNT
            lines.append(Series(x=values, y=report.series.shares, label=label, colour=colour))
            legend.append((label, colour, False))
    svg = line_chart(Axis(label="ms", may_be_log=True), _SHARE, lines)
    return Chart(title=f"{title}: distribution", svg=svg, legend=tuple(legend))


def _section(report: StageReport) -> Section:
    series, metrics = report.series, report.result.metrics
    window = series.window_seconds
    under_way = Series(x=series.bin_seconds, y=series.in_flight)
    tokens = Series(x=series.bin_seconds, y=series.tokens_per_second, colour=2)
    first = Series(x=series.sent_seconds, y=series.sent_ttft_ms, colour=1, dots=True)
    ttft_axis = Axis(label="TTFT, ms", may_be_log=True, from_zero=True)
    charts = (
        Chart(
            title="Requests under way",
            svg=line_chart(_TIME, Axis(label="requests", from_zero=True), [under_way], window=window),
        ),
        Chart(
            title="Output tokens per second",
            svg=line_chart(_TIME, Axis(label="tokens/s", from_zero=True), [tokens], window=window),
        ),
        Chart(title="Time to first token, by send time", svg=line_chart(_TIME, ttft_axis, [first], window=window)),
    )
    return Section(
        report=report,
        charts=tuple(chart for chart in charts if chart.svg),
        figures=_figures(metrics),
        throughput=_throughput(metrics),
    )


_LATENCY_COLUMNS = ("values", "mean", "median", "p90", "p95", "p99", "max")


def _figures(metrics: StageMetrics) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    named = (
        ("time to first token", metrics.ttft),
        ("the same, from schedule", metrics.ttft_from_schedule),
        ("TTFT per input token", metrics.nttft),
        ("inter-token latency", metrics.itl),
        ("gap between chunks", metrics.chunk_gap),
        ("time per output token", metrics.tpot),
        ("end to end", metrics.end_to_end),
        ("the same, from schedule", metrics.end_to_end_from_schedule),
        ("end to end per output token", metrics.normalized_latency),
        ("first byte", metrics.first_byte),
        ("send lateness", metrics.send_lateness),
    )
    return tuple((name, _cells(summary)) for name, summary in named if summary.count)


def _cells(summary: LatencySummary) -> tuple[Cell, ...]:
    return (
        Cell(f"{summary.count:,}"),
        _with_interval(summary.mean_ms, summary.mean_interval),
        _with_interval(summary.median_ms, summary.median_interval),
        Cell(shown(summary.p90_ms)),
        _with_interval(summary.p95_ms, summary.p95_interval),
        _with_interval(summary.p99_ms, summary.p99_interval),
        Cell(shown(summary.max_ms)),
    )


def _with_interval(value: float | None, interval: Interval | None) -> Cell:
    return Cell(shown(value), f"{shown(interval.low)} to {shown(interval.high)}" if interval else "")


def _throughput(metrics: StageMetrics) -> tuple[tuple[str, str], ...]:
    steady = {None: "too few requests to tell", True: "yes", False: "no: throughput or TTFT had a trend"}
    return (
        ("measured window", shown(metrics.window_seconds, "s")),
        ("requests sent", f"{metrics.request_count:,}"),
        ("failed", f"{metrics.error_count:,} ({percent(metrics.error_rate)})"),
        ("sent per second", shown(metrics.sent_per_second)),
        ("CV of the gaps between sends", shown(metrics.send_gap_cv)),
        ("ended per second", shown(metrics.requests_per_second)),
        ("output tokens/s", shown(metrics.output_tokens_per_second)),
        ("input tokens/s", shown(metrics.input_tokens_per_second)),
        ("goodput, requests/s", shown(metrics.goodput_requests_per_second)),
        ("within the limits", percent(metrics.good_share)),
        ("mean input tokens", shown(metrics.input_tokens_mean)),
        ("mean output tokens", shown(metrics.output_tokens_mean)),
        ("mean requests under way", shown(metrics.concurrency_mean)),
        ("steady", steady[metrics.steady]),
        ("output tokens counted by", ", ".join(metrics.token_count_sources) or NOTHING),
        ("arrivals stamped by", ", ".join(source.replace("_", " ") for source in metrics.stamp_sources) or NOTHING),
    )


def _short(report: StageReport) -> str:
    users = report.facts.stage.load.most_users
    return report.facts.label if users is None else f"{users}"


def _numbers(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
