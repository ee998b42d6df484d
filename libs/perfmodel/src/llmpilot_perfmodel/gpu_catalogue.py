"""The GPU types a pod can hold, with the GPU features of Sec. IV-B1, Lazuka et al., 2024.

Invariant: names are unique, and a profile name such as "2xA100-40GB" stands for exactly one GPU type and count. The
values of V100, T4, A10, A100-40GB and H100 are those of the published table, but for H100's tensor TFLOPS, which are
stated there with sparsity and here without, as for all others. Every other figure is its vendor's.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from llmpilot_contracts.errors import NotFoundError
from llmpilot_perfmodel.csv_table import CsvTable, Row, bundled_table, read_table

GPU_COUNTS = (1, 2, 4, 8)
GPU_NAME_PATTERN = re.compile(r"(?![0-9]+x)[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
BYTES_PER_GB = 10**9
BYTES_PER_GIB = 2**30
USABLE_PERCENT = 98
REQUIRED_COLUMNS = ("name", "architecture", "memory_gb", "memory_bandwidth_gb_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU type; None: not published, or the GPU has no such thing. TFLOPS are peak and dense."""

    name: str
    architecture: str
    tensor_core_count: int | None = None
    rt_core_count: int | None = None
    cuda_core_count: int | None = None
    sm_count: int | None = None
    rop_count: int | None = None
    tmu_count: int | None = None
    cuda_mixed_tflops: float | None = None
    cuda_fp32_tflops: float | None = None
    cuda_fp64_tflops: float | None = None
    tensor_bf16_tflops: float | None = None
    tensor_fp16_tflops: float | None = None
    tensor_fp32_tflops: float | None = None
    """The published table states A10's and H100's TF32 rate here; newer GPUs state it under TF32."""
    tensor_tf32_tflops: float | None = None
    tensor_fp64_tflops: float | None = None
    tensor_fp8_tflops: float | None = None
    tensor_int8_tops: float | None = None
    memory_gb: float
    """The datasheet's GB."""
    memory_bandwidth_gb_per_second: float
    """In 10^9 bytes per second."""
    usable_memory_gib: float | None = None
    """What CUDA says there is, in 2^30 bytes."""
    runtime_memory_gib: float | None = None
    """What a process takes of it beside its tensors: CUDA context, kernels and workspaces."""
    interconnect_gb_per_second: float | None = None
    """To its neighbours, both directions together as datasheets have it: NVLink or the like, else PCIe."""
    pcie_generation: int | None = None
    compute_capability: float | None = None
    is_sxm: bool | None = None
    is_nvlink: bool | None = None
    sources: str = ""
    """The public documents behind the figures."""

    @property
    def memory_bytes(self) -> int:
        """Memory of one GPU, with 10^9 bytes to the GB.

        Real GPUs offer up to 7 % more (an "A100 40GB" has 40 GiB) or, where ECC takes its share, 2 % less; see
        `usable_memory_bytes`.
        """
        return round(self.memory_gb * BYTES_PER_GB)

    @property
    def usable_memory_bytes(self) -> int:
        """What processes can have of one GPU; where nobody reported it, 98 % of the datasheet's, as on T4 and A10."""
        if self.usable_memory_gib is None:
            return self.memory_bytes * USABLE_PERCENT // 100
        return round(self.usable_memory_gib * BYTES_PER_GIB)

    @property
    def memory_bandwidth_bytes_per_second(self) -> float:
        """Memory bandwidth of one GPU."""
        return self.memory_bandwidth_gb_per_second * 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile:
    """How many GPUs of which type one pod holds."""

    gpu: Gpu
    gpu_count: int

    @property
    def name(self) -> str:
        """Name, e.g. "2xA100-40GB"."""
        return f"{self.gpu_count}x{self.gpu.name}"

    @property
    def memory_bytes(self) -> int:
        """Memory of all GPUs of the profile."""
        return self.gpu_count * self.gpu.memory_bytes


