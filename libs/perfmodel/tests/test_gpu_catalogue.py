import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_perfmodel.gpu_catalogue import Gpu, GpuProfile, load_catalogue

PUBLISHED = {"V100": "V100-16GB", "T4": "T4-16GB", "A10": "A10-24GB", "A100": "A100-40GB", "H100": "H100-80GB"}
HEADER = "name,architecture,memory_gb,memory_bandwidth_gb_per_second"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mine.csv"
    path.write_text("\n".join(lines))
    return path


def violations(path: Path) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        load_catalogue(path)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_the_catalogue_holds_the_published_and_the_newer_gpus() -> None:
    assert [gpu.name for gpu in load_catalogue().gpus()] == [
        *("V100-16GB", "T4-16GB", "A10-24GB", "A100-40GB", "H100-80GB", "L4-24GB", "L40S-48GB", "A100-80GB"),
        *("H100NVL-94GB", "H200-141GB", "B200-180GB", "RTX4090-24GB", "MI300X-192GB"),
    ]


def test_every_gpu_names_its_sources() -> None:
    assert all(gpu.sources for gpu in load_catalogue().gpus())


def test_a_gpu_name_ends_with_its_memory() -> None:
    for gpu in load_catalogue().gpus():
        assert gpu.name.endswith(f"-{gpu.memory_gb:g}GB")


def test_profiles_hold_one_two_four_or_eight_gpus() -> None:
    profiles = load_catalogue().profiles()
    assert len(profiles) == 13 * 4
    assert {profile.gpu_count for profile in profiles} == {1, 2, 4, 8}


def test_a_profile_is_found_by_its_name() -> None:
    profile = load_catalogue().profile("2xA100-40GB")
    assert profile is not None
    assert (profile.name, profile.gpu.name, profile.gpu_count) == ("2xA100-40GB", "A100-40GB", 2)
    assert profile.memory_bytes == 80_000_000_000
    assert profile.gpu.memory_bandwidth_bytes_per_second == 1.555e12


@pytest.mark.parametrize("name", ["", "A100-40GB", "3xA100-40GB", "02xA100-40GB", "2xa100-40gb", "2xA100-40GB "])
def test_any_other_name_is_no_profile(name: str) -> None:
    assert load_catalogue().profile(name) is None


@pytest.mark.parametrize(
    ("wrong", "close"),
    [("2xa100-40gb", "2xA100-40GB"), ("1xH100", "1xH100-80GB"), ("4 x T4-16GB", "4xT4-16GB"), ("1xL40", "1xL40S-48GB")],
)
def test_a_close_name_is_suggested(wrong: str, close: str) -> None:
    assert close in load_catalogue().suggest(wrong)
    with pytest.raises(NotFoundError, match=close):
        load_catalogue().require(wrong)


def test_nothing_is_suggested_for_a_name_like_no_other() -> None:
    assert load_catalogue().suggest("????") == ()


def test_a100_has_no_ray_tracing_cores_and_l4_states_no_mixed_precision_rate() -> None:
    gpus = {gpu.name: gpu for gpu in load_catalogue().gpus()}
    assert gpus["A100-40GB"].rt_core_count == 0
    assert gpus["L4-24GB"].cuda_mixed_tflops is None


def test_h100_tensor_tflops_are_dense() -> None:
    """NVIDIA H100 Tensor Core GPU Architecture, 2023: 989.4 dense, 1,978.9 with sparsity."""
    gpus = {gpu.name: gpu for gpu in load_catalogue().gpus()}
    assert gpus["H100-80GB"].tensor_fp16_tflops == 989.4
    assert gpus["H100-80GB"].tensor_bf16_tflops == gpus["H200-141GB"].tensor_bf16_tflops


