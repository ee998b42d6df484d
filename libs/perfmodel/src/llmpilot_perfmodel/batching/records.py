"""What happened to every request of a simulated load, and the metrics that follow from it.

Invariant: the tokens of request i are `token_seconds[token_starts[i]:token_starts[i + 1]]`, the earliest first.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.record_schema import RecordTable

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

OK, OUT_OF_MEMORY = 0, 1
STATUS_NAMES = ("ok", "out_of_memory")
"""By the number in `RequestRecords.status`."""
_ERROR_TEXTS = ("", "the simulated GPU has no memory left for the batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyQuantiles:
    """A latency over requests or over tokens, in milliseconds; None: nobody had one."""

    mean_ms: float | None = None
    median_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """The metrics of a load test, as METRICS.md defines them."""

    ttft: LatencyQuantiles
    nttft: LatencyQuantiles
    """Milliseconds per input token."""
    itl: LatencyQuantiles
    throughput_tokens_per_second: float
    requests_per_second: float
    """Successful ones."""
    request_count: int
    error_count: int
    out_of_memory_count: int

    @property
    def error_rate(self) -> float | None:
        """Share of the requests that failed, 0 to 1; None: there were none."""
        return self.error_count / self.request_count if self.request_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecords:
    """One entry per request that ended, in the order in which they were sent; times in seconds since the start."""

    duration_seconds: float
    """Length of the load test."""
    request_index: Integers
    """Which request of the workload it was."""
    user_index: Integers
    """-1: nobody's, requests arrived by a schedule."""
    scheduled_seconds: Floats
    send_seconds: Floats
    end_seconds: Floats
    input_tokens: Integers
    status: Integers
    token_starts: Integers
    """One more entry, for where the last request's tokens end."""
    token_seconds: Floats

    def __len__(self) -> int:
        return len(self.request_index)

    @property
    def is_ok(self) -> npt.NDArray[np.bool_]:
        """Whether each request succeeded."""
        is_ok: npt.NDArray[np.bool_] = self.status == OK
        return is_ok

    @property
    def output_tokens(self) -> Integers:
        """Tokens that each request got."""
        return np.diff(self.token_starts)

    @property
    def ttft_seconds(self) -> Floats:
        """Time to first token of each successful request."""
        first = self.token_seconds[self.token_starts[:-1][self.is_ok]]
        return first - self.send_seconds[self.is_ok]

    @property
    def itl_seconds(self) -> Floats:
        """Time between two tokens of a request, over all tokens but the first of successful requests."""
        gaps = np.diff(self.token_seconds)
        is_within = np.repeat(self.is_ok, self.output_tokens)[1:]
        starts = self.token_starts[1:-1]
        is_within[starts[(starts > 0) & (starts < len(self.token_seconds))] - 1] = False
        return gaps[is_within]

    def columns(self) -> RecordTable:
        """Return the records in the schema of the load tester's: a token a chunk, times in whole nanoseconds."""
        chunks = [_nanos(self.token_seconds[start:end]) for start, end in pairwise(self.token_starts.tolist())]
        return {
            "request_index": self.request_index.tolist(),
            "user_index": [None if user < 0 else user for user in self.user_index.tolist()],
            "scheduled_time_nanos": _nanos(self.scheduled_seconds).tolist(),
            "send_time_nanos": _nanos(self.send_seconds).tolist(),
            "first_byte_time_nanos": [int(times[0]) if len(times) else None for times in chunks],
            "end_time_nanos": _nanos(self.end_seconds).tolist(),
            "chunk_time_nanos": chunks,
            "chunk_token_counts": [np.ones(len(times), np.int64) for times in chunks],
            "input_token_count": self.input_tokens.tolist(),
            "output_token_count": self.output_tokens.tolist(),
            "token_count_source": ["simulated"] * len(self),
            "status": [STATUS_NAMES[number] for number in self.status],
            "error": [_ERROR_TEXTS[number] for number in self.status],
            "finish_reason": ["length" if number == OK else None for number in self.status],
            "stamp_source": ["simulated"] * len(self),
            "origin": ["simulated"] * len(self),
        }

    def summary(self) -> LatencySummary:
        """Return the metrics of this load test."""
        is_ok, ttft = self.is_ok, self.ttft_seconds
        return LatencySummary(
            ttft=latency_quantiles(ttft),
            nttft=latency_quantiles(ttft / self.input_tokens[is_ok]),
            itl=latency_quantiles(self.itl_seconds),
            throughput_tokens_per_second=float(self.output_tokens[is_ok].sum() / self.duration_seconds),
            requests_per_second=float(is_ok.sum() / self.duration_seconds),
            request_count=len(self),
            error_count=int((~is_ok).sum()),
            out_of_memory_count=int((self.status == OUT_OF_MEMORY).sum()),
        )


def latency_quantiles(seconds: Floats) -> LatencyQuantiles:
    """Return mean and quantiles, with linear interpolation, in milliseconds."""
    if not len(seconds):
        return LatencyQuantiles()
    median, p90, p95, p99 = (np.quantile(seconds, (0.5, 0.9, 0.95, 0.99)) * 1e3).tolist()
    return LatencyQuantiles(mean_ms=float(seconds.mean() * 1e3), median_ms=median, p90_ms=p90, p95_ms=p95, p99_ms=p99)


def _nanos(seconds: Floats) -> Integers:
    return np.rint(seconds * 1e9).astype(np.int64)
