"""Tensors without memory, and a meter that counts what they would take.

Invariant: a storage counts from the operation that makes it until nothing refers to it; views and in-place operations
cost nothing. An operation that is made of others is taken apart, so that what it needs for a moment counts too;
attention is not, for its kernels are one piece (`fake_kernels`). Source: torch's FakeTensorMode.
"""

import weakref
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmpilot_tuner.torch_worker.fake_kernels import KERNELS

CUDA_ROUNDING_BYTES = 512
"""CUDA's caching allocator gives out multiples of it."""

_LINEAR = torch.ops.aten.linear.default
_ONE_STORAGE = {
    torch.ops.aten.chunk.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.reshape.default,
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype,
    torch.ops.aten.unflatten.int,
}
"""Made of others, but what comes out, or what it is a view of, is all that they make; taking them apart costs time."""

_ACTIVE: ContextVar["FakeMemory | None"] = ContextVar("fake_memory", default=None)


class FakeMemory:
    """Within it, tensors are fake and counted; raises torch.OutOfMemoryError where they would not fit.

    rounding_bytes: what allocations are rounded to, by a GPU's allocator; 0 is a CPU, also in the kernels it has.
    shortcuts: whether a step may leave out what is known to take the same memory again.
    """

    def __init__(
        self, capacity_bytes: int, *, rounding_bytes: int = CUDA_ROUNDING_BYTES, shortcuts: bool = True
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self.rounding_bytes = rounding_bytes
        self.shortcuts = shortcuts
        self._counted: dict[int, weakref.finalize[..., Any]] = {}
        self._fake = FakeTensorMode()
        self._meter = _Meter(self)

    @staticmethod
    def active() -> "FakeMemory | None":
        """Return the one that the caller is within, or None where tensors are real."""
        return _ACTIVE.get()

    @property
    def is_gpu(self) -> bool:
        """Whether the memory stands for that of a GPU."""
        return self.rounding_bytes > 0

    def __enter__(self) -> Self:
        self._token = _ACTIVE.set(self)
        self._fake.__enter__()
        self._meter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._meter.__exit__(*error)
        self._fake.__exit__(*error)
        _ACTIVE.reset(self._token)

    def reset_peak(self) -> None:
        """Measure the peak anew, from what is alive now."""
        self.peak_bytes = self.live_bytes

    def count(self, tensor: Any) -> None:
        """Count the storage of a tensor, unless it is counted; raises torch.OutOfMemoryError."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted or (isinstance(tensor, FakeTensor) and tensor.fake_device.type == "meta"):
            return
        unit = self.rounding_bytes
        byte_count = storage.nbytes()
        if unit:
            byte_count = -(-byte_count // unit) * unit
        if self.live_bytes + byte_count > self.capacity_bytes:
            raise torch.OutOfMemoryError(
                f"fake memory: {self.live_bytes} of {self.capacity_bytes} bytes are taken, {byte_count} more do not fit"
            )
        self.live_bytes += byte_count
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._counted[key] = weakref.finalize(storage, self._free, key, byte_count)

    def _free(self, key: int, byte_count: int) -> None:
        del self._counted[key]
        self.live_bytes -= byte_count


class _Meter(TorchDispatchMode):  # type: ignore[misc]
    """Sees every operation before it is faked."""

    def __init__(self, memory: FakeMemory) -> None:
        super().__init__()
        self._memory = memory
        self._is_compound: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kernel = KERNELS.get(func)
        if kernel is not None:
            with self:
                return kernel(*args, **(kwargs or {}), is_gpu=self._memory.is_gpu)
        if self._compound(func) and not (func is _LINEAR and args[0].is_contiguous()):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._memory.count(result)
        elif isinstance(result, (list, tuple)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._memory.count(item)
        return result

    def _compound(self, func: Any) -> bool:
        found = self._is_compound.get(func)
        if found is None:
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            is_composite = func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd")
            found = is_composite and func not in _ONE_STORAGE
            self._is_compound[func] = found
        return found
