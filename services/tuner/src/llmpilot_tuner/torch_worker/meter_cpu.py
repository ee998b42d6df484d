"""The `cpu` probe: real allocations under a limit that makes them fail.

The worker loads the LLM and warms it up, and then only forks: each batch, or a soak, runs in a child of its own under
RLIMIT_DATA, so that what one step leaves behind never reaches another. In a new child the kernel counts the largest
size of the address space afresh, so that VmPeak tells what the step took, the workspaces of kernels included.

Invariant: a child may have no more than the capacity, weights included, on top of what Python and the libraries had
before. It takes a malloc that maps every large piece alone: `MALLOC_SETTINGS`, set by who starts the worker.
"""

import gc
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_servicekit.process_exit import describe_exit
from llmpilot_tuner.domain.probing import Outcome
from llmpilot_tuner.probes.worker_messages import CaseFailed, CaseResult, Order, Ready, pack, unpack_answer
from llmpilot_tuner.torch_worker.address_space import AddressSpace, fill_holes, limit_data, malloc_bytes
from llmpilot_tuner.torch_worker.failures import FailureKind, classify_exception
from llmpilot_tuner.torch_worker.loading import check_weights_fit, library_versions, runner_of, warm_up_batches
from llmpilot_tuner.torch_worker.ranks import Ranks
from llmpilot_tuner.torch_worker.serving import CaseAnswer, clipped, end_with_parent

_GENEROUS_EXTRA_BYTES = 256 << 20
_NEAR = 0.9
"""Share of the capacity from which on a failure that more memory cures is of memory: oneDNN gives up a little early."""


class CpuMeter:
    """Forks a child for every batch."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._ranks = Ranks(
            "gloo",
            rank=order.rank,
            rank_count=order.rank_count,
            folder=Path(order.meeting_folder),
        )
        self._runner = runner_of(order, "cpu", self._ranks)

    def start(self) -> Ready:
        """Load the LLM and warm it up."""
        self._runner.load()
        check_weights_fit(self._order, self._runner.weight_bytes)
        for batch in warm_up_batches(self._order.execution):
            self._runner.run(batch)
        gc.collect()
        fill_holes()
        gc.freeze()  # the children share what is there now
        return Ready(device="cpu", weight_bytes=self._runner.weight_bytes, versions=library_versions())

    def run(self, number: int, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:
        """Run each batch in a child of its own, a soak in one child."""
        parts = [(0, batches)] if soak else [(index, [batch]) for index, batch in enumerate(batches)]
        for first_index, part in parts:
            for answer in self._limited(number, first_index, part):
                yield answer
                if not (isinstance(answer, CaseResult) and answer.outcome is Outcome.PASSED):
                    return

    def _limited(self, number: int, first_index: int, batches: Sequence[Batch]) -> Iterator[CaseAnswer]:
        """Run batches in one child; a failure that does not say why is judged."""
        capacity_bytes = self._order.capacity_bytes
        for answer in self._in_child(number, batches, capacity_bytes=capacity_bytes, first_index=first_index):
            is_unclear = isinstance(answer, CaseFailed) and answer.exit_code != -signal.SIGKILL
            if isinstance(answer, CaseFailed) and is_unclear and self._order.rank_count == 1:
                yield self._judged(number, first_index, batches[: answer.index - first_index + 1], answer)
            else:
                yield answer

    def _judged(self, number: int, first_index: int, batches: Sequence[Batch], failed: CaseFailed) -> CaseAnswer:
        """Run batches, whose last failed and did not say why, with far more memory: if that helps, memory it was."""
        generous_bytes = 2 * self._order.capacity_bytes + _GENEROUS_EXTRA_BYTES
        *_, again = self._in_child(number, batches, capacity_bytes=generous_bytes, first_index=first_index)
        if not isinstance(again, CaseResult) or again.index != failed.index:
            return failed
        if again.outcome is Outcome.PASSED and (again.reserved_bytes or 0) < _NEAR * self._order.capacity_bytes:
            return failed
        return CaseResult(
            index=again.index,
            outcome=Outcome.OUT_OF_MEMORY,
            live_before_bytes=again.live_before_bytes,
            seconds=again.seconds,
            message=clipped(f"only where more memory is to be had it does not fail with: {failed.message}"),
        )

    def _in_child(
        self, number: int, batches: Sequence[Batch], *, capacity_bytes: int, first_index: int = 0
    ) -> Iterator[CaseAnswer]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            exit_code = 1
            try:
                end_with_parent()
                os.close(reading)
                self._as_child(writing, number, batches, capacity_bytes=capacity_bytes, first_index=first_index)
                exit_code = 0
            finally:
                os._exit(exit_code)
        os.close(writing)
        next_index, last = first_index, None
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                last = unpack_answer(line)
                assert isinstance(last, CaseResult | CaseFailed)  # noqa: S101 nothing else is written below
                next_index = last.index + 1
                yield last
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if exit_code != 0:
            message = f"the process of the step {describe_exit(exit_code)}"
            yield CaseFailed(index=next_index, message=message, exit_code=exit_code)

    def _as_child(
        self, pipe: int, number: int, batches: Sequence[Batch], *, capacity_bytes: int, first_index: int
    ) -> None:
        self._ranks.meet(f"{number}-{first_index}")
        weight_bytes = self._runner.weight_bytes
        start, start_bytes = AddressSpace.now(), malloc_bytes()
        limit_data(start.data_bytes + capacity_bytes - weight_bytes)
        for index, batch in enumerate(batches, first_index):
            now_bytes = malloc_bytes()
            live_bytes = None if start_bytes is None or now_bytes is None else weight_bytes + now_bytes - start_bytes
            begin = time.perf_counter()
            message, kind = "", None
            try:
                self._runner.run(batch)
            except BaseException as error:  # noqa: BLE001 the prober is told, whatever it is
                limit_data(None)
                kind, message = _understood(error)
            peak_bytes = weight_bytes + AddressSpace.now().peak_bytes - start.size_bytes
            seconds = time.perf_counter() - begin
            if kind is FailureKind.OTHER:
                os.write(pipe, pack(CaseFailed(index=index, message=message)))
                return
            result = CaseResult(
                index=index,
                outcome=Outcome.PASSED if kind is None else Outcome.OUT_OF_MEMORY,
                peak_bytes=peak_bytes if len(batches) == 1 else None,  # in a soak it is that of all steps so far
                reserved_bytes=peak_bytes,
                live_before_bytes=live_bytes,
                seconds=seconds,
                message=message,
            )
            os.write(pipe, pack(result))
            if kind is not None:
                return


def _understood(error: BaseException) -> tuple[FailureKind, str]:
    failure = classify_exception(error)
    if failure.kind is FailureKind.OTHER:
        traceback.print_exception(error)
    return failure.kind, clipped(failure.message)
