"""Two or more load tests side by side: what differs, by how much, and how sure that is.

Invariant: a difference is told only where its 95 % bootstrap interval leaves 0 out; else none was seen. The intervals
are of the noise within the runs: another run of the same server may differ by more.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.metrics import arrived_in
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.window import Window
from llmpilot_loadtester.outputs.number_format import percent, shown
from llmpilot_loadtester.outputs.records_file import RecordsFile
from llmpilot_loadtester.outputs.resampling import (
    grouped_quantile_replicates,
    quantile_replicates,
    rate_replicates,
    share_replicates,
)
from llmpilot_loadtester.outputs.run_facts import StageFacts, newest_attempts
from llmpilot_loadtester.outputs.stage_series import chunk_gaps_ms

Values = npt.NDArray[np.float64]

FEWEST_REQUESTS = 10
"""Fewer successful requests give no interval."""
_INTERVAL = (0.025, 0.975)
_ITL_SHARES = (0.5, 0.95)
_WHOLE_FROM = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of one stage, and its bootstrap replicates."""

    metric: str
    unit: str
    value: float
    replicates: Values
    """Empty: too few requests."""
    more_is_better: bool = False
    is_share: bool = False
    """Compared by points, as a share may be 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A number of a stage against the same of the first file."""

    metric: str
    unit: str
    first: float
    other: float
    change: float | None
    """Relative, of shares absolute; None: the first is 0."""
    low: float | None
    """Of the 95 % interval of `change`; None: too few requests."""
    high: float | None
    more_is_better: bool
    is_share: bool

    @property
    def is_seen(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def is_better(self) -> bool | None:
        """Whether the other is better; None: no difference was seen."""
        return (self.change is not None and (self.change > 0) == self.more_is_better) if self.is_seen else None

    def sentence(self) -> str:
        """Say it with its interval."""
        if self.change is None or self.low is None or self.high is None:
            return "too few requests to tell" if self.change is not None or self.first else "not to be compared with 0"
        unit = "points" if self.is_share else "%"
        interval = f"[{_signed(100 * self.low)}, {_signed(100 * self.high)}] {unit}"
        if not self.is_seen:
            return f"no difference seen {interval}"
        return f"{shown(100 * abs(self.change))} {unit} {'higher' if self.change > 0 else 'lower'} {interval}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageComparison:
    """A load in all files."""

    load: str
    doubts: tuple[str, ...]
    """By file whose numbers are not valid, why."""
    differences: tuple[tuple[Difference, ...], ...]
    """By file after the first: a difference per metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All loads that all files have, and those that only some have."""

    stages: tuple[StageComparison, ...]
    unmatched: tuple[str, ...]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Name each file by its stem, else by its folder where stems repeat, else by its whole path."""
    for names in ([path.stem for path in paths], [path.absolute().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def compare(files: Sequence[RecordsFile], *, seed: int = 0) -> Comparison:
    """Compare the later files with the first, stage by stage; stages belong together whose loads are the same."""
    names = names_of([file.path for file in files])
    stages = [_by_load(file) for file in files]
    shared = [load for load in stages[0] if all(load in other for other in stages[1:])]
    compared = [
        _stage_comparison(
            load[0], files, names, [of_file[load] for of_file in stages], np.random.default_rng([seed, number])
        )
        for number, load in enumerate(shared)
    ]
    return Comparison(
        stages=tuple(compared),
        unmatched=tuple(
            f"{name}: {load[0]}"
            for name, of_file in zip(names, stages, strict=True)
            for load in of_file
            if load not in shared
        ),
    )


def _by_load(file: RecordsFile) -> dict[tuple[str, int], StageFacts]:
    """Return stages by load; the same load a second time is another one."""
    seen: Counter[str] = Counter()
    by_load = {}
    for facts in newest_attempts(file.stages):
        label = facts.stage.load.label
        by_load[label, seen[label]] = facts
        seen[label] += 1
    return by_load


def _stage_comparison(
    load: str,
    files: Sequence[RecordsFile],
    names: Sequence[str],
    stages: Sequence[StageFacts],
    generator: np.random.Generator,
) -> StageComparison:
    figures = [
        {figure.metric: figure for figure in stage_figures(file.records(facts), facts.window, generator)}
        for file, facts in zip(files, stages, strict=True)
    ]
    first = figures[0]
    return StageComparison(
        load=load,
        doubts=tuple(
            f"{name} is not valid: {'; '.join(facts.verdict.reasons)}"
            for name, facts in zip(names, stages, strict=True)
            if not facts.verdict.is_valid
        ),
        differences=tuple(
            tuple(difference(first[metric], other[metric]) for metric in first if metric in other)
            for other in figures[1:]
        ),
    )


def stage_figures(records: RecordBatch, window: Window, generator: np.random.Generator) -> Iterator[Figure]:
    """Yield what a stage is compared by, each with its replicates."""
    sent = records.take(window.holds(records.send_nanos))
    ok = sent.take(sent.is_ok & (np.diff(sent.chunk_starts) > 0))
    is_enough = len(ok) >= FEWEST_REQUESTS
    if len(ok):
        first = ok.chunk_nanos[ok.chunk_starts[:-1]]
        ttft, whole = (first - ok.send_nanos) / 1e6, (ok.end_nanos - ok.send_nanos) / 1e6
        for metric, values, share in (
            ("TTFT median", ttft, 0.5),
            ("TTFT p95", ttft, 0.95),
            ("end to end median", whole, 0.5),
        ):
            replicates = quantile_replicates(values, share, generator) if is_enough else np.empty(0)
            yield Figure(metric=metric, unit="ms", value=float(np.quantile(values, share)), replicates=replicates)
        yield from _itl_figures(ok, generator, is_enough=is_enough)
    yield from _rate_figures(records, window, generator, is_enough=is_enough)
    if len(sent):
        yield Figure(
            metric="error rate",
            unit="",
            value=float(1 - sent.is_ok.mean()),
            replicates=share_replicates(~sent.is_ok, generator) if len(sent) >= FEWEST_REQUESTS else np.empty(0),
            is_share=True,
        )


def _itl_figures(ok: RecordBatch, generator: np.random.Generator, *, is_enough: bool) -> Iterator[Figure]:
    gaps_ms, later = chunk_gaps_ms(ok)
    if not len(gaps_ms):
        return
    tokens = ok.chunk_tokens[later]
    owners = np.repeat(np.searchsorted(ok.chunk_starts, later, side="right") - 1, tokens)
    values = np.repeat(gaps_ms / tokens, tokens)
    replicates = (
        grouped_quantile_replicates(values, owners, _ITL_SHARES, generator)
        if is_enough
        else np.empty((0, len(_ITL_SHARES)))
    )
    for column, (metric, share) in enumerate(zip(("ITL median", "ITL p95"), _ITL_SHARES, strict=True)):
        value = float(np.quantile(values, share))
        yield Figure(metric=metric, unit="ms", value=value, replicates=replicates[:, column])


def _rate_figures(
    records: RecordBatch, window: Window, generator: np.random.Generator, *, is_enough: bool
) -> Iterator[Figure]:
    ok = records.take(records.is_ok)
    ended = ok.end_nanos[window.holds(ok.end_nanos)]
    arrived = arrived_in(records, window)
    bounds = (window.from_nanos, window.until_nanos)
    for metric, unit, moments, weights in (
        ("output tokens/s", "tokens/s", records.chunk_nanos[arrived], records.chunk_tokens[arrived]),
        ("requests/s", "requests/s", ended, np.ones(len(ended), np.int64)),
    ):
        yield Figure(
            metric=metric,
            unit=unit,
            value=float(weights.sum() / window.seconds),
            replicates=rate_replicates(moments, weights, bounds, generator) if is_enough else np.empty(0),
            more_is_better=True,
        )


def difference(first: Figure, other: Figure) -> Difference:
    """Return how the other figure differs from the first."""
    low = high = None
    if len(first.replicates) and len(other.replicates):
        if first.is_share:
            changes = other.replicates - first.replicates
        elif first.value > 0 and (first.replicates > 0).all():
            changes = other.replicates / first.replicates - 1
        else:
            changes = np.empty(0)
        if len(changes):
            low, high = np.quantile(changes, _INTERVAL).tolist()
    relative = other.value / first.value - 1 if first.value > 0 else None
    return Difference(
        metric=first.metric,
        unit=first.unit,
        first=first.value,
        other=other.value,
        change=other.value - first.value if first.is_share else relative,
        low=low,
        high=high,
        more_is_better=first.more_is_better,
        is_share=first.is_share,
    )


def _signed(value: float) -> str:
    return f"{value:+.2g}" if abs(value) < _WHOLE_FROM else f"{value:+,.0f}"


def shown_value(value: float, difference_: Difference) -> str:
    """Return a value of a difference with its unit."""
    return percent(value) if difference_.is_share else shown(value, difference_.unit)
