"""Expected values are computed request by request in plain Python, by the words of METRICS.md."""

import statistics
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch, empty_records
from llmpilot_loadtester.domain.results import ErrorCount, LatencySummary, StageMetrics
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.domain.window import Window, window_of

MS = 1_000_000
WINDOW = Window(from_nanos=1_000 * MS, until_nanos=3_000 * MS)
NO_LIMITS = ServiceLevel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Times in milliseconds since the start; chunks after sending."""

    send: float
    chunks: tuple[tuple[float, int], ...] = ()
    rest: float = 0.0
    """From the last chunk, or from sending, to the end."""
    late: float = 0.0
    input_tokens: int = -1
    status: int = 0
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it succeeded."""
        return self.status == 0

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(tokens for _, tokens in self.chunks)

    @property
    def end_to_end(self) -> float:
        """Milliseconds."""
        return (self.chunks[-1][0] if self.chunks else 0.0) + self.rest


def batch_of(requests: list[Request]) -> RecordBatch:
    def nanos(times: list[float]) -> np.ndarray:
        return np.array([round(time * MS) for time in times], np.int64)

    columns = {name: np.zeros(len(requests), np.int64) for name in REQUEST_COLUMNS}
    columns["send_nanos"] = nanos([request.send for request in requests])
    columns["scheduled_nanos"] = nanos([request.send - request.late for request in requests])
    columns["first_byte_nanos"] = np.array(
        [round((request.send + request.chunks[0][0]) * MS) if request.chunks else -1 for request in requests], np.int64
    )
    columns["end_nanos"] = nanos([request.send + request.end_to_end for request in requests])
    columns["input_tokens"] = np.array([request.input_tokens for request in requests], np.int64)
    columns["status"] = np.array([request.status for request in requests], np.int64)
    return RecordBatch(
        **columns,
        errors=tuple(request.error for request in requests),
        chunk_starts=np.cumsum([0, *(len(request.chunks) for request in requests)]).astype(np.int64),
        chunk_nanos=nanos([request.send + at for request in requests for at, _ in request.chunks]),
        chunk_tokens=np.array([tokens for request in requests for _, tokens in request.chunks], np.int64),
    )


def metrics_of(*requests: Request, level: ServiceLevel = NO_LIMITS) -> StageMetrics:
    return stage_metrics(batch_of(list(requests)), WINDOW, level, seed=1)


