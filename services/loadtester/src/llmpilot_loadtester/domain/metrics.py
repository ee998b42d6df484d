"""The metrics of a stage, from its records.

Invariant: latencies are of the successful requests that were sent in the window; throughput is of what arrived in it.
METRICS.md defines each.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.record_schema import STAMP_SOURCES, STATUSES, TOKEN_COUNT_SOURCES
from llmpilot_loadtester.domain.bootstrap import Bootstrap, Floats, Sample
from llmpilot_loadtester.domain.records import UNKNOWN, Integers, RecordBatch
from llmpilot_loadtester.domain.results import ErrorCount, LatencySummary, StageMetrics
from llmpilot_loadtester.domain.spec import ServiceLevel
from llmpilot_loadtester.domain.steady_state import is_steady
from llmpilot_loadtester.domain.window import Window

NANOS_PER_MS = 1e6
LEAST_SENDS_FOR_VARIATION = 3
_CANCELLED = STATUSES.index("cancelled")
Mask = npt.NDArray[np.bool_]


def stage_metrics(records: RecordBatch, window: Window, service_level: ServiceLevel, *, seed: int) -> StageMetrics:
    """Return the metrics of all records of a stage, with times relative to its start; `seed` is of the intervals."""
    sent = records.take(_in_order_of_sending(records, window))
    ok = sent.take(sent.is_ok & (np.diff(sent.chunk_starts) > 0))
    latencies = _latencies_of(ok)
    gaps = _gaps_of(ok)
    summaries = _Summaries(seed)
    chunk_gap = summaries.of(gaps.gap_ms, requests=gaps.requests)
    is_token_a_chunk = bool((gaps.tokens == 1).all())
    good_count = _good_count(ok, latencies, gaps, service_level)
    arrivals = _arrivals_of(records, window)
    lateness_ms = (sent.send_nanos - sent.scheduled_nanos) / NANOS_PER_MS
    has_first_byte = ok.first_byte_nanos != UNKNOWN
    first_byte_ms = (ok.first_byte_nanos - ok.send_nanos)[has_first_byte] / NANOS_PER_MS
    several = ok.output_tokens > 1
    return StageMetrics(
        window_seconds=window.seconds,
        request_count=len(sent),
        ok_count=len(ok),
        errors=_errors_of(sent),
        ttft=summaries.of(latencies.ttft_ms),
        ttft_from_schedule=summaries.of(latencies.ttft_ms + latencies.lateness_ms),
        nttft=summaries.of(latencies.nttft_ms[~np.isnan(latencies.nttft_ms)]),
        itl=chunk_gap
        if is_token_a_chunk
        else summaries.of(gaps.gap_ms / gaps.tokens, requests=gaps.requests, weights=gaps.tokens),
        chunk_gap=chunk_gap,
        tpot=summaries.of(latencies.tpot_ms[several]),
        end_to_end=summaries.of(latencies.end_to_end_ms),
        end_to_end_from_schedule=summaries.of(latencies.end_to_end_ms + latencies.lateness_ms),
        normalized_latency=summaries.of(latencies.end_to_end_ms / ok.output_tokens),
        send_lateness=summaries.of(lateness_ms),
        first_byte=summaries.of(first_byte_ms),
        requests_per_second=arrivals.request_count / window.seconds,
        output_tokens_per_second=float(arrivals.token_counts.sum()) / window.seconds,
        input_tokens_per_second=None if arrivals.input_tokens is None else arrivals.input_tokens / window.seconds,
        sent_per_second=len(sent) / window.seconds,
        send_gap_cv=_gap_variation(sent.send_nanos),
        goodput_requests_per_second=None if good_count is None else good_count / window.seconds,
        good_share=None if good_count is None or not len(sent) else good_count / len(sent),
        input_tokens_mean=_mean(ok.input_tokens[ok.input_tokens != UNKNOWN]),
        output_tokens_mean=_mean(ok.output_tokens),
        concurrency_mean=_concurrency(records, window),
        token_count_sources=_names(ok.token_count_source, TOKEN_COUNT_SOURCES),
        stamp_sources=_names(ok.stamp_source, STAMP_SOURCES),
        steady=is_steady(
            token_nanos=arrivals.token_nanos,
            token_counts=arrivals.token_counts,
            ttft_ms=latencies.ttft_ms,
            end_to_end_ms=latencies.end_to_end_ms,
            window=window,
        ),
    )


class _Summaries:
    """Summarizes latencies, with intervals of one seed."""

    def __init__(self, seed: int) -> None:
        self._bootstrap = Bootstrap(seed)

    def of(
        self, values_ms: Floats, *, requests: Integers | None = None, weights: Integers | None = None
    ) -> LatencySummary:
        """Summarize values, one per request or with the request of each; a value counts as often as its weight."""
        if not len(values_ms):
            return LatencySummary()
        own = np.arange(len(values_ms)) if requests is None else requests
        sample = self._bootstrap.sample(values_ms, requests=own, weights=weights)
        mean, std = _moments(sample)
        return LatencySummary(
            count=round(sample.total),
            mean_ms=mean,
            median_ms=sample.quantile(0.5),
            p90_ms=sample.quantile(0.9),
            p95_ms=sample.quantile(0.95),
            p99_ms=sample.quantile(0.99),
            min_ms=float(sample.values[0]),
            max_ms=float(sample.values[-1]),
            std_ms=std,
            mean_interval=self._bootstrap.mean_interval(sample),
            median_interval=self._bootstrap.quantile_interval(sample, 0.5),
            p95_interval=self._bootstrap.quantile_interval(sample, 0.95),
            p99_interval=self._bootstrap.quantile_interval(sample, 0.99),
        )


def _moments(sample: Sample) -> tuple[float, float]:
    """Return the mean and the standard deviation, of the values themselves (by n, not n - 1)."""
    mean = float(np.average(sample.values, weights=sample.weights))
    return mean, float(np.average((sample.values - mean) ** 2, weights=sample.weights)) ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Latencies:
    """By successful request, milliseconds."""

    lateness_ms: Floats
    ttft_ms: Floats
    nttft_ms: Floats
    """NaN: unknown."""
    tpot_ms: Floats
    """0 with one token."""
    end_to_end_ms: Floats


def _latencies_of(ok: RecordBatch) -> _Latencies:
    first_nanos = ok.chunk_nanos[ok.chunk_starts[:-1]] if len(ok) else ok.send_nanos
    ttft_ms = (first_nanos - ok.send_nanos) / NANOS_PER_MS
    end_to_end_ms = (ok.end_nanos - ok.send_nanos) / NANOS_PER_MS
    return _Latencies(
        lateness_ms=(ok.send_nanos - ok.scheduled_nanos) / NANOS_PER_MS,
        ttft_ms=ttft_ms,
        nttft_ms=ttft_ms / np.where(ok.input_tokens > 0, ok.input_tokens, np.nan),
        tpot_ms=(end_to_end_ms - ttft_ms) / np.maximum(ok.output_tokens - 1, 1),
        end_to_end_ms=end_to_end_ms,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Gaps:
    """By chunk that is not its request's first."""

    gap_ms: Floats
    tokens: Integers
    requests: Integers
    """Row of the request."""


