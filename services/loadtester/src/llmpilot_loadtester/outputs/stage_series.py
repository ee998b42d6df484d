"""What the plots of a stage show: distributions and timelines of its records.

Invariant: pure numpy, and small whatever the number of tokens, so that the records can be let go. Distributions are of
successful requests sent in the measured window, as the metrics are; timelines are of the whole stage.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.records import Integers, RecordBatch
from llmpilot_loadtester.domain.window import Window

Values = npt.NDArray[np.float64]

_QUANTILE_COUNT = 201
_BIN_COUNT = 120
_DOT_COUNT = 1500
"""More dots than pixels show nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageSeries:
    """Curves of a stage; milliseconds, seconds since time 0, tokens per second."""

    shares: Values
    """0 to 1: the quantiles of the next three."""
    ttft_ms: Values
    """Empty: there are none."""
    itl_ms: Values
    end_to_end_ms: Values
    bin_seconds: Values
    """Middles of the timeline's bins."""
    in_flight: Values
    """Mean requests under way."""
    tokens_per_second: Values
    sent_seconds: Values
    """Of successful requests, some of them if there are many."""
    sent_ttft_ms: Values
    window_seconds: tuple[float, float]


def stage_series(records: RecordBatch, window: Window) -> StageSeries:
    """Return the curves of records whose times are since time 0."""
    has_tokens = np.diff(records.chunk_starts) > 0
    ok = records.is_ok & has_tokens
    counted = ok & window.holds(records.send_nanos)
    first = np.zeros(len(records), np.int64)
    first[has_tokens] = records.chunk_nanos[records.chunk_starts[:-1][has_tokens]]
    ttft_ms = (first - records.send_nanos) / 1e6
    shares = np.linspace(0, 1, _QUANTILE_COUNT)
    edges = np.linspace(0, max(_last(records), window.until_nanos), _BIN_COUNT + 1)
    shown = np.flatnonzero(ok)
    shown = shown[:: max(1, -(-len(shown) // _DOT_COUNT))]
    return StageSeries(
        shares=shares,
        ttft_ms=_quantiles(ttft_ms[counted], shares),
        itl_ms=_quantiles(token_gaps_ms(records.take(counted)), shares),
        end_to_end_ms=_quantiles((records.end_nanos - records.send_nanos)[counted] / 1e6, shares),
        bin_seconds=(edges[:-1] + edges[1:]) / 2e9,
        in_flight=_mean_in_flight(records, edges),
        tokens_per_second=np.histogram(records.chunk_nanos, edges, weights=records.chunk_tokens)[0]
        / (np.diff(edges) / 1e9),
        sent_seconds=records.send_nanos[shown] / 1e9,
        sent_ttft_ms=ttft_ms[shown],
        window_seconds=(window.from_nanos / 1e9, window.until_nanos / 1e9),
    )


def chunk_gaps_ms(records: RecordBatch) -> tuple[Values, Integers]:
    """Return the time between each chunk and the one before it of the same request, and which entry the chunk is."""
    is_later = np.ones(len(records.chunk_nanos), np.bool_)
    starts = records.chunk_starts[:-1]
    is_later[starts[starts < len(is_later)]] = False
    later = np.flatnonzero(is_later)
    return (records.chunk_nanos[later] - records.chunk_nanos[later - 1]) / 1e6, later


def token_gaps_ms(records: RecordBatch) -> Values:
    """Return the time per token between two chunks, once for each token of the later chunk."""
    gaps_ms, later = chunk_gaps_ms(records)
    tokens = records.chunk_tokens[later]
    return np.asarray(np.repeat(gaps_ms / tokens, tokens), dtype=np.float64)


def _quantiles(values: Values, shares: Values) -> Values:
    return np.asarray(np.quantile(values, shares)) if len(values) else np.empty(0)


def _last(records: RecordBatch) -> int:
    return int(records.end_nanos.max(initial=1))


def _mean_in_flight(records: RecordBatch, edges: Values) -> Values:
    """Time under way before each edge is linear between sends and ends: the mean over a bin is exact."""

    def under_way_before(edge_times: Values, moments: Integers) -> Values:
        ordered = np.sort(moments)
        sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
        count = np.searchsorted(ordered, edge_times)
        return np.asarray(count * edge_times - sums[count])

    total = under_way_before(edges, records.send_nanos) - under_way_before(edges, records.end_nanos)
    return np.asarray(np.diff(total) / np.diff(edges))
