import csv
import threading
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_recommender.dataset_file import BUNDLED_DATASET, write_dataset
from llmpilot_recommender.dataset_import import import_raw
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.raw_source import PROVENANCE

RAW = "llm-pilot/performance_characterization_data_raw.tar.xz"
MEDIANS = "llm-pilot/expected/expected_predictions_LLM-Pilot.csv"

HEADER = (
    "status,errors,model,num_users,n_gpus,gpu_type,experiment_duration_s,n_input_tokens,n_output_tokens,"
    "latency_ms_per_token"
)
COMMAND = "llm-pilot dataset import PATH --published-medians expected_predictions_LLM-Pilot.csv --out FILE"
MEDIANS_HEADER = "model,gpu,num_users,median_nttft,median_itl"


def add_load_test(folder: Path, users_count: int, *, ttft_ms: object = 50, name: str = "") -> None:
    (folder / (name or f"{users_count:03}.csv")).write_text(
        f'{HEADER}\n200,[],llama-7b,{users_count},1,T4,120,10,2,"[8, {ttft_ms}, 20]"\n', encoding="utf-8"
    )


def violations(path: Path, medians: Path | None = None) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        import_raw(path, published_medians=medians)
    return [str(violation) for violation in caught.value.violations]


def test_measurements_are_ordered_by_users_not_by_file(tmp_path: Path) -> None:
    for users_count in (16, 2, 128):
        add_load_test(tmp_path, users_count)
    assert [row.users_count for row in import_raw(tmp_path)] == [2, 16, 128]


def test_progress_counts_every_file(tmp_path: Path) -> None:
    for users_count in range(1, 21):
        add_load_test(tmp_path, users_count)
    reports: list[tuple[int, int | None]] = []
    import_raw(tmp_path, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(done, 20) for done in range(1, 21)]


def test_interrupt_ends_the_import_and_leaves_no_thread(tmp_path: Path) -> None:
    for users_count in range(1, 21):
        add_load_test(tmp_path, users_count)

    def interrupt(done: int, _total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_raw(tmp_path, progress=interrupt)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("dataset-import")] == []


def test_folder_without_a_csv_is_rejected(tmp_path: Path) -> None:
    assert violations(tmp_path) == [f"{tmp_path}: has no CSV file; give the folder or archive of the raw records"]


def test_problems_of_all_files_are_listed(tmp_path: Path) -> None:
    add_load_test(tmp_path, 1)
    add_load_test(tmp_path, 2, ttft_ms="x")
    add_load_test(tmp_path, 3, ttft_ms="-1")
    assert [violation.split(",")[0] for violation in violations(tmp_path)] == ["002.csv row 1", "003.csv row 1"]


def test_no_more_than_fifty_problems_are_listed(tmp_path: Path) -> None:
    for users_count in range(1, 61):
        add_load_test(tmp_path, users_count, ttft_ms="x")
    listed = violations(tmp_path)
    assert len(listed) == 51
    assert listed[-1] == "raw data: has 10 more problems"


def test_load_test_in_two_files_is_rejected(tmp_path: Path) -> None:
    add_load_test(tmp_path, 4, name="a.csv")
    add_load_test(tmp_path, 4, name="b.csv")
    assert violations(tmp_path) == [
        "b.csv: repeats the load test ('llama-7b', '1xT4-16GB', 4); remove one of the two files"
    ]


def test_published_median_fills_in_only_what_has_no_records(tmp_path: Path) -> None:
    add_load_test(tmp_path, 4)
    medians = tmp_path / "medians"
    medians.write_text(f"{MEDIANS_HEADER}\nllama-7b,1 x T4,4,1,1\nllama-7b,4 x H100,128,5.25,53\n", encoding="utf-8")
    measured, published = import_raw(tmp_path, published_medians=medians)
    assert (measured.origin, measured.itl.median_ms) == (Origin.MEASURED, 20)
    assert published == Measurement(
        llm="llama-7b",
        gpu_profile="4xH100-80GB",
        users_count=128,
        origin=Origin.PUBLISHED_MEDIAN,
        nttft=Quantiles(median_ms=5.25),
        itl=Quantiles(median_ms=53),
    )


def test_every_bad_published_median_is_named(tmp_path: Path) -> None:
    add_load_test(tmp_path, 4)
    medians = tmp_path / "medians"
    medians.write_text(f"{MEDIANS_HEADER}\nllama-7b,4 x B200,0,nan,-1\n,1 x T4,4,x\n", encoding="utf-8")
    assert [violation.split(":")[0] for violation in violations(tmp_path, medians)] == [
        "medians row 1, column gpu",
        "medians row 1, column num_users",
        "medians row 1, column median_nttft",
        "medians row 1, column median_itl",
        "medians row 2, column model",
        "medians row 2, column median_nttft",
        "medians row 2, column median_itl",
    ]