def _gaps_of(ok: RecordBatch) -> _Gaps:
    is_later = np.ones(len(ok.chunk_nanos), np.bool_)
    is_later[ok.chunk_starts[:-1]] = False
    return _Gaps(
        gap_ms=np.diff(ok.chunk_nanos, prepend=np.int64(0))[is_later] / NANOS_PER_MS,
        tokens=ok.chunk_tokens[is_later],
        requests=np.repeat(np.arange(len(ok)), np.diff(ok.chunk_starts) - 1),
    )


def _good_count(ok: RecordBatch, latencies: _Latencies, gaps: _Gaps, level: ServiceLevel) -> int | None:
    """Return how many requests are within all limits; None: no limits.

    A request without a second token is within every limit of gaps; one with unknown input tokens is within none of
    nTTFT.
    """
    later_tokens = np.bincount(gaps.requests, weights=gaps.tokens, minlength=len(ok))
    itl_ms = np.bincount(gaps.requests, weights=gaps.gap_ms, minlength=len(ok)) / np.maximum(later_tokens, 1)
    limits = (
        (level.ttft_ms, latencies.ttft_ms),
        (level.nttft_ms, np.nan_to_num(latencies.nttft_ms, nan=np.inf)),
        (level.itl_ms, itl_ms),
        (level.tpot_ms, np.where(ok.output_tokens > 1, latencies.tpot_ms, 0.0)),
        (level.end_to_end_ms, latencies.end_to_end_ms),
    )
    within = [values <= limit for limit, values in limits if limit is not None]
    return int(np.logical_and.reduce(within).sum()) if within else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Arrivals:
    """What came in the window of successful requests, whenever they were sent."""

    request_count: int
    """That ended in it."""
    input_tokens: int | None
    """Of those; None: of some it is unknown."""
    token_nanos: Integers
    token_counts: Integers