def test_eight_bit_rates_are_dense_and_twice_the_sixteen_bit_ones_where_there_are_any() -> None:
    """Vendors' datasheets: every tensor core that computes in 8 bits does so twice as fast, on T4 130 against 65."""
    for gpu in load_catalogue().gpus():
        sixteen = gpu.tensor_fp16_tflops or gpu.cuda_mixed_tflops or 0
        if gpu.tensor_fp8_tflops is not None:
            assert gpu.tensor_fp8_tflops == pytest.approx(2 * sixteen, rel=0.02), gpu.name
        if gpu.tensor_int8_tops is not None and gpu.name != "RTX4090-24GB":  # whose 16 bits are accumulated in 32
            assert gpu.tensor_int8_tops == pytest.approx(2 * sixteen, rel=0.02), gpu.name
    without = {gpu.name for gpu in load_catalogue().gpus() if gpu.tensor_fp8_tflops is None}
    assert without == {"V100-16GB", "T4-16GB", "A10-24GB", "A100-40GB", "A100-80GB"}


def test_the_interconnect_is_nvlink_or_sixteen_lanes_of_pcie() -> None:
    """PCI-SIG: 32 GB/s in both directions together for generation 3, 64 for 4. NVLink: datasheets."""
    nvlink = {"H100-80GB": 900, "A100-80GB": 600, "H100NVL-94GB": 600, "H200-141GB": 900, "B200-180GB": 1800}
    for gpu in load_catalogue().gpus():
        if gpu.name == "MI300X-192GB":
            assert gpu.interconnect_gb_per_second == 7 * 128  # Infinity Fabric
        elif gpu.is_nvlink:
            assert gpu.interconnect_gb_per_second == nvlink[gpu.name]
        else:
            assert gpu.interconnect_gb_per_second == {3: 32, 4: 64}[gpu.pcie_generation or 0]


def test_what_cuda_offers_is_near_the_datasheet() -> None:
    """ECC takes up to 8 % of GDDR6; HBM has up to 7 % more than 10^9 bytes to the GB."""
    for gpu in load_catalogue().gpus():
        assert 0.92 < gpu.usable_memory_bytes / gpu.memory_bytes < 1.08, gpu.name
        assert gpu.usable_memory_bytes < gpu.memory_gb * 2**30


@pytest.mark.parametrize("cell", ["0", "-900", "0.0", "nan", "inf", "fast"])
@pytest.mark.parametrize("column", ["memory_bandwidth_gb_per_second", "interconnect_gb_per_second"])
def test_a_bandwidth_that_is_none_is_one_clear_error(tmp_path: Path, column: str, cell: str) -> None:
    header = HEADER if column in HEADER else f"{HEADER},{column}"
    row = f"X1-32GB,Custom,32,{cell}" if column in HEADER else f"X1-32GB,Custom,32,1000,{cell}"
    assert violations(write(tmp_path, header, row)) == {
        f"mine.csv line 2, {column}": f"must be a plain number > 0, is {cell!r}"
    }