def test_published_medians_without_their_columns_are_rejected(tmp_path: Path) -> None:
    add_load_test(tmp_path, 4)
    medians = tmp_path / "medians"
    medians.write_text("model,gpu,median_itl\n", encoding="utf-8")
    assert violations(tmp_path, medians) == [
        "medians column num_users: missing",
        "medians column median_nttft: missing",
    ]


def test_missing_published_medians_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="published table"):
        import_raw(tmp_path, published_medians=tmp_path / "none.csv")


@pytest.fixture(scope="session")
def imported(public_data: Path) -> tuple[Measurement, ...]:
    return import_raw(public_data / RAW, published_medians=public_data / MEDIANS)


def test_all_medians_are_the_published_ones(imported: tuple[Measurement, ...], public_data: Path) -> None:
    gpu_names = {"A10": "24GB", "A100": "40GB", "H100": "80GB", "T4": "16GB", "V100": "16GB"}
    published = {}
    with (public_data / MEDIANS).open(encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            count, gpu_type = cells["gpu"].split(" x ")
            key = cells["model"], f"{count}x{gpu_type}-{gpu_names[gpu_type]}", int(cells["num_users"])
            published[key] = float(cells["median_nttft"]), float(cells["median_itl"])
    assert len(published) == len(imported) == 528
    for row in imported:
        nttft_ms, itl_ms = published[row.key]
        assert row.nttft.median_ms == pytest.approx(nttft_ms, rel=1e-9), row.key
        assert row.itl.median_ms == itl_ms, row.key


@pytest.mark.parametrize(
    ("key", "ttft_ms", "throughput"),
    [  # the rows that the published notebook (Preprocess_data.ipynb) shows
        (("EleutherAI/gpt-neox-20b", "1xH100-80GB", 1), 44, 50.166667),
        (("EleutherAI/gpt-neox-20b", "1xH100-80GB", 2), 59, 88.4),
        (("EleutherAI/gpt-neox-20b", "1xH100-80GB", 4), 82, 142.15),
        (("EleutherAI/gpt-neox-20b", "1xH100-80GB", 8), 141, 220.375),
        (("EleutherAI/gpt-neox-20b", "1xH100-80GB", 16), 232, 312.675),
        (("llama-7b", "4xT4-16GB", 8), 176, 168.425),
        (("llama-7b", "4xT4-16GB", 16), 316, 231.333333),
        (("llama-7b", "4xT4-16GB", 32), 534, 279.108333),
        (("llama-7b", "4xT4-16GB", 64), 1020, 296.533333),
        (("llama-7b", "4xT4-16GB", 128), 2036, 274.266667),
    ],
)
def test_ttft_and_throughput_are_the_published_ones(
    imported: tuple[Measurement, ...], key: tuple[str, str, int], ttft_ms: float, throughput: float
) -> None:
    (row,) = (row for row in imported if row.key == key)
    assert row.ttft.median_ms == ttft_ms
    assert row.throughput_tokens_per_second == pytest.approx(throughput, abs=5e-7)


def test_failures_hidden_in_the_published_medians_are_counted(imported: tuple[Measurement, ...]) -> None:
    measured = [row for row in imported if row.origin is Origin.MEASURED]
    assert len(measured) == 526
    assert sum(row.request_count or 0 for row in measured) == 829_495
    assert sum(row.error_count or 0 for row in measured) == 34_357
    assert sum(row.oom_count or 0 for row in measured) == 27_102
    assert sum((row.error_rate or 0) > 0.1 for row in measured) == 33


def test_the_published_cheapest_gpu_of_llama_13b_loses_most_requests(imported: tuple[Measurement, ...]) -> None:
    rates = {row.users_count: row.error_rate for row in imported if row.key[:2] == ("llama-13b", "1xA100-40GB")}
    assert [round(100 * (rates[users_count] or 0)) for users_count in (32, 64, 128)] == [49, 80, 57]


def test_only_two_load_tests_are_published_medians(imported: tuple[Measurement, ...]) -> None:
    assert [row.key for row in imported if row.origin is Origin.PUBLISHED_MEDIAN] == [
        ("bigcode/starcoder", "4xH100-80GB", 128),
        ("llama-7b", "4xH100-80GB", 128),
    ]


def test_bundled_dataset_is_a_fresh_import_byte_for_byte(imported: tuple[Measurement, ...], tmp_path: Path) -> None:
    path = tmp_path / "characterization.csv"
    write_dataset(path, imported, {**PROVENANCE, "command": COMMAND})
    assert path.read_bytes() == BUNDLED_DATASET.read_bytes()


def test_bundled_licence_is_the_published_text(public_data: Path) -> None:
    licence = public_data / "llm-pilot" / "LICENSE-DATA.md"
    assert BUNDLED_DATASET.with_name("LICENSE-DATA.md").read_bytes() == licence.read_bytes()
