"""Whether the numbers of a stage count: whether the load tester kept up with what it was asked to do.

Invariant: each reason is a sentence with what was measured, its limit, and what to do; a stage without reasons counts.
"""

import math
from collections.abc import Iterator, Sequence

from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.domain.results import StageMetrics, Verdict
from llmpilot_loadtester.domain.spec import RATED, Load, LoadKind

LARGEST_CPU_SHARE = 0.9
LARGEST_LOOP_LAG_MS = 5.0
LARGEST_LATENESS_MS = 2.0
LARGEST_LATENESS_IN_GAPS = 0.1
LARGEST_STARVED_SHARE = 0.001
LARGEST_COALESCED_SHARE = 0.01
LARGEST_READ_LAG_MS = 1.0
LARGEST_CLOCK_STEP_MS = 1.0
LARGEST_ERROR_RATE = 0.01
REQUESTS_FOR_P99 = math.ceil(math.log(0.025) / math.log(0.99))
"""With fewer, the largest of them is below the true p99 too often to bound it: 368."""
_MORE_WORKERS = "use more workers, or less load per worker"


def verdict_of(healths: Sequence[WorkerHealth], metrics: StageMetrics, load: Load) -> Verdict:
    """Judge a stage by the health of its workers."""
    reasons = (*_request_reasons(metrics), *_worker_reasons(healths, metrics, load), *_send_reasons(metrics, load))
    return Verdict(
        is_valid=not reasons,
        reasons=reasons,
        notes=(*_accuracy_notes(healths, metrics, load), *_sample_notes(metrics)),
    )


def _request_reasons(metrics: StageMetrics) -> Iterator[str]:
    if not metrics.request_count:
        yield "No request was sent in the measured window: use a longer window, or more users."
    elif not metrics.ok_count:
        most = max(metrics.errors, key=lambda error: error.count, default=None)
        cause = f"; {most.count} were {most.status}: {most.example.rstrip('.')}" if most else ""
        yield f"None of {metrics.request_count:,} requests succeeded, so there are no latencies{cause}."


def _worker_reasons(healths: Sequence[WorkerHealth], metrics: StageMetrics, load: Load) -> Iterator[str]:
    if not healths:
        yield "No worker said how it did: look for one that was killed."
        return
    cpu_share = max(health.cpu_share for health in healths)
    if cpu_share >= LARGEST_CPU_SHARE:
        yield (
            f"A worker used {cpu_share:.0%} of a core in its busiest second, the limit is {LARGEST_CPU_SHARE:.0%}: "
            f"{_MORE_WORKERS}."
        )
    lag_ms = max(health.loop_lag_p99_ms for health in healths)
    is_scheduled = not load.is_closed and load.kind is not LoadKind.ALL_AT_ONCE
    if lag_ms > LARGEST_LOOP_LAG_MS and (is_scheduled or _has_user_space_stamps(metrics)):
        yield (
            f"A worker's event loop woke up {lag_ms:.1f} ms late (p99), the limit is {LARGEST_LOOP_LAG_MS:g} ms where "
            f"sends are scheduled or stamps are taken in user space: {_MORE_WORKERS}."
        )
    yield from _loss_reasons(healths, metrics)


def _loss_reasons(healths: Sequence[WorkerHealth], metrics: StageMetrics) -> Iterator[str]:
    reads = sum(health.read_count for health in healths)
    coalesced = sum(health.coalesced_read_count for health in healths)
    if coalesced > LARGEST_COALESCED_SHARE * reads and _is_late(healths):
        yield (
            f"{coalesced:,} of {reads:,} reads ({coalesced / max(reads, 1):.1%}) brought several parts of a reply at "
            f"once, so that the earlier ones' times are lost; the limit is {LARGEST_COALESCED_SHARE:.0%}: "
            f"{_MORE_WORKERS}."
        )
    starved = sum(health.starved_count for health in healths)
    if starved > LARGEST_STARVED_SHARE * max(metrics.request_count, 1):
        yield (
            f"{starved:,} requests waited because none was ready to be sent, beside {metrics.request_count:,} in the "
            f"window; the limit is {LARGEST_STARVED_SHARE:.1%} of them: look at the source of the requests, or give it "
            "a CPU of its own."
        )
    step_ms = max(health.clock_step_ms for health in healths)
    if step_ms > LARGEST_CLOCK_STEP_MS:
        yield (
            f"The wall clock was set by {step_ms:.1f} ms while requests were under way, the limit is "
            f"{LARGEST_CLOCK_STEP_MS:g} ms: run again when the clock is synchronised."
        )
    dropped = sum(health.dropped_record_count for health in healths)
    if dropped:
        yield f"{dropped:,} records were dropped, the limit is 0: {_MORE_WORKERS}."