def test_the_published_features_are_kept(public_data: Path) -> None:
    columns = {
        "gpu_n_tensor_cores": "tensor_core_count",
        "gpu_n_rt_cores": "rt_core_count",
        "gpu_n_cuda_cores": "cuda_core_count",
        "gpu_n_sms": "sm_count",
        "gpu_n_rops": "rop_count",
        "gpu_n_tmus": "tmu_count",
        "gpu_tflops_cuda_mixed": "cuda_mixed_tflops",
        "gpu_tflops_cuda_fp32": "cuda_fp32_tflops",
        "gpu_tflops_cuda_fp64": "cuda_fp64_tflops",
        "gpu_tflops_tc_bf16": "tensor_bf16_tflops",
        "gpu_tflops_tc_fp16": "tensor_fp16_tflops",
        "gpu_tflops_tc_fp32": "tensor_fp32_tflops",
        "gpu_tflops_tc_tf32": "tensor_tf32_tflops",
        "gpu_tflops_tc_fp64": "tensor_fp64_tflops",
        "gpu_memory_capacity_gb": "memory_gb",
        "gpu_memory_bandwidth": "memory_bandwidth_gb_per_second",
        "gpu_system_interface_gen": "pcie_generation",
        "gpu_compute_capability": "compute_capability",
    }
    sparse = {"tensor_bf16_tflops", "tensor_fp16_tflops", "tensor_fp32_tflops"}
    catalogue = load_catalogue()
    with (public_data / "llm-pilot" / "gpu_features.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    for row in rows:
        count, _, published_name = row["gpu"].partition(" x ")
        profile = catalogue.require(f"{count}x{PUBLISHED[published_name]}")
        assert profile.gpu.architecture == row["gpu_architecture"]
        assert (profile.gpu.is_sxm, profile.gpu.is_nvlink) == (
            row["gpu_is_sxm"] == "True",
            row["gpu_is_nvlink"] == "True",
        )
        for column, field in columns.items():
            published = None if float(row[column]) == -1 else float(row[column])
            if published_name == "H100" and field in sparse and published is not None:
                assert getattr(profile.gpu, field) == pytest.approx(published / 2, rel=1e-3)
            else:
                assert getattr(profile.gpu, field) == published, (row["gpu"], column)


def test_a_users_gpu_is_added(tmp_path: Path) -> None:
    catalogue = load_catalogue(write(tmp_path, "# ours", HEADER, "X1-32GB,Custom,32,1000"))
    profile = catalogue.require("4xX1-32GB")
    assert profile == GpuProfile(
        gpu=Gpu(name="X1-32GB", architecture="Custom", memory_gb=32, memory_bandwidth_gb_per_second=1000), gpu_count=4
    )
    assert len(catalogue.gpus()) == 14


def test_a_users_gpu_replaces_the_bundled_one_of_its_name(tmp_path: Path) -> None:
    catalogue = load_catalogue(write(tmp_path, HEADER, "T4-16GB,Turing,15,320"))
    assert catalogue.require("1xT4-16GB").gpu.memory_gb == 15
    assert len(catalogue.gpus()) == 13


def test_every_wrong_cell_is_listed_with_its_line_and_column(tmp_path: Path) -> None:
    found = violations(
        write(
            tmp_path,
            HEADER + ",sm_count,is_sxm",
            "X1,Custom,0,nan,-1,maybe",
            "X1,,32,1e400,1.5,",
            "2xX1,Custom,32,1000,,TRUE",
            "X2,Custom,32",
            ",Custom,32,1000,,",
        )
    )
    assert set(found) == {
        *("mine.csv line 2, memory_gb", "mine.csv line 2, memory_bandwidth_gb_per_second"),
        *("mine.csv line 2, sm_count", "mine.csv line 2, is_sxm", "mine.csv line 3, architecture"),
        *("mine.csv line 3, name", "mine.csv line 3, memory_bandwidth_gb_per_second", "mine.csv line 3, sm_count"),
        *("mine.csv line 4, name", "mine.csv line 5", "mine.csv line 6, name"),
    }


def test_every_wrong_column_is_listed(tmp_path: Path) -> None:
    found = violations(write(tmp_path, "name,architecture,memory,name"))
    assert set(found) == {
        "mine.csv 'memory_gb'",
        "mine.csv 'memory_bandwidth_gb_per_second'",
        "mine.csv 'memory'",
        "mine.csv 'name'",
    }


def test_an_empty_file_lacks_every_column(tmp_path: Path) -> None:
    assert len(violations(write(tmp_path, ""))) == 4


def test_a_missing_file_is_invalid_input(tmp_path: Path) -> None:
    assert "cannot be read" in violations(tmp_path / "none.csv")[str(tmp_path / "none.csv")]


def test_a_file_that_is_not_utf8_is_invalid_input(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xff\xfe\x00")
    assert violations(path) == {str(path): "must be text in UTF-8"}


def test_a_file_that_is_not_csv_is_invalid_input(tmp_path: Path) -> None:
    assert "is not CSV" in violations(write(tmp_path, HEADER, '"X1'))["mine.csv line 2"]


@given(st.text(max_size=200))
def test_no_name_breaks_the_suggestions(name: str) -> None:
    assert len(load_catalogue().suggest(name)) <= 3
