"""What a stage of a load test measured, and whether it counts.

Invariant: None is "nobody reported", never 0. Latencies are milliseconds.
"""

from dataclasses import dataclass, field

from llmpilot_loadtester.domain.spec import ServiceLevel, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A bootstrap confidence interval of 95 %."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """A latency over requests or over tokens, in milliseconds."""

    count: int = 0
    """Values it is of."""
    mean_ms: float | None = None
    median_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    std_ms: float | None = None
    mean_interval: Interval | None = None
    """Resampled by request, as the tokens of a request are not independent; None: too few requests."""
    median_interval: Interval | None = None
    p95_interval: Interval | None = None
    p99_interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCount:
    """Failed requests of one status."""

    status: str
    count: int
    example: str
    """What the first of them said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMetrics:
    """The metrics of METRICS.md, of requests that were sent in the measured window."""

    window_seconds: float
    request_count: int
    ok_count: int
    errors: tuple[ErrorCount, ...]
    """The most frequent first."""
    ttft: LatencySummary
    """Time to first token, from sending."""
    ttft_from_schedule: LatencySummary
    """The same from when the request should have been sent."""
    nttft: LatencySummary
    """TTFT per input token; empty where input tokens are unknown."""
    itl: LatencySummary
    """Time per token between two chunks, over all tokens but those of the first chunk."""
    chunk_gap: LatencySummary
    """Time between two chunks, however many tokens they have."""
    tpot: LatencySummary
    """(end-to-end - TTFT) / (output tokens - 1), of requests with two or more."""
    end_to_end: LatencySummary
    end_to_end_from_schedule: LatencySummary
    normalized_latency: LatencySummary
    """End-to-end per output token."""
    send_lateness: LatencySummary
    """Actual minus scheduled send time."""
    first_byte: LatencySummary
    """From sending to the first byte of any kind."""
    requests_per_second: float
    """Successful requests that ended in the window."""
    output_tokens_per_second: float
    """Output tokens that arrived in the window, of replies that succeeded or, begun in the warm-up, were cut off."""
    input_tokens_per_second: float | None
    """Input tokens of the same requests as requests_per_second; None: unknown."""
    sent_per_second: float
    """Requests sent in the window."""
    send_gap_cv: float | None
    """Coefficient of variation of the gaps between sends; Poisson: 1. None: fewer than three."""
    goodput_requests_per_second: float | None
    """Successful requests of the window within all limits; None: no limits."""
    good_share: float | None
    """Share of all requests of the window within all limits."""
    input_tokens_mean: float | None
    output_tokens_mean: float | None
    concurrency_mean: float
    """Mean requests under way during the window."""
    token_count_sources: tuple[str, ...]
    stamp_sources: tuple[str, ...]
    steady: bool | None
    """Whether throughput and TTFT had no trend in the window; None: too few requests to tell."""

    @property
    def error_count(self) -> int:
        """Requests that failed."""
        return self.request_count - self.ok_count

    @property
    def error_rate(self) -> float | None:
        """Share of the requests that failed; None: there were none."""
        return self.error_count / self.request_count if self.request_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the numbers of a stage count, by the health of the load tester itself."""

    is_valid: bool
    reasons: tuple[str, ...] = ()
    """Why not, each in a sentence with its numbers."""
    notes: tuple[str, ...] = ()
    """What a reader should know though they count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage measured."""

    stage_index: int
    attempt: int
    """Which run of the stage, from 1."""
    stage: Stage
    start_unix_nanos: int
    """Time 0 of its records."""
    metrics: StageMetrics
    verdict: Verdict
    service_level: ServiceLevel = field(default_factory=ServiceLevel)
