"""Prometheus metrics of the load tests that run here.

Invariant: a load test's series stay until another one begins, so that the last scrape sees how it ended.
"""

from collections.abc import Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge

from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.events import LiveMetrics, RecordsCame
from llmpilot_loadtester.domain.record_frames import unpack_records

_NAN = float("nan")
_GAUGES = {
    "users": "Concurrent users that send.",
    "in_flight": "Requests without a whole reply.",
    "requests_per_second": "Requests that succeeded in the last second.",
    "tokens_per_second": "Output tokens of the last second, about: parts received times the tokens of a part.",
    "ttft_median_seconds": "Median time to first token of the last second; NaN: none.",
    "itl_median_seconds": "Median inter-token latency of the last second; NaN: none.",
    "worker_cpu": "Largest share of a core that a worker uses; near 1 the numbers do not count.",
}


class MetricsExport:
    """The metrics of this process's load tests, by id."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges = {
            name: Gauge(f"llmpilot_loadtest_{name}", text, ["load_test"], registry=registry)
            for name, text in _GAUGES.items()
        }
        self._requests = Counter(
            "llmpilot_loadtest_requests", "Requests that ended.", ["load_test", "status"], registry=registry
        )
        self._tokens = Counter(
            "llmpilot_loadtest_output_tokens", "Output tokens that came.", ["load_test"], registry=registry
        )
        self._running = Gauge("llmpilot_loadtest_running", "Load tests that run here.", registry=registry)
        self._ended: list[str] = []

    def begin(self, load_test_id: str) -> None:
        """Forget the load tests that have ended, as this one begins."""
        for ended in self._ended:
            for gauge in self._gauges.values():
                gauge.remove(ended)
            self._requests.remove_by_labels({"load_test": ended})
            self._tokens.remove(ended)
        self._ended.clear()
        self._running.inc()
        self._tokens.labels(load_test_id)
        self._set(load_test_id, [0, 0, 0, 0, _NAN, _NAN, 0])

    def see_records(self, load_test_id: str, records: RecordsCame) -> None:
        """Count requests that ended and their tokens."""
        batch = unpack_records(records.columns)
        for code, count in enumerate(np.bincount(batch.status, minlength=len(STATUSES)).tolist()):
            if count:
                self._requests.labels(load_test_id, STATUSES[code]).inc(count)
        self._tokens.labels(load_test_id).inc(int(batch.chunk_tokens.sum()))

    def see_live(self, load_test_id: str, live: LiveMetrics) -> None:
        """Show how it goes."""
        self._set(
            load_test_id,
            [
                live.users_count,
                live.in_flight_count,
                live.requests_per_second,
                live.tokens_per_second,
                _seconds(live.ttft_median_ms),
                _seconds(live.itl_median_ms),
                live.worker_cpu,
            ],
        )

    def end(self, load_test_id: str) -> None:
        """Show that nothing is sent any more."""
        self._running.dec()
        self._set(load_test_id, [0, 0, 0, 0, _NAN, _NAN, 0])
        self._ended.append(load_test_id)

    def _set(self, load_test_id: str, values: Sequence[float]) -> None:
        for gauge, value in zip(self._gauges.values(), values, strict=True):
            gauge.labels(load_test_id).set(value)


def _seconds(milliseconds: float | None) -> float:
    return _NAN if milliseconds is None else milliseconds / 1e3
