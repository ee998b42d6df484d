"""Steps that run one after another in the worker itself, on a device whose memory can be read.

Invariant: a batch is only run from the state that the warm-up left; what has drifted from it by more than the tolerance
is said, and not run on.
"""

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.probing import Outcome
from llmpilot_tuner.probes.worker_messages import CaseFailed, CaseResult, Drifted
from llmpilot_tuner.torch_worker.failures import Failure, FailureKind, classify_exception
from llmpilot_tuner.torch_worker.serving import CaseAnswer, clipped

DRIFT_TOLERANCE_BYTES = 1 << 20
"""Handles and tables that libraries make for a new shape."""
_LIBRARY_BYTES = 64 << 20


class RunsSteps(Protocol):
    """What of a `StepRunner` is needed here."""

    def run(self, batch: Batch) -> None:
        """Run a step and free what it took, also when it fails."""


class Gauge(Protocol):
    """The memory of a device."""

    @property
    def live_bytes(self) -> int:
        """What tensors have now."""

    @property
    def peak_bytes(self) -> int:
        """Most that tensors had since the reset."""

    @property
    def reserved_bytes(self) -> int | None:
        """Most that the allocator held since the reset, and what is beside it and not provided for; None: not known."""

    def reset_peak(self) -> None:
        """Count peaks from now, and hold the allocator to what is left for it."""

    def give_back(self) -> None:
        """Give memory that is held and not used back to the system."""

    def await_step(self) -> None:
        """Wait until the device has done all work; raises what went wrong."""

    def problem(self) -> str:
        """Return why what was read must not be believed; empty: nothing."""


class InProcess:
    """Runs batches and reads the gauge."""

    def __init__(self, runner: RunsSteps, gauge: Gauge, *, capacity_bytes: int, on_gpu: bool = False) -> None:
        self._runner = runner
        self._gauge = gauge
        self._capacity_bytes = capacity_bytes
        self._baseline_bytes = 0
        self._on_gpu = on_gpu
        self._has_moved = False

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Run batches that nobody asked for; what is alive then is the baseline."""
        for batch in batches:
            self._runner.run(batch)
            self._gauge.await_step()
        self._clean()
        gc.freeze()  # what libraries have made stays, and would be looked through before every step
        self._baseline_bytes = self._gauge.live_bytes

    def run(self, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:
        """Run batches in turn; in a soak nothing is given back between them, and a drift is only reported."""
        for index, batch in enumerate(batches):
            if not soak:
                self._clean()
                live_bytes = self._gauge.live_bytes
                if self._has_drifted(live_bytes):
                    yield Drifted(index=index, live_bytes=live_bytes, baseline_bytes=self._baseline_bytes)
                    return
            answer = self._case(index, batch)
            yield answer
            if isinstance(answer, CaseFailed) or answer.outcome is not Outcome.PASSED:
                return

    def _has_drifted(self, live_bytes: int) -> bool:
        drift_bytes = live_bytes - self._baseline_bytes
        if drift_bytes <= DRIFT_TOLERANCE_BYTES:
            return False
        if not self._has_moved and drift_bytes <= min(_LIBRARY_BYTES, self._capacity_bytes // 100):
            # Libraries make a larger workspace once. It is in every peak that is measured from now on; a leak goes on.
            self._baseline_bytes, self._has_moved = live_bytes, True
            return False
        return True

    def _case(self, index: int, batch: Batch) -> CaseResult | CaseFailed:
        answer = self._tried(index, batch)
        if isinstance(answer, CaseResult) and answer.outcome is Outcome.PASSED and self._is_beyond(answer):
            # The allocator may have kept unused pieces up to its limit, before libraries took something beside it.
            self._clean()
            answer = self._tried(index, batch)
        if isinstance(answer, CaseResult) and answer.outcome is Outcome.PASSED and self._is_beyond(answer):
            message = f"with what was allocated beside PyTorch the step took {answer.reserved_bytes:,} bytes"
            answer = msgspec.structs.replace(answer, outcome=Outcome.OUT_OF_MEMORY, message=message)
        return answer

    def _is_beyond(self, result: CaseResult) -> bool:
        return result.reserved_bytes is not None and result.reserved_bytes > self._capacity_bytes

    def _tried(self, index: int, batch: Batch) -> CaseResult | CaseFailed:
        live_bytes = self._gauge.live_bytes
        self._gauge.reset_peak()
        begin = time.perf_counter()
        failure = self._failure_of(batch)
        seconds = time.perf_counter() - begin
        if failure is not None and failure.kind is FailureKind.OTHER:
            return CaseFailed(index=index, message=clipped(failure.message))
        peak_bytes, reserved_bytes = self._gauge.peak_bytes, self._gauge.reserved_bytes
        if problem := self._gauge.problem():
            return CaseFailed(index=index, message=problem)
        if failure is not None:
            self._clean()
        return CaseResult(
            index=index,
            outcome=Outcome.PASSED if failure is None else Outcome.OUT_OF_MEMORY,
            peak_bytes=peak_bytes,
            reserved_bytes=reserved_bytes,
            live_before_bytes=live_bytes,
            seconds=seconds,
            message="" if failure is None else clipped(failure.message),
        )

    def _failure_of(self, batch: Batch) -> Failure | None:
        try:
            self._runner.run(batch)
            self._gauge.await_step()
        except BaseException as error:  # noqa: BLE001 the prober is told, whatever it is
            failure = classify_exception(error, on_gpu=self._on_gpu)
            if failure.kind is FailureKind.OTHER:
                traceback.print_exception(error)
            return failure
        return None

    def _clean(self) -> None:
        gc.collect()
        self._gauge.give_back()