def _send_reasons(metrics: StageMetrics, load: Load) -> Iterator[str]:
    """Requests of a schedule must be sent in time; those that are all due at once cannot be."""
    lateness_ms = metrics.send_lateness.p99_ms
    if load.is_closed or load.kind is LoadKind.ALL_AT_ONCE or lateness_ms is None:
        return
    rate_per_second = load.rate_per_second if load.kind in RATED else metrics.sent_per_second
    limit_ms = max(LARGEST_LATENESS_MS, LARGEST_LATENESS_IN_GAPS * 1e3 / rate_per_second)
    if lateness_ms > limit_ms:
        yield (
            f"Requests were sent {lateness_ms:.1f} ms late (p99), the limit is {limit_ms:.1f} ms at "
            f"{rate_per_second:g} requests/s: {_MORE_WORKERS}."
        )


def _accuracy_notes(healths: Sequence[WorkerHealth], metrics: StageMetrics, load: Load) -> Iterator[str]:
    lag_ms = max((health.loop_lag_p99_ms for health in healths), default=0.0)
    if _has_user_space_stamps(metrics):
        yield (
            "Arrivals were stamped in user space, where the kernel gives no times: they are up to "
            f"{lag_ms:.1f} ms late (p99 of the event loop)."
        )
    elif load.is_closed and lag_ms > LARGEST_LOOP_LAG_MS:
        yield (
            f"Users sent their next request up to {lag_ms:.1f} ms late (p99 of the event loop); arrivals were stamped "
            "by the kernel and are exact."
        )
    yield from _server_notes(healths)
    if load.kind is LoadKind.ALL_AT_ONCE and metrics.send_lateness.max_ms is not None:
        yield f"It took {metrics.send_lateness.max_ms:.1f} ms to send all requests at once."
    if "chunks" in metrics.token_count_sources:
        yield (
            "Output tokens are counted as one per part of a reply, as the server reports no usage: give a tokenizer to "
            "count them."
        )


def _server_notes(healths: Sequence[WorkerHealth]) -> Iterator[str]:
    reads = sum(health.read_count for health in healths)
    coalesced = sum(health.coalesced_read_count for health in healths)
    if coalesced > LARGEST_COALESCED_SHARE * reads and not _is_late(healths):
        yield (
            f"{coalesced:,} of {reads:,} reads ({coalesced / max(reads, 1):.1%}) brought several parts of a reply at "
            "once, though the load tester was in time: the server or the network sends them together, and the gaps "
            "between them are 0."
        )
    others = sum(health.other_model_count for health in healths)
    if others:
        name = next(health.other_model for health in healths if health.other_model_count)
        yield f"{others:,} replies say that they are of {name!r}, which is not the model that was asked for."


def _is_late(healths: Sequence[WorkerHealth]) -> bool:
    """Whether a worker came to its sockets so late that what arrived meanwhile is read as one."""
    return max(health.loop_lag_p99_ms for health in healths) > LARGEST_READ_LAG_MS


def _sample_notes(metrics: StageMetrics) -> Iterator[str]:
    if metrics.steady is False:
        yield "Throughput or TTFT had a trend in the measured window: use a longer warm-up, or less load."
    elif metrics.steady is None and metrics.ok_count:
        yield (
            f"{metrics.ok_count:,} successful requests are too few, or too long for the window, to tell whether it was "
            "a steady state."
        )
    if 0 < metrics.ok_count < REQUESTS_FOR_P99:
        yield (
            f"p99 is of {metrics.ok_count:,} successful requests; below {REQUESTS_FOR_P99} it has no upper bound: use "
            "a longer window."
        )
    if metrics.ok_count and metrics.error_count > LARGEST_ERROR_RATE * metrics.request_count:
        kinds = ", ".join(f"{error.count:,} {error.status}" for error in metrics.errors)
        failed = f"{metrics.error_count:,} of {metrics.request_count:,} requests ({metrics.error_rate:.1%}) failed"
        yield f"{failed}: {kinds}. Latencies are of the others."


def _has_user_space_stamps(metrics: StageMetrics) -> bool:
    return "user_space" in metrics.stamp_sources
