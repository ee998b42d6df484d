"""The `torch` probe: the LLM on a GPU, of which PyTorch may use a part.

PyTorch's allocator is held to the capacity (`set_per_process_memory_fraction`), so that one big GPU can stand for
smaller ones. What is beside it, the CUDA context, kernels that are loaded when they are first used and NCCL's buffers,
is read from the driver: what is reserved for the system is for it, and what it has more is taken off the capacity.

Invariant: the GPU is nobody else's; PyTorch's memory and all beside it never pass the memory of the GPU that is meant.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.probes.worker_messages import Order, Ready
from llmpilot_tuner.torch_worker.gpu_sharing import USED_TOLERANCE_BYTES, GpuUse, gpu_use, sharing_problem
from llmpilot_tuner.torch_worker.in_process import InProcess
from llmpilot_tuner.torch_worker.loading import (
    check_weights_fit,
    library_versions,
    must_fit,
    runner_of,
    warm_up_batches,
)
from llmpilot_tuner.torch_worker.ranks import Ranks
from llmpilot_tuner.torch_worker.serving import CaseAnswer

_FREE_SECONDS = 15.0
"""For the driver to take back the memory of a worker that was killed."""
_POLL_SECONDS = 0.5
_NOTE = "PyTorch's allocator rounds every tensor up to 512 bytes; it does so in what is measured, not in the weights"


class CudaGauge:
    """Reads the memory of a GPU from PyTorch and from the driver, and holds PyTorch to its part."""

    def __init__(self, device: int, *, capacity_bytes: int, reserved_bytes: int) -> None:
        self._device = device
        self._capacity_bytes = capacity_bytes
        self._reserved_bytes = reserved_bytes
        self._beside_at_start_bytes = 0

    def start(self) -> None:
        """Take whatever is beside PyTorch from now on for somebody else's, if it is much."""
        self._beside_at_start_bytes = self._beside_bytes()

    def hold(self) -> None:
        """Let PyTorch's allocations fail that would take it beyond what is left of the capacity."""
        _, total_bytes = torch.cuda.mem_get_info(self._device)
        left_bytes = max(self._capacity_bytes - self._not_provided_bytes(), 0)
        torch.cuda.set_per_process_memory_fraction(min(left_bytes / total_bytes, 1.0), self._device)

    def _beside_bytes(self) -> int:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return int(total_bytes - free_bytes - torch.cuda.memory_reserved(self._device))

    def _not_provided_bytes(self) -> int:
        """Return what is beside PyTorch and has no room in what is reserved for the system."""
        return max(self._beside_bytes() - self._reserved_bytes, 0)

    @property
    def live_bytes(self) -> int:
        """What tensors have now."""
        return int(torch.cuda.memory_allocated(self._device))

    @property
    def peak_bytes(self) -> int:
        """Most that tensors had since the reset."""
        return int(torch.cuda.max_memory_allocated(self._device))

    @property
    def reserved_bytes(self) -> int | None:
        """Most that the allocator held since the reset, and what is beside it and has no room in the reserve."""
        return int(torch.cuda.max_memory_reserved(self._device)) + self._not_provided_bytes()

    def reset_peak(self) -> None:
        """Count peaks from now, and hold PyTorch to what is left for it now."""
        self.hold()
        torch.cuda.reset_peak_memory_stats(self._device)

    def give_back(self) -> None:
        """Give cached blocks back to the driver."""
        torch.cuda.empty_cache()

    def await_step(self) -> None:
        """Wait for the GPU; raises what its kernels did wrong."""
        torch.cuda.synchronize(self._device)

    def problem(self) -> str:
        """Return that somebody else has come onto the GPU, if so."""
        grown_bytes = self._beside_bytes() - self._beside_at_start_bytes
        if grown_bytes <= USED_TOLERANCE_BYTES:
            return ""
        return (
            f"beside PyTorch the GPU holds {grown_bytes:,} bytes more than at the start: another process has "
            "come onto it; end it and tune again"
        )


class CudaMeter:
    """Runs batches on the GPU of this rank."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._ranks = Ranks(
            "nccl",
            rank=order.rank,
            rank_count=order.rank_count,
            folder=Path(order.meeting_folder),
        )
        self._runner = runner_of(order, f"cuda:{order.rank}", self._ranks)
        self._gauge = CudaGauge(order.rank, capacity_bytes=order.capacity_bytes, reserved_bytes=order.reserved_bytes)
        self._steps = InProcess(self._runner, self._gauge, capacity_bytes=order.capacity_bytes, on_gpu=True)

    def start(self) -> Ready:
        """Take the GPU, load the LLM, meet the other ranks and warm up."""
        _check_gpus(self._order.rank_count)
        properties = torch.cuda.get_device_properties(self._order.rank)
        use = _use_when_free(properties)
        torch.cuda.set_device(self._order.rank)
        self._check_room(int(properties.total_memory), use)
        self._gauge.hold()
        with must_fit(self._order, on_gpu=True):
            self._runner.load()
            check_weights_fit(self._order, self._runner.weight_bytes)
            self._ranks.meet("start")
            self._steps.warm_up(warm_up_batches(self._order.execution))
        self._gauge.start()
        versions = [*library_versions(), ("cuda", str(torch.version.cuda or torch.version.hip))]
        if use is not None:
            versions.append(("driver", use.driver))
        notes = [_NOTE] if use is not None else [_NOTE, "nvidia-smi is not there: only memory shows who shares the GPU"]
        return Ready(device=properties.name, weight_bytes=self._runner.weight_bytes, versions=versions, notes=notes)

    def run(self, number: int, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:  # noqa: ARG002
        """Run batches in turn."""
        yield from self._steps.run(batches, soak=soak)

    def _check_room(self, total_bytes: int, use: GpuUse | None) -> None:
        capacity_bytes = self._order.capacity_bytes
        if capacity_bytes > total_bytes:
            raise PreconditionError(
                f"the GPU has {total_bytes:,} bytes and cannot stand for one where {capacity_bytes:,} may be used: "
                "choose a larger one, or use --probe dry"
            )
        free_bytes, _ = torch.cuda.mem_get_info(self._order.rank)
        if use is None:
            problem = sharing_problem(GpuUse(total_bytes - int(free_bytes), "", ()))
            if problem:
                raise PreconditionError(problem)
        if capacity_bytes > free_bytes:
            raise PreconditionError(
                f"the GPU has {int(free_bytes):,} free bytes of {total_bytes:,}, and {capacity_bytes:,} may be used: "
                "reserve more memory for the system, or use --probe dry"
            )


def _check_gpus(rank_count: int) -> None:
    if not torch.cuda.is_available():
        raise PreconditionError(
            "PyTorch sees no GPU here: use --probe dry, which needs none, cpu for a small LLM, or analytic"
        )
    if torch.cuda.device_count() < rank_count:
        raise PreconditionError(
            f"{rank_count} GPUs are needed and {torch.cuda.device_count()} are here: use --probe dry or analytic"
        )


def _use_when_free(properties: object) -> GpuUse | None:
    """Return what is used before this process has a context there; PreconditionError: the GPU is shared."""
    uuid = str(getattr(properties, "uuid", ""))
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    deadline = time.monotonic() + _FREE_SECONDS
    while (use := gpu_use(uuid)) is not None and (problem := sharing_problem(use)):
        if time.monotonic() > deadline:
            raise PreconditionError(problem)
        time.sleep(_POLL_SECONDS)
    return use
