"""What the server counts, under the names of vLLM.

Invariant: the times are those of the model (when a token was due), as a real engine's are; how late the process was is
in the write log.
Source of the names and buckets: vllm/v1/metrics/loggers.py and vllm/v1/metrics/buckets.py.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmpilot_perfmodel.batching.policies import Policy, Vllm0Policy, Vllm1Policy
from llmpilot_simulator.clock import NANOS_PER_SECOND

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_FINISHED_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Durations in nanoseconds, counted by upper bound in seconds, inclusive.

    Runs of the same duration, as the tokens of a step have, are counted at once.
    """

    __slots__ = ("_bounds", "_counts", "_run_count", "_run_nanos", "_sum_nanos")

    def __init__(self, bounds_seconds: Sequence[float]) -> None:
        self._bounds = tuple(bounds_seconds)
        self._counts = [0] * (len(bounds_seconds) + 1)
        self._sum_nanos = 0
        self._run_nanos = 0
        self._run_count = 0

    def observe(self, duration_nanos: int) -> None:
        """Count one duration."""
        if duration_nanos == self._run_nanos:
            self._run_count += 1
        else:
            self._end_run()
            self._run_nanos = duration_nanos
            self._run_count = 1

    def _end_run(self) -> None:
        self._counts[bisect_left(self._bounds, self._run_nanos / NANOS_PER_SECOND)] += self._run_count
        self._sum_nanos += self._run_count * self._run_nanos
        self._run_count = 0

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Return cumulative counts by bound, as Prometheus has them, and the sum of the values in seconds."""
        self._end_run()
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum_nanos / NANOS_PER_SECOND


@dataclass(slots=True)
class Statistics:
    """What has happened since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_FINISHED_REASONS, 0))
    rejected: int = 0
    """Requests answered 429 or 503 by an injected fault."""
    slow_reader_pauses: int = 0
    """Times that a token waited because the client did not read those before it."""
    slow_reader_drops: int = 0
    """Connections closed because the client did not read for too long."""
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_SECONDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_TOKEN_SECONDS))
    request_latency: Histogram = field(default_factory=lambda: Histogram(_REQUEST_SECONDS))


class Load(Protocol):
    """What a scheduler is busy with."""

    @property
    def running_count(self) -> int:
        """Requests in the batch."""
        ...

    @property
    def waiting_count(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def used_memory_share(self) -> float:
        """Of the memory for the context of requests, how much is taken: 0 to 1."""
        ...

    @property
    def preemption_count(self) -> int:
        """Since the start."""
        ...

    @property
    def prefix_hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache since the start."""
        ...

    @property
    def prefix_query_tokens(self) -> int:
        """Prompt tokens looked up in the prefix cache since the start."""
        ...


class VllmCollector(Collector):
    """Gives the numbers of now to a Prometheus registry."""

    def __init__(self, *, model_id: str, statistics: Statistics, load: Load, policy: Policy | None = None) -> None:
        self._statistics = statistics
        self._load = load
        self._policy = policy
        self._labels = {"model_name": model_id, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        """Read everything once."""
        yield from self._gauges()
        yield from self._cache_config()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        load = self._load
        for name, documentation, value in (
            ("num_requests_running", "Number of requests in model execution batches.", load.running_count),
            ("num_requests_waiting", "Number of requests waiting to be processed.", load.waiting_count),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.used_memory_share),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", documentation, labels=tuple(self._labels))
            family.add_metric(tuple(self._labels.values()), value)
            yield family

    def _cache_config(self) -> Iterator[Metric]:
        """Give what vLLM calls its cache config, of a policy that has blocks: those that requests may hold."""
        policy = self._policy
        if not isinstance(policy, Vllm0Policy | Vllm1Policy):
            return
        labels = {
            "block_size": str(policy.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": str(isinstance(policy, Vllm1Policy) and policy.enable_prefix_caching),
            "engine": self._labels["engine"],
            "num_gpu_blocks": str(policy.block_count),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=tuple(labels)
        )
        family.add_metric(tuple(labels.values()), 1)
        yield family

    def _counters(self) -> Iterator[Metric]:
        statistics, load = self._statistics, self._load
        for name, documentation, value in (
            ("vllm:prompt_tokens", "Number of prefill tokens processed.", statistics.prompt_tokens),
            ("vllm:generation_tokens", "Number of generation tokens processed.", statistics.generation_tokens),
            ("vllm:num_preemptions", "Cumulative number of preemptions from the engine.", load.preemption_count),
            ("vllm:prefix_cache_queries", "Prefix cache queries, in queried tokens.", load.prefix_query_tokens),
            ("vllm:prefix_cache_hits", "Prefix cache hits, in cached tokens.", load.prefix_hit_tokens),
            ("llmpilot:rejected_requests", "Requests answered 429 or 503 by an injected fault.", statistics.rejected),
            (
                "llmpilot:slow_reader_pauses",
                "Times a token waited because the client did not read.",
                statistics.slow_reader_pauses,
            ),
            (
                "llmpilot:slow_reader_drops",
                "Connections closed because the client did not read.",
                statistics.slow_reader_drops,
            ),
        ):
            family = CounterMetricFamily(name, documentation, labels=tuple(self._labels))
            family.add_metric(tuple(self._labels.values()), value)
            yield family
        family = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=(*self._labels, "finished_reason"),
        )
        for reason, count in statistics.finished.items():
            family.add_metric((*self._labels.values(), reason), count)
        yield family

    def _histograms(self) -> Iterator[Metric]:
        statistics = self._statistics
        for name, documentation, histogram in (
            ("time_to_first_token", "Histogram of time to first token in seconds.", statistics.time_to_first_token),
            ("inter_token_latency", "Histogram of inter-token latency in seconds.", statistics.inter_token_latency),
            ("e2e_request_latency", "Histogram of e2e request latency in seconds.", statistics.request_latency),
        ):
            family = HistogramMetricFamily(f"vllm:{name}_seconds", documentation, labels=tuple(self._labels))
            buckets, total = histogram.samples()
            family.add_metric(tuple(self._labels.values()), buckets, total)
            yield family
