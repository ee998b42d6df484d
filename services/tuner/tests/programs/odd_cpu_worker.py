"""The real cpu worker, but that some cases of a batch misbehave."""

import ctypes
import resource
import sys

import torch

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.probes.worker_messages import Order
from llmpilot_tuner.torch_worker.address_space import AddressSpace
from llmpilot_tuner.torch_worker.forward import StepRunner
from llmpilot_tuner.torch_worker.meter_cpu import CpuMeter
from llmpilot_tuner.torch_worker.serving import serve

UNREADABLE_BYTES = 8 << 20
LEAK_BYTES = 2 << 20
GENEROUS_BYTES = 64 << 20
"""More than the capacity of the tests."""


class OddSteps(StepRunner):
    """Steps whose case says how they go."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._kept: list[torch.Tensor] = []

    @property
    def weight_bytes(self) -> int:
        """Of the LLM."""
        return self._runner.weight_bytes

    def load(self) -> None:
        """Load the LLM."""
        self._runner.load()

    def run(self, batch: Batch) -> None:
        """Run a step, or what its case says."""
        match batch.case:
            case "vague":  # as oneDNN does
                try:
                    self._runner.run(batch)
                except RuntimeError:
                    raise RuntimeError("could not create a primitive") from None
            case "crash":  # as a library does that never looks at what malloc says
                try:
                    self._runner.run(batch)
                except RuntimeError:
                    ctypes.string_at(0)
            case "early":  # as a library does that wants more than it then uses
                self._runner.run(batch)
                if resource.getrlimit(resource.RLIMIT_DATA)[0] - AddressSpace.now().data_bytes < GENEROUS_BYTES:
                    raise RuntimeError("could not create a primitive")
            case "broken":
                raise RuntimeError("could not create a primitive")
            case "leak":
                self._kept.append(torch.empty(LEAK_BYTES, dtype=torch.uint8))
                self._runner.run(batch)
            case _:
                self._runner.run(batch)


class OddCpuMeter(CpuMeter):
    """Runs odd steps."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self._runner = OddSteps(self._runner)


if __name__ == "__main__":
    sys.exit(serve(OddCpuMeter))
