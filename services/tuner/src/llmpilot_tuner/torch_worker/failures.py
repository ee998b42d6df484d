"""Whether a failure is for want of memory.

Invariant: only a failure that says so itself, or that the kernel vouches for, is one of memory; all others are errors,
so that no error is ever taken for a limit. Sources: c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp,
ATen/cuda/Exceptions.h and ProcessGroupNCCL.cpp of PyTorch; Triton's driver.c; the CUDA and HIP error strings.
"""

import re
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class FailureKind(StrEnum):
    """What a failure is about."""

    OUT_OF_MEMORY = "out-of-memory"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    kind: FailureKind
    advice: str = ""
    is_of_host: bool = False
    """Whether it is the machine's memory that is meant, not a GPU's."""


def _memory(pattern: str, *, is_of_host: bool = False) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE | re.DOTALL), FailureKind.OUT_OF_MEMORY, is_of_host=is_of_host)


def _other(pattern: str, advice: str = "") -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE | re.DOTALL), FailureKind.OTHER, advice)


_DRIVER = "the driver and the CUDA that PyTorch was built for do not go together: update one of them"
_BROKEN_STEP = "the step itself is broken, or the GPU is: run it again with CUDA_LAUNCH_BLOCKING=1"
_RULES = (
    # What happens because something else went wrong, and may quote words of memory.
    _other(r"illegal memory access|misaligned address|cudaErrorIllegalAddress|hipErrorIllegalAddress", _BROKEN_STEP),
    _other(r"device-side assert", _BROKEN_STEP),
    _other(r"invalid device function|no kernel image is available", "this PyTorch has no kernels for this GPU"),
    _other(r"\becc\b.{0,20}error|uncorrectable", "the GPU's memory has a defect: have it looked at"),
    _other(r"fallen off the bus|unspecified launch failure|hardware stack error|\bXid\b", _BROKEN_STEP),
    _other(r"driver version is insufficient|driver/library version mismatch|NVIDIA driver on your system", _DRIVER),
    _other(r"no CUDA GPUs are available|no (CUDA|HIP|ROCm)-capable device|invalid device ordinal"),
    _other(r"device\(s\) is/are busy or unavailable", "another process has the GPU for itself"),
    # What says that an allocation failed.
    _memory(r"OutOfMemoryError"),
    _memory(r"(CUDA|HIP)( driver)?( error)?: out of memory"),
    _memory(r"(CUDA|HIP) out of memory"),
    _memory(r"(CUDA|HIP) error: (memory allocation|out_of_memory)|cudaErrorMemoryAllocation|hipErrorOutOfMemory"),
    _memory(r"CUDA_ERROR_OUT_OF_MEMORY"),
    _memory(r"Triton Error \[(CUDA|HIP)\]: out of memory"),
    _memory(r"(CU|HIP|ROC)BLAS_STATUS_ALLOC_FAILED|rocblas_status_memory_error"),
    _memory(r"CUBLASLT?_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|CUSPARSE_STATUS_ALLOC_FAILED"),
    _memory(r"CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED"),
    _memory(r"MIOPEN_STATUS_ALLOC_FAILED|miopenStatusAllocFailed"),
    _memory(r"NCCL.*(out of memory|cuda failure 2\b|failed to (CUDA )?(host )?(c?alloc|malloc)\b)"),
    _memory(r"DefaultCPUAllocator: (can't allocate memory|not enough memory)", is_of_host=True),
    _memory(r"std::bad_alloc|\bMemoryError\b|cannot allocate memory|can't allocate memory", is_of_host=True),
    # What may be either, and does not say so: an error.
    _other(
        r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED|HIPBLAS_STATUS_NOT_INITIALIZED",
        "the GPU's library did not start, which has many causes, a GPU that is full before the start among them: see "
        "with nvidia-smi that nothing else uses it, and reserve more memory for the system",
    ),
    _other(
        r"NCCL", "the GPUs could not talk to each other: run again with NCCL_DEBUG=INFO, and see that /dev/shm is large"
    ),
    _other(r"No such file|FileNotFoundError", "a file of the model is not there"),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure, understood."""

    kind: FailureKind
    message: str
    """One line: what was said, and what to do where that is known."""


HOST_MEMORY = "it is this machine's own memory that is short, not the GPU's: give the tuner more"


def classify(text: str, *, on_gpu: bool = False) -> Failure:
    """Understand the text of an exception, "OutOfMemoryError: CUDA out of memory. Tried ...", or the end of a log.

    on_gpu: the LLM is on a GPU, so that want of the machine's own memory is an error.
    """
    for rule in _RULES:
        if found := rule.pattern.search(text):
            line = _line_at(text, found.start())
            if rule.is_of_host and on_gpu:
                return Failure(FailureKind.OTHER, f"{line}; {HOST_MEMORY}")
            return Failure(rule.kind, f"{line}; {rule.advice}" if rule.advice else line)
    return Failure(FailureKind.OTHER, _line_at(text, 0))


def classify_exception(error: BaseException, *, on_gpu: bool = False) -> Failure:
    """Understand an exception and what it was raised from."""
    texts = []
    seen: BaseException | None = error
    while seen is not None:
        texts.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__
    failures = [classify(text, on_gpu=on_gpu) for text in texts]
    return next((failure for failure in failures if failure.kind is FailureKind.OUT_OF_MEMORY), failures[0])


def classify_exit(exit_code: int, log: str, *, oom_kills: int) -> FailureKind:
    """Understand how a process ended that did not say.

    log: the last of what it wrote; oom_kills: processes that the kernel ended meanwhile for want of memory. A SIGKILL
    alone says nothing: whoever sent it may have had any reason.
    """
    if exit_code == -signal.SIGKILL:
        return FailureKind.OUT_OF_MEMORY if oom_kills > 0 else FailureKind.OTHER
    if exit_code == -signal.SIGABRT:  # what C++ does about an exception that nobody takes
        return FailureKind.OUT_OF_MEMORY if "std::bad_alloc" in log else FailureKind.OTHER
    return FailureKind.OTHER


def oom_kill_count(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has ended for want of memory, in this cgroup if that is counted."""
    for path in _oom_kill_files(root):
        try:
            text = path.read_text()
        except OSError:
            continue
        if found := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
            return int(found.group(1))
    return 0


def _oom_kill_files(root: Path) -> list[Path]:
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            files.append(mount / "memory" / group.lstrip("/") / "memory.oom_control")
        elif not controllers:
            files.append(mount / group.lstrip("/") / "memory.events")
    # In a container the names of groups may be those of the host: then its own is what is mounted.
    return [*files, mount / "memory/memory.oom_control", mount / "memory.events", root / "proc/vmstat"]


def _line_at(text: str, position: int) -> str:
    line = text[text.rfind("\n", 0, position) + 1 :].lstrip().partition("\n")[0].strip()
    return line or text.strip().partition("\n")[0]