def values(summary: LatencySummary) -> tuple[float | None, ...]:
    names = ("mean_ms", "median_ms", "p90_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "std_ms")
    return (float(summary.count), *(getattr(summary, name) for name in names))


def expected_values(latencies: list[float]) -> tuple[float | None, ...]:
    if not latencies:
        return (0.0, *[None] * 8)
    quantiles = np.quantile(latencies, [0.5, 0.9, 0.95, 0.99]).tolist()
    extremes = (min(latencies), max(latencies), statistics.pstdev(latencies))
    return (len(latencies), statistics.mean(latencies), *quantiles, *extremes)


def approximately(expected: tuple[float | None, ...]) -> list[object]:
    return [None if value is None else pytest.approx(value, abs=2e-5, rel=1e-9) for value in expected]


chunk_tuples = st.lists(st.tuples(st.integers(0, 2_000), st.integers(1, 4)), min_size=1, max_size=5)
whole_ms = st.integers(0, 4_000).map(float)
ok_requests = st.builds(
    Request,
    send=whole_ms,
    chunks=chunk_tuples.map(lambda chunks: tuple((float(at), tokens) for at, tokens in sorted(chunks))),
    rest=st.integers(0, 50).map(float),
    late=st.integers(0, 30).map(float),
    input_tokens=st.sampled_from([-1, 0, 1, 64]),
)
failed_requests = st.builds(
    Request, send=whole_ms, rest=whole_ms, late=whole_ms, status=st.integers(1, 8), error=st.sampled_from(["x", "y"])
)


@given(st.lists(ok_requests | failed_requests, max_size=30))
def test_latencies_are_those_of_the_definitions(requests: list[Request]) -> None:
    metrics = metrics_of(*requests)
    sent = [request for request in requests if 1_000 <= request.send < 3_000]
    ok = [request for request in sent if request.is_ok]
    gaps = [
        (later[0] - before[0], later[1])
        for request in ok
        for before, later in zip(request.chunks[:-1], request.chunks[1:], strict=True)
    ]
    ttfts = [request.chunks[0][0] for request in ok]
    expected = {
        "ttft": ttfts,
        "ttft_from_schedule": [request.chunks[0][0] + request.late for request in ok],
        "nttft": [request.chunks[0][0] / request.input_tokens for request in ok if request.input_tokens > 0],
        "itl": [gap / tokens for gap, tokens in gaps for _ in range(tokens)],
        "chunk_gap": [gap for gap, _ in gaps],
        "tpot": [
            (request.end_to_end - request.chunks[0][0]) / (request.tokens - 1) for request in ok if request.tokens > 1
        ],
        "end_to_end": [request.end_to_end for request in ok],
        "end_to_end_from_schedule": [request.end_to_end + request.late for request in ok],
        "normalized_latency": [request.end_to_end / request.tokens for request in ok],
        "send_lateness": [request.late for request in sent],
        "first_byte": ttfts,
    }
    for name, latencies in expected.items():
        assert list(values(getattr(metrics, name))) == approximately(expected_values(latencies)), name
    assert metrics.request_count == len(sent)
    assert metrics.ok_count == len(ok)
    assert metrics.sent_per_second == len(sent) / 2


@given(st.lists(ok_requests | failed_requests, max_size=30))
def test_throughput_is_of_what_arrived_in_the_window(requests: list[Request]) -> None:
    metrics = metrics_of(*requests)
    ended = [request for request in requests if request.is_ok and 1_000 <= request.send + request.end_to_end < 3_000]
    tokens = sum(
        tokens
        for request in requests
        for at, tokens in request.chunks
        if request.is_ok and 1_000 <= request.send + at < 3_000
    )
    inputs = [request.input_tokens for request in ended]
    assert metrics.window_seconds == 2
    assert metrics.requests_per_second == len(ended) / 2
    assert metrics.output_tokens_per_second == tokens / 2
    assert metrics.input_tokens_per_second == (None if -1 in inputs else sum(inputs) / 2)


@given(st.lists(ok_requests | failed_requests, max_size=12))
def test_concurrency_is_the_mean_of_requests_under_way(requests: list[Request]) -> None:
    """Counted at the middle of every millisecond, as all times are whole ones."""
    moments = np.arange(1_000, 3_000) + 0.5
    under_way = sum(
        int(((moments > request.send) & (moments < request.send + request.end_to_end)).sum()) for request in requests
    )
    assert metrics_of(*requests).concurrency_mean == pytest.approx(under_way / 2_000)


def test_chunk_of_several_tokens_is_one_gap_and_several_token_latencies() -> None:
    """40 ms to a part of 4 tokens: 4 x 10 ms per token, one gap of 40 ms; the first part has no gap."""
    metrics = metrics_of(Request(send=1_000, chunks=((50.0, 3), (90.0, 4), (100.0, 1)), rest=5.0))
    assert (metrics.itl.count, metrics.itl.mean_ms, metrics.itl.median_ms) == (5, 10, 10)
    assert (metrics.chunk_gap.count, metrics.chunk_gap.mean_ms) == (2, 25)
    assert metrics.ttft.mean_ms == 50
    assert metrics.tpot.mean_ms == pytest.approx(55 / 7)
    assert metrics.normalized_latency.mean_ms == pytest.approx(105 / 8)


def test_reply_of_one_token_has_no_gap() -> None:
    metrics = metrics_of(Request(send=1_000, chunks=((50.0, 1),), rest=1.0))
    assert metrics.itl == metrics.chunk_gap == metrics.tpot == LatencySummary()
    assert metrics.ttft.count == 1


def test_huge_token_count_of_a_chunk_takes_no_memory() -> None:
    """A server may say anything: 2 * 10^12 tokens at 10^-8 ms."""
    metrics = metrics_of(Request(send=1_000, chunks=((50.0, 1), (20_050.0, 2 * 10**12))))
    assert metrics.itl.count == 2 * 10**12
    assert metrics.itl.p99_ms == pytest.approx(1e-8)


def test_window_holds_its_begin_and_not_its_end() -> None:
    metrics = metrics_of(*(Request(send=send, chunks=((1.0, 1),)) for send in (999.999, 1_000, 2_999.999, 3_000)))
    assert metrics.request_count == 2


def test_errors_are_counted_by_kind_with_the_first_example() -> None:
    metrics = metrics_of(
        Request(send=2_500, status=5, error="reset later"),
        Request(send=1_500, status=5, error="reset first"),
        Request(send=1_600, status=3, error="429"),
        Request(send=1_700, status=8, error="cut off"),
        Request(send=3_500, status=8, error="cut off, but it was not sent in the window"),
        Request(send=1_800, chunks=((1.0, 1),)),
    )
    assert metrics.errors[0] == ErrorCount(status="disconnected", count=2, example="reset first")
    assert {(error.status, error.count) for error in metrics.errors[1:]} == {("rejected", 1), ("cancelled", 1)}
    assert (metrics.request_count, metrics.ok_count, metrics.error_rate) == (5, 1, 0.8)


def test_failed_requests_flatter_no_latency() -> None:
    metrics = metrics_of(
        Request(send=1_000, chunks=((100.0, 1), (110.0, 1))),
        Request(send=1_000, chunks=((1.0, 1), (1.5, 1)), status=5, error="broke off"),
    )
    assert metrics.ttft.mean_ms == 100
    assert metrics.itl.mean_ms == 10
    assert metrics.output_tokens_mean == 2
    assert metrics.output_tokens_per_second == 1


GOOD = Request(send=1_000, chunks=((50.0, 1), (70.0, 2)), rest=10.0, input_tokens=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ttft_ms", 50.0), ("nttft_ms", 5.0), ("itl_ms", 10.0), ("tpot_ms", 15.0), ("end_to_end_ms", 80.0)],
)
def test_request_at_a_limit_is_good_and_beyond_is_not(name: str, value: float) -> None:
    """Of tokens at 50, 70, 70 ms that end at 80: ITL 20 / 2, TPOT 30 / 2."""
    assert metrics_of(GOOD, level=ServiceLevel(**{name: value})).good_share == 1
    assert metrics_of(GOOD, level=ServiceLevel(**{name: value - 0.001})).good_share == 0


def test_goodput_needs_all_limits_and_success() -> None:
    metrics = metrics_of(
        GOOD,
        Request(send=1_100, chunks=((60.0, 1), (70.0, 1))),
        Request(send=1_200, chunks=((50.0, 1), (99.0, 1))),
        Request(send=1_300, status=4, error="timeout"),
        level=ServiceLevel(ttft_ms=50, itl_ms=20),
    )
    assert metrics.good_share == 0.25
    assert metrics.goodput_requests_per_second == 0.5


def test_no_limits_no_goodput() -> None:
    metrics = metrics_of(GOOD)
    assert metrics.good_share is None
    assert metrics.goodput_requests_per_second is None


def test_one_token_is_within_limits_of_gaps_and_unknown_input_is_not_within_nttft() -> None:
    one = Request(send=1_000, chunks=((50.0, 1),), rest=99.0)
    assert metrics_of(one, level=ServiceLevel(itl_ms=1, tpot_ms=1)).good_share == 1
    assert metrics_of(one, level=ServiceLevel(nttft_ms=1e9)).good_share == 0


def test_gaps_between_sends_vary_as_their_standard_deviation_by_mean() -> None:
    requests = [Request(send=send, chunks=((1.0, 1),)) for send in (1_000, 1_010, 1_040, 1_050)]
    expected = statistics.pstdev([10, 30, 10]) / statistics.mean([10, 30, 10])
    assert metrics_of(*requests).send_gap_cv == pytest.approx(expected)
    assert metrics_of(*requests[:2]).send_gap_cv is None
    assert metrics_of(*[requests[0]] * 3).send_gap_cv is None


def test_sources_are_those_of_successful_requests() -> None:
    batch = batch_of([GOOD, GOOD, Request(send=1_000, status=5, error="x")])
    batch.stamp_source[:] = [1, 0, 2]
    batch.token_count_source[:] = [2, 2, 1]
    metrics = stage_metrics(batch, WINDOW, NO_LIMITS, seed=1)
    assert metrics.stamp_sources == ("kernel", "user_space")
    assert metrics.token_count_sources == ("tokenizer",)


def test_no_requests_is_no_latency_and_zero_throughput() -> None:
    metrics = stage_metrics(empty_records(), WINDOW, ServiceLevel(ttft_ms=1), seed=1)
    assert metrics.ttft == metrics.itl == LatencySummary()
    assert (metrics.requests_per_second, metrics.output_tokens_per_second, metrics.concurrency_mean) == (0, 0, 0)
    assert (metrics.good_share, metrics.error_rate, metrics.steady, metrics.output_tokens_mean) == (None,) * 4


def steady_requests(count: int) -> list[Request]:
    random = np.random.default_rng(3)
    return [
        Request(
            send=1_000 + 2_000 * index / count,
            chunks=tuple((float(at), 1) for at in np.cumsum([50 + random.normal(0, 5), 10, 10])),
        )
        for index in range(count)
    ]


def test_intervals_are_around_what_they_are_of_and_of_the_seed() -> None:
    batch = batch_of(steady_requests(500))
    metrics = stage_metrics(batch, WINDOW, NO_LIMITS, seed=1)
    for summary in (metrics.ttft, metrics.itl, metrics.end_to_end):
        for name in ("mean", "median", "p95", "p99"):
            interval, value = getattr(summary, f"{name}_interval"), getattr(summary, f"{name}_ms")
            assert interval is not None
            assert interval.low - 1e-9 <= value <= interval.high + 1e-9
    # 50 +- 5 ms: a mean of 500 is within 1.96 * 5 / sqrt(500) = .44 ms
    assert metrics.ttft.mean_interval is not None
    assert metrics.ttft.mean_interval.high - metrics.ttft.mean_interval.low == pytest.approx(2 * 0.44, rel=0.25)
    assert stage_metrics(batch, WINDOW, NO_LIMITS, seed=1) == metrics
    assert stage_metrics(batch, WINDOW, NO_LIMITS, seed=2).ttft.mean_interval != metrics.ttft.mean_interval


def test_order_of_records_changes_nothing() -> None:
    batch = batch_of(steady_requests(100))
    shuffled = batch.take(np.random.default_rng(1).permutation(100))
    assert stage_metrics(shuffled, WINDOW, NO_LIMITS, seed=1) == stage_metrics(batch, WINDOW, NO_LIMITS, seed=1)


def test_window_of_a_stage_begins_after_its_warm_up() -> None:
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=1),))
    window = window_of(Stage(load=load, warm_up_seconds=1.5, measure_seconds=20))
    assert (window.from_nanos, window.until_nanos, window.seconds) == (1_500 * MS, 21_500 * MS, 20)
