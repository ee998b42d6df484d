"""Watches how the process itself does while it sends: its CPU, how late its event loop is, what the kernel stamped.

Invariant: everything is since the start of the stage, and watching costs a few microseconds every 20 ms.
"""

import time

from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.recorder import Recorder
from llmpilot_loadtester.engine.timer import KernelTimer

_TICK_NANOS = 20_000_000
_SECOND_NANOS = 1_000_000_000
_CLOCK_PAIRS = 5
_SUB_BUCKETS = 8
"""By power of two: quantiles are known to an eighth."""


class LagHistogram:
    """Counts of times, in buckets that grow with the time."""

    def __init__(self) -> None:
        self.max_nanos = 0
        self._count = 0
        self._buckets = [0] * (64 * _SUB_BUCKETS)

    def add(self, nanos: int) -> None:
        """Count a time >= 0."""
        self._count += 1
        self.max_nanos = max(self.max_nanos, nanos)
        self._buckets[_bucket(nanos)] += 1

    def quantile_nanos(self, share: float) -> int:
        """Return a time that this share of the times does not exceed, at most an eighth too large; 0 without any."""
        wanted = share * self._count
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if count and seen >= wanted:
                return min(_end_of_bucket(index), self.max_nanos)
        return 0


def _bucket(nanos: int) -> int:
    if nanos < _SUB_BUCKETS:
        return nanos
    shift = nanos.bit_length() - _SUB_BUCKETS.bit_length()
    return (shift + 1) * _SUB_BUCKETS + (nanos >> shift) - _SUB_BUCKETS


def _end_of_bucket(index: int) -> int:
    if index < _SUB_BUCKETS:
        return index
    shift, part = divmod(index, _SUB_BUCKETS)
    return ((part + _SUB_BUCKETS + 1) << (shift - 1)) - 1


class HealthWatch:
    """Watches from when it is made until it is closed."""

    def __init__(self, reader: Reader, recorder: Recorder) -> None:
        self.starved_count = 0
        """Counted by who sends."""
        self.dropped_record_count = 0
        """Counted by who gives the records away."""
        self._reader, self._recorder = reader, recorder
        self._reads_before = reader.read_count
        self._coalesced_before = recorder.coalesced_read_count
        self._other_before = recorder.other_model_count
        self._lag = LagHistogram()
        self._cpu_share = 0.0
        self._clock_step_nanos = 0
        self._clock_offset_nanos = _clock_offset_nanos()
        self._second_nanos, self._second_cpu_nanos = time.monotonic_ns(), time.process_time_ns()
        self._due_nanos = self._second_nanos + _TICK_NANOS
        self._timer = KernelTimer(self._tick)
        self._timer.set_at(self._due_nanos)

    def snapshot(self) -> WorkerHealth:
        """Return how it was until now."""
        return WorkerHealth(
            cpu_share=self._cpu_share,
            loop_lag_p99_ms=self._lag.quantile_nanos(0.99) / 1e6,
            loop_lag_max_ms=self._lag.max_nanos / 1e6,
            coalesced_read_count=self._recorder.coalesced_read_count - self._coalesced_before,
            read_count=self._reader.read_count - self._reads_before,
            starved_count=self.starved_count,
            clock_step_ms=self._clock_step_nanos / 1e6,
            dropped_record_count=self.dropped_record_count,
            other_model=self._recorder.other_model,
            other_model_count=self._recorder.other_model_count - self._other_before,
            parse_backlog_count=self._recorder.backlog_count,
        )

    def close(self) -> None:
        """Watch no longer."""
        self._timer.close()

    def _tick(self) -> None:
        now_nanos = time.monotonic_ns()
        self._lag.add(max(now_nanos - self._due_nanos, 0))
        # From now on, not from when it was due: a loop that stood still is late once, not once per tick.
        self._due_nanos = now_nanos + _TICK_NANOS
        self._timer.set_at(self._due_nanos)
        self._clock_step_nanos = max(self._clock_step_nanos, abs(_clock_offset_nanos() - self._clock_offset_nanos))
        if now_nanos - self._second_nanos >= _SECOND_NANOS:
            cpu_nanos = time.process_time_ns()
            share = (cpu_nanos - self._second_cpu_nanos) / (now_nanos - self._second_nanos)
            self._cpu_share = max(self._cpu_share, share)
            self._second_nanos, self._second_cpu_nanos = now_nanos, cpu_nanos


def _clock_offset_nanos() -> int:
    """Return the wall clock minus the monotonic clock, from the closest of some pairs: a pause may fall within one."""
    narrowest_nanos, offset_nanos = _SECOND_NANOS, 0
    for _ in range(_CLOCK_PAIRS):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if after - before < narrowest_nanos:
            narrowest_nanos, offset_nanos = after - before, wall - (before + after) // 2
    return offset_nanos
