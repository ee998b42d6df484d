"""How a stage goes right now, from what its workers said in the last second.

Invariant: a frame of records is unpacked once, and what it costs to look at it does not grow with the stage.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.events import LiveMetrics
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.worker_messages import Pulse

WINDOW_SECONDS = 1.0
_MOST_VALUES = 1024
"""Looked at for a median, evenly spread."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Glance:
    """What one frame says."""

    at_seconds: float
    ok_count: int
    ttft_ms: Numbers
    itl_ms: Numbers


class LiveWindow:
    """The last second of a stage, and its counts since the start."""

    def __init__(self, worker_count: int) -> None:
        self.ok_count = 0
        self.error_count = 0
        self.pulses: list[Pulse | None] = [None] * worker_count
        self._glances: deque[_Glance] = deque()
        self._reads: deque[tuple[float, int]] = deque()
        self._token_count = self._part_count = 0

    def add(self, batch: RecordBatch, at_seconds: float) -> None:
        """Take the records of a frame that came at a moment of any clock."""
        ok_count = int(batch.is_ok.sum())
        self.ok_count += ok_count
        self.error_count += len(batch) - ok_count
        self._token_count += int(batch.chunk_tokens.sum())
        self._part_count += len(batch.chunk_tokens)
        self._glances.append(
            _Glance(
                at_seconds=at_seconds,
                ok_count=ok_count,
                ttft_ms=_ttft_ms(batch),
                itl_ms=_itl_ms(batch),
            )
        )

    def metrics(self, *, stage_index: int, elapsed_seconds: float, phase: str, at_seconds: float) -> LiveMetrics:
        """Return how it goes at a moment of the same clock."""
        while self._glances and self._glances[0].at_seconds < at_seconds - WINDOW_SECONDS:
            self._glances.popleft()
        pulses = [pulse for pulse in self.pulses if pulse is not None]
        return LiveMetrics(
            stage_index=stage_index,
            elapsed_seconds=elapsed_seconds,
            phase=phase,
            users_count=sum(pulse.users_count for pulse in pulses),
            in_flight_count=sum(pulse.in_flight_count for pulse in pulses),
            sent_count=sum(pulse.sent_count for pulse in pulses),
            ok_count=self.ok_count,
            error_count=self.error_count,
            tokens_per_second=self._tokens_per_second(sum(pulse.health.read_count for pulse in pulses), at_seconds),
            requests_per_second=sum(glance.ok_count for glance in self._glances) / WINDOW_SECONDS,
            ttft_median_ms=_median([glance.ttft_ms for glance in self._glances]),
            itl_median_ms=_median([glance.itl_ms for glance in self._glances]),
            worker_cpu=max((pulse.health.cpu_share for pulse in pulses), default=0.0),
        )

    def _tokens_per_second(self, read_count: int, at_seconds: float) -> float:
        """Return parts received per second of the last second, times the tokens that a part had so far.

        Replies may last for minutes: what ended in the last second would say nothing of those that go on.
        """
        self._reads.append((at_seconds, read_count))
        while self._reads[0][0] < at_seconds - WINDOW_SECONDS:
            self._reads.popleft()
        began_seconds, read_before = self._reads[0]
        if at_seconds <= began_seconds:
            return 0.0
        tokens_per_part = self._token_count / self._part_count if self._part_count else 1.0
        return max(read_count - read_before, 0) / (at_seconds - began_seconds) * tokens_per_part


def _ttft_ms(batch: RecordBatch) -> Numbers:
    has_chunks = np.flatnonzero(batch.is_ok & (np.diff(batch.chunk_starts) > 0))
    firsts = batch.chunk_nanos[batch.chunk_starts[:-1][has_chunks]]
    return np.asarray((firsts - batch.send_nanos[has_chunks]) / 1e6)


def _itl_ms(batch: RecordBatch) -> Numbers:
    """Return times per token between chunks, of at most `_MOST_VALUES` of them."""
    if len(batch.chunk_nanos) < 2:  # noqa: PLR2004 no gap
        return np.zeros(0)
    later = np.arange(1, len(batch.chunk_nanos), max(len(batch.chunk_nanos) // _MOST_VALUES, 1))
    starts = np.zeros(len(batch.chunk_nanos) + 1, np.bool_)
    starts[batch.chunk_starts] = True
    later = later[~starts[later]]
    return np.asarray((batch.chunk_nanos[later] - batch.chunk_nanos[later - 1]) / batch.chunk_tokens[later] / 1e6)


def _median(parts: list[Numbers]) -> float | None:
    """Return about the median, that of some of the values, evenly spread; None: there are none."""
    count = sum(map(len, parts))
    if not count:
        return None
    values = np.sort(np.concatenate(parts)[:: max(count // _MOST_VALUES, 1)])
    return float(values[len(values) // 2])
