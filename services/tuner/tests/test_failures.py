"""Every failure text known to come out of PyTorch and what lies below it, and what it is."""

import signal
from pathlib import Path

import pytest

from llmpilot_tuner.torch_worker.failures import (
    FailureKind,
    classify,
    classify_exception,
    classify_exit,
    oom_kill_count,
)
from llmpilot_tuner.torch_worker.gpu_sharing import GpuUse, parse_gpu_use, sharing_problem

OUT_OF_MEMORY, OTHER = FailureKind.OUT_OF_MEMORY, FailureKind.OTHER

MEMORY_TEXTS = [
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.20 GiB is free. Process 4 has 77.90 GiB memory in use. 24.00 GiB allowed; Of the allocated memory 3 GiB",
    "OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 63.98 GiB",
    "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call",
    "AcceleratorError: CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation",
    "RuntimeError: HIP error: out of memory",
    "RuntimeError: CUDA driver error: out of memory",
    "RuntimeError: CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "RuntimeError: CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "RuntimeError: cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "RuntimeError: Triton Error [CUDA]: out of memory",
    "RuntimeError: Triton Error [HIP]: out of memory",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 'out of memory'",
    "DistBackendError: NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    "DistBackendError: NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc 6291456 bytes",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 10240000 bytes. Error code 12 (Cannot allocate memory)",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 10240000 bytes.",
    "RuntimeError: std::bad_alloc",
    "MemoryError: std::bad_alloc",
    "MemoryError: ",
    "OSError: [Errno 12] Cannot allocate memory",
]

OTHER_TEXTS = [
    "RuntimeError: CUDA error: an illegal memory access was encountered",
    "AcceleratorError: CUDA error: misaligned address",
    "RuntimeError: CUDA error: device-side assert triggered",
    "RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "RuntimeError: CUDA error: unspecified launch failure",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable",
    "RuntimeError: CUDA driver version is insufficient for CUDA runtime version",
    "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)",
    "RuntimeError: Found no NVIDIA driver on your system",
    "Failed to initialize NVML: Driver/library version mismatch",
    "RuntimeError: No CUDA GPUs are available",
    "RuntimeError: CUDA error: invalid device ordinal",
    "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "DistBackendError: NCCL error: unhandled cuda error\nLast error:\nCuda failure 'invalid device ordinal'",
    "FileNotFoundError: [Errno 2] No such file or directory: 'model.safetensors'",
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "IndexError: index out of range in self",
    "RuntimeError: expected scalar type Half but found Float",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:9: Connection reset",
    "",
]


@pytest.mark.parametrize("text", MEMORY_TEXTS)
def test_a_failed_allocation_is_out_of_memory(text: str) -> None:
    assert classify(text).kind is OUT_OF_MEMORY


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_any_other_failure_is_not(text: str) -> None:
    assert classify(text).kind is OTHER


@pytest.mark.parametrize("text", [text for text in MEMORY_TEXTS if "DefaultCPU" in text or "std::bad_alloc" in text])
def test_beside_a_gpu_want_of_the_machines_own_memory_is_an_error(text: str) -> None:
    failure = classify(text, on_gpu=True)
    assert failure.kind is OTHER
    assert "this machine's own memory" in failure.message


def test_beside_a_gpu_want_of_its_memory_is_still_what_it_is() -> None:
    assert classify(MEMORY_TEXTS[0], on_gpu=True).kind is OUT_OF_MEMORY


def test_what_follows_a_broken_step_is_not_out_of_memory_though_it_says_so() -> None:
    text = "CUDA error: an illegal memory access was encountered\nterminate called ...\nCUDA error: out of memory"
    assert classify(text).kind is OTHER


def test_the_message_is_the_line_that_says_it() -> None:
    failure = classify("first\n  RuntimeError: CUDA error: out of memory \nmore")
    assert failure.message == "RuntimeError: CUDA error: out of memory"


