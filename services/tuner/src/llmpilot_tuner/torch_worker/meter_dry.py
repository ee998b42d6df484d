"""The `dry` probe: the LLM under fake tensors, every allocation counted and none made.

Invariant: it takes no memory and no arithmetic, whatever the size of the LLM; workspaces of kernels are not seen.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.probes.worker_messages import Order, Ready
from llmpilot_tuner.torch_worker.fake_memory import FakeMemory
from llmpilot_tuner.torch_worker.in_process import InProcess
from llmpilot_tuner.torch_worker.loading import (
    LoneCollective,
    check_weights_fit,
    library_versions,
    must_fit,
    runner_of,
    warm_up_batches,
)
from llmpilot_tuner.torch_worker.serving import CaseAnswer

_MORE_THAN_ANY_BYTES = 2**62
_NOTE = "nothing was allocated: workspaces inside kernels and the allocator's unused pieces are not in these numbers"


class FakeGauge:
    """Reads fake memory."""

    def __init__(self, memory: FakeMemory) -> None:
        self._memory = memory

    @property
    def live_bytes(self) -> int:
        """What fake tensors have now."""
        return self._memory.live_bytes

    @property
    def peak_bytes(self) -> int:
        """Most that they had since the reset."""
        return self._memory.peak_bytes

    @property
    def reserved_bytes(self) -> int | None:
        """There is no allocator."""
        return None

    def reset_peak(self) -> None:
        """Count peaks from now."""
        self._memory.reset_peak()

    def give_back(self) -> None:
        """Do nothing: nothing is held."""

    def await_step(self) -> None:
        """Do nothing: nothing runs."""

    def problem(self) -> str:
        """Return nothing: nothing can disturb it."""
        return ""


class DryMeter:
    """Runs batches under fake memory that is never left."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._memory = FakeMemory(_MORE_THAN_ANY_BYTES)  # until it is known how large the weights are
        self._runner = runner_of(order, "cpu", LoneCollective())
        self._steps = InProcess(self._runner, FakeGauge(self._memory), capacity_bytes=order.capacity_bytes)
        self._entered = ExitStack()

    def start(self) -> Ready:
        """Build the LLM out of fake weights."""
        self._entered.enter_context(self._memory)
        with must_fit(self._order):
            self._runner.load()
            check_weights_fit(self._order, self._runner.weight_bytes)
            self._memory.capacity_bytes = self._order.capacity_bytes
            self._steps.warm_up(warm_up_batches(self._order.execution))
        return Ready(device="fake", weight_bytes=self._runner.weight_bytes, versions=library_versions(), notes=[_NOTE])

    def run(self, number: int, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:  # noqa: ARG002
        """Run batches in turn."""
        yield from self._steps.run(batches, soak=soak)