class GpuCatalogue:
    """The GPU types and the profiles made of 1, 2, 4 or 8 of them."""

    def __init__(self, gpus: Iterable[Gpu]) -> None:
        self._gpus = {gpu.name: gpu for gpu in gpus}
        profiles = [GpuProfile(gpu=gpu, gpu_count=count) for gpu in self._gpus.values() for count in GPU_COUNTS]
        self._profiles = {profile.name: profile for profile in profiles}

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPU types in the order of the table."""
        return tuple(self._gpus.values())

    def profiles(self) -> tuple[GpuProfile, ...]:
        """Return every profile, GPU type by GPU type."""
        return tuple(self._profiles.values())

    def profile(self, name: str) -> GpuProfile | None:
        """Return the profile of exactly that name."""
        return self._profiles.get(name)

    def require(self, name: str) -> GpuProfile:
        """Return the profile of exactly that name; raise `NotFoundError` with close names if there is none."""
        profile = self.profile(name)
        if profile is None:
            close = self.suggest(name)
            hint = f"did you mean {' or '.join(close)}?" if close else 'a name reads like "2xA100-40GB"'
            raise NotFoundError("GPU profile", name[:80], hint=hint)
        return profile

    def suggest(self, name: str) -> tuple[str, ...]:
        """Return up to three profile names close to a wrong one, the closest first."""
        by_folded = {known.casefold(): known for known in self._profiles}
        close = difflib.get_close_matches(name[:64].casefold(), by_folded, n=3, cutoff=0.5)
        return tuple(by_folded[folded] for folded in close)


def load_catalogue(path: Path | None = None) -> GpuCatalogue:
    """Return the bundled catalogue; a user's CSV of the same columns adds GPU types or replaces those of its names.

    Only name, architecture, memory_gb and memory_bandwidth_gb_per_second must be stated.
    """
    gpus = _parse(bundled_table("gpus.csv"), label="gpus.csv")
    if path is not None:
        gpus |= _parse(read_table(path), label=path.name)
    return GpuCatalogue(gpus.values())


def _parse(text: str, *, label: str) -> dict[str, Gpu]:
    optional = tuple(field.name for field in fields(Gpu) if field.name not in REQUIRED_COLUMNS)
    table = CsvTable(text, label=label, required=REQUIRED_COLUMNS, optional=optional)
    gpus: dict[str, Gpu] = {}
    for row in table.rows():
        gpu = _gpu(row)
        if gpu.name and not GPU_NAME_PATTERN.fullmatch(gpu.name):
            table.refuse(row.line, "name", f'must be a name such as "A100-40GB", is {gpu.name[:80]!r}')
        if gpu.name in gpus:
            table.refuse(row.line, "name", f"{gpu.name} appears more than once")
        gpus[gpu.name] = gpu
    table.raise_violations()
    return gpus


def _gpu(row: Row) -> Gpu:
    return Gpu(
        name=row.text("name"),
        architecture=row.text("architecture"),
        tensor_core_count=row.count("tensor_core_count"),
        rt_core_count=row.count("rt_core_count"),
        cuda_core_count=row.count("cuda_core_count"),
        sm_count=row.count("sm_count"),
        rop_count=row.count("rop_count"),
        tmu_count=row.count("tmu_count"),
        cuda_mixed_tflops=row.number("cuda_mixed_tflops"),
        cuda_fp32_tflops=row.number("cuda_fp32_tflops"),
        cuda_fp64_tflops=row.number("cuda_fp64_tflops"),
        tensor_bf16_tflops=row.number("tensor_bf16_tflops"),
        tensor_fp16_tflops=row.number("tensor_fp16_tflops"),
        tensor_fp32_tflops=row.number("tensor_fp32_tflops"),
        tensor_tf32_tflops=row.number("tensor_tf32_tflops"),
        tensor_fp64_tflops=row.number("tensor_fp64_tflops"),
        tensor_fp8_tflops=row.number("tensor_fp8_tflops"),
        tensor_int8_tops=row.number("tensor_int8_tops"),
        memory_gb=row.number("memory_gb") or 0,
        memory_bandwidth_gb_per_second=row.number("memory_bandwidth_gb_per_second") or 0,
        usable_memory_gib=row.number("usable_memory_gib"),
        runtime_memory_gib=row.number("runtime_memory_gib"),
        interconnect_gb_per_second=row.number("interconnect_gb_per_second"),
        pcie_generation=row.count("pcie_generation"),
        compute_capability=row.number("compute_capability"),
        is_sxm=row.flag("is_sxm"),
        is_nvlink=row.flag("is_nvlink"),
        sources=row.text("sources"),
    )