def _arrivals_of(records: RecordBatch, window: Window) -> _Arrivals:
    ended = records.is_ok & window.holds(records.end_nanos)
    inputs = records.input_tokens[ended]
    arrived = arrived_in(records, window)
    return _Arrivals(
        request_count=int(ended.sum()),
        input_tokens=None if bool((inputs == UNKNOWN).any()) else int(inputs.sum()),
        token_nanos=records.chunk_nanos[arrived],
        token_counts=records.chunk_tokens[arrived],
    )


def arrived_in(records: RecordBatch, window: Window) -> Mask:
    """Tell by chunk whether its tokens are of the throughput of the window: of replies that did not fail."""
    # A long reply that began in the warm-up was served in the window, though it is cut off when the stage ends.
    cut_off = (records.status == _CANCELLED) & (records.send_nanos < window.from_nanos)
    counts = np.repeat(records.is_ok | cut_off, np.diff(records.chunk_starts))
    return np.asarray(counts & window.holds(records.chunk_nanos))


def _in_order_of_sending(records: RecordBatch, window: Window) -> Integers:
    rows = np.flatnonzero(window.holds(records.send_nanos))
    return np.asarray(rows[np.argsort(records.send_nanos[rows], kind="stable")])


def _errors_of(sent: RecordBatch) -> tuple[ErrorCount, ...]:
    """Count failed requests by status, the most frequent first."""
    rows = np.flatnonzero(~sent.is_ok).tolist()
    codes = sent.status.tolist()
    examples: dict[int, str] = {}
    for row in rows:
        examples.setdefault(codes[row], sent.errors[row])
    return tuple(
        ErrorCount(status=STATUSES[code], count=count, example=examples[code])
        for code, count in Counter(codes[row] for row in rows).most_common()
    )


def _gap_variation(send_nanos: Integers) -> float | None:
    """Return the standard deviation of the gaps by their mean; None: too few, or all sent at once."""
    gaps = np.diff(send_nanos)
    if len(send_nanos) < LEAST_SENDS_FOR_VARIATION or not gaps.any():
        return None
    return float(gaps.std() / gaps.mean())


def _concurrency(records: RecordBatch, window: Window) -> float:
    """Return the time that requests spent in the window, whatever became of them, by its length (Little's law)."""
    starts = np.maximum(records.send_nanos, window.from_nanos)
    ends = np.minimum(records.end_nanos, window.until_nanos)
    return float(np.maximum(ends - starts, 0).sum()) / (window.until_nanos - window.from_nanos)


def _mean(values: Integers) -> float | None:
    return float(values.mean()) if len(values) else None


def _names(codes: Integers, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(names[code] for code in np.unique(codes).tolist())