def test_an_ambiguous_failure_says_what_to_look_at() -> None:
    assert "nvidia-smi" in classify("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED").message


def test_an_error_raised_from_a_failed_allocation_is_out_of_memory() -> None:
    error = ValueError("the layer could not be run")
    error.__cause__ = MemoryError()
    assert classify_exception(error).kind is OUT_OF_MEMORY


def test_an_error_raised_while_a_failed_allocation_was_handled_is_its_own() -> None:
    error = ValueError("a defect of the handler")
    error.__context__ = MemoryError()
    assert classify_exception(error).kind is OTHER


def test_a_killed_process_is_out_of_memory_only_if_the_kernel_says_so() -> None:
    assert classify_exit(-signal.SIGKILL, "", oom_kills=0) is OTHER
    assert classify_exit(-signal.SIGKILL, "CUDA out of memory", oom_kills=0) is OTHER
    assert classify_exit(-signal.SIGKILL, "", oom_kills=1) is OUT_OF_MEMORY


def test_an_abort_is_out_of_memory_only_if_it_says_so() -> None:
    assert classify_exit(-signal.SIGABRT, "what():  std::bad_alloc", oom_kills=0) is OUT_OF_MEMORY
    assert classify_exit(-signal.SIGABRT, "what():  std::logic_error", oom_kills=0) is OTHER


@pytest.mark.parametrize("exit_code", [0, 1, 3, -signal.SIGSEGV, -signal.SIGTERM, -signal.SIGBUS])
def test_any_other_end_is_no_limit_of_memory_though_the_kernel_killed_somebody(exit_code: int) -> None:
    assert classify_exit(exit_code, "", oom_kills=1) is OTHER


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


EVENTS = "low 0\nhigh 0\nmax 12\noom 7\noom_kill 3\noom_group_kill 0\n"


def test_killings_are_counted_in_the_own_cgroup(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pods/a\n", "sys/fs/cgroup/pods/a/memory.events": EVENTS}
    write(tmp_path, files | {"proc/vmstat": "pgfault 5\noom_kill 99\n"})
    assert oom_kill_count(tmp_path) == 3


def test_killings_are_counted_in_a_container_that_does_not_see_its_name(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/../../pods/a\n", "sys/fs/cgroup/memory.events": EVENTS})
    assert oom_kill_count(tmp_path) == 3


def test_killings_are_counted_in_a_cgroup_of_the_first_kind(tmp_path: Path) -> None:
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
    files = {"proc/self/cgroup": "4:memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.oom_control": control}
    write(tmp_path, files)
    assert oom_kill_count(tmp_path) == 2


def test_killings_are_counted_on_the_machine_where_there_are_no_cgroups(tmp_path: Path) -> None:
    write(tmp_path, {"proc/vmstat": "pgfault 5\noom_kill 99\n"})
    assert oom_kill_count(tmp_path) == 99
    assert oom_kill_count(tmp_path / "nowhere") == 0


def test_a_gpu_with_other_processes_is_shared() -> None:
    use = parse_gpu_use("18432, 550.54.15\n", "1234, python3, 17800\n99, /usr/bin/Xorg, 120\n")
    assert use == GpuUse(18432 << 20, "550.54.15", ("1234 python3 (17800 MiB)", "99 /usr/bin/Xorg (120 MiB)"))
    problem = sharing_problem(use)
    assert "1234 python3 (17800 MiB)" in problem
    assert "CUDA_VISIBLE_DEVICES" in problem


def test_a_gpu_that_is_used_by_processes_of_another_container_is_shared() -> None:
    assert "cannot be seen from here" in sharing_problem(GpuUse(5 << 30, "550", ()))


def test_what_a_driver_keeps_is_nobodys() -> None:
    assert sharing_problem(GpuUse(600 << 20, "550", ())) == ""


def test_a_gpu_that_tells_nothing_is_not_judged() -> None:
    assert parse_gpu_use("[N/A], 550.54.15\n", "") is None
    assert parse_gpu_use("", "") is None
