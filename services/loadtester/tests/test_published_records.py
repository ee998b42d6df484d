import csv
import io
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_contracts.record_schema import problems
from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.spec import ServiceLevel
from llmpilot_loadtester.outputs.records_file import read_records
from llmpilot_loadtester.outputs.run_facts import RunFacts
from llmpilot_loadtester.published_records import Case, case_of, import_records, raw_files, read_case

ARCHIVE = "llm-pilot/performance_characterization_data_raw.tar.xz"
MEDIANS = "llm-pilot/expected/expected_predictions_LLM-Pilot.csv"
CASE_COUNT = 6
NAME = "results_google__flan-t5-xl_gpu2_a100_u4.csv"
HEADER = (
    "smpnum,reqnum,errors,status,model,num_users,requests,latency_ms,records,n_gpus,gpu_type,start_timestamp,"
    "end_timestamp,experiment_duration_s,n_input_tokens,n_output_tokens,latency_ms_per_token,timestamps_per_token"
)
T0 = 1_697_552_047_000
MS = 1_000_000


def line(
    *, called: int, stamps: list[int], ended: int | None, tokens: int | None, status: int = 200, errors: str = "[]"
) -> str:
    """A row of a raw file; times in ms since T0."""
    out = io.StringIO()
    latencies = np.diff([called, *stamps]).tolist()
    end = "" if ended is None else T0 + ended
    inputs = 40 if status == 200 else ""
    csv.writer(out, lineterminator="").writerow(
        [0, 7, errors, status, "x", 4, 1, "", 1, 2, "A100", T0 + called, end, 120, inputs, tokens or "", latencies,
         [T0 + stamp for stamp in stamps]]
    )  # fmt: skip
    return out.getvalue()


ROWS = (
    line(called=10, stamps=[15, 65, 75, 85], ended=86, tokens=3),
    line(called=0, stamps=[5, 105, 115], ended=115, tokens=4),
    line(called=20, stamps=[22, 30], ended=90, tokens=None, status=408, errors="['CUDA out of memory. Tried']"),
    line(called=30, stamps=[], ended=95, tokens=None, status=9999, errors="['context deadline exceeded']"),
    line(called=40, stamps=[41, 50], ended=None, tokens=None, status=408),
    line(called=50, stamps=[51], ended=70, tokens=None, status=408),
)


def content_of(rows: tuple[str, ...] = ROWS, *, unnamed_columns: int = 1) -> bytes:
    header = "," * unnamed_columns + HEADER
    return "\n".join([header, *("0," * unnamed_columns + row for row in rows), ""]).encode()


CASE = Case(llm="google/flan-t5-xl", gpu_profile="2xA100-40GB", users_count=4)


def test_name_of_a_file_tells_its_case() -> None:
    assert case_of(f"some/folder/{NAME}") == CASE
    assert case_of("results_x_gpu2_tpu_u4.csv") is None
    assert case_of("notes.csv") is None


@pytest.mark.parametrize("unnamed_columns", [1, 2])
def test_times_count_from_the_first_call_and_sends_from_the_first_message(unnamed_columns: int) -> None:
    facts, records = read_case(CASE, NAME, content_of(unnamed_columns=unnamed_columns))
    assert facts.start_unix_nanos == T0 * MS
    assert (facts.stage_index, facts.stage.load.label, facts.stage.measure_seconds) == (2, "4 users", 120.0)
    assert (records.scheduled_nanos // MS).tolist() == [10, 0, 20, 30, 40, 50]
    assert (records.send_nanos // MS).tolist() == [15, 5, 22, 30, 41, 51]
    assert records.first_byte_nanos.tolist() == [15 * MS, 5 * MS, 22 * MS, -1, 41 * MS, 51 * MS]
    assert (records.end_nanos // MS).tolist() == [86, 115, 90, 95, 50, 70]
    assert (records.chunk_nanos // MS).tolist() == [65, 75, 85, 105, 115, 30, 50]
    assert records.chunk_starts.tolist() == [0, 3, 5, 6, 6, 7, 7]
    assert problems(records.table(origin="measured")) == []


def test_tokens_without_a_message_are_counted_to_the_first() -> None:
    _, records = read_case(CASE, NAME, content_of())
    assert records.chunk_tokens[:5].tolist() == [1, 1, 1, 3, 1]
    assert records.output_tokens.tolist() == [3, 4, 1, 0, 1, 0]


def test_failures_are_named_by_what_they_say() -> None:
    _, records = read_case(CASE, NAME, content_of())
    assert records.table(origin="measured")["status"] == [
        "ok", "ok", "out_of_memory", "timeout", "cancelled", "disconnected",
    ]  # fmt: skip
    assert records.errors[2] == "['CUDA out of memory. Tried']"
    assert records.errors[:2] == ("", "")


def test_what_is_not_known_is_left_empty() -> None:
    _, records = read_case(CASE, NAME, content_of())
    table = records.table(origin="measured")
    assert set(table["user_index"]) == {None}
    assert set(table["finish_reason"]) == {None}
    assert set(table["stamp_source"]) == {"user_space"}
    assert list(table["input_token_count"]) == [40, 40, None, None, None, None]


def test_window_reaches_to_the_last_send() -> None:
    late = line(called=119_990, stamps=[120_014, 120_030], ended=120_031, tokens=1)
    facts, records = read_case(CASE, NAME, content_of((*ROWS, late)))
    assert facts.stage.measure_seconds == pytest.approx(120.015)
    assert facts.window.holds(records.send_nanos).all()


def test_every_bad_row_is_told() -> None:
    bad = line(called=0, stamps=[5, 6, 7], ended=9, tokens=1)
    broken = bad.replace('"[', '"')
    with pytest.raises(InvalidInputError) as raised:
        read_case(CASE, NAME, content_of((ROWS[0], bad, broken)))
    assert [violation.field for violation in raised.value.violations] == [f"{NAME} row 2", f"{NAME} row 3"]
    assert "2 messages with tokens cannot hold 1 tokens" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a,b\n1,2\n", "column status: is missing"), (content_of(()), "has no rows"), (b"", "column status: is missing")],
)
def test_what_is_no_raw_file_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        read_case(CASE, NAME, content)


def test_import_makes_a_file_per_llm_and_gpu_profile_with_a_stage_per_load(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in (NAME, NAME.replace("u4", "u1"), NAME.replace("gpu2", "gpu1"), NAME.replace("u4", "u8")):
        (raw / name).write_bytes(content_of())
    (raw / "other.csv").write_text("x")
    written = set(import_records(raw, tmp_path, lambda case: case.users_count < 8, RunFacts(notes=("n",))))
    assert {path.name for path in written} == {
        "google__flan-t5-xl_1xA100-40GB.parquet",
        "google__flan-t5-xl_2xA100-40GB.parquet",
    }
    file = read_records(tmp_path / "google__flan-t5-xl_2xA100-40GB.parquet")
    assert sorted((stage.stage_index, stage.label, stage.request_count) for stage in file.stages) == [
        (0, "1 user", 6),
        (2, "4 users", 6),
    ]
    assert (file.facts.served_model, file.facts.notes) == ("google/flan-t5-xl", ("n",))


def test_missing_and_broken_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="raw data"):
        list(raw_files(tmp_path / "nowhere.tar.xz", lambda _: True))
    whole = tmp_path / "a.tar.xz"
    (tmp_path / NAME).write_bytes(content_of())
    with tarfile.open(whole, "w:xz") as archive:
        archive.add(tmp_path / NAME, NAME)
    assert [case for case, _, _ in raw_files(whole, lambda _: True)] == [CASE]
    assert [name for _, name, _ in raw_files(tmp_path, lambda _: True)] == [NAME], "once, though it is in both"
    (tmp_path / NAME).unlink()
    assert [case for case, _, _ in raw_files(tmp_path, lambda _: True)] == [CASE]
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InvalidInputError, match="must be a complete tar archive"):
        list(raw_files(whole, lambda _: True))


def published_medians(path: Path) -> Iterator[tuple[tuple[str, str, int], tuple[float, float]]]:
    with path.open() as file:
        for row in csv.DictReader(file):
            gpu = row["gpu"].replace(" x ", "x")
            key = (row["model"], gpu, int(row["num_users"]))
            yield key, (float(row["median_nttft"]), float(row["median_itl"]))


def test_metrics_of_imported_records_are_the_published_ones(public_data: Path) -> None:
    """The first load tests of the archive; all 526 agree, which takes a minute."""
    expected = dict(published_medians(public_data / MEDIANS))
    seen = 0
    for case, name, content in islice(raw_files(public_data / ARCHIVE, lambda _: True), CASE_COUNT):
        facts, records = read_case(case, name, content)
        metrics = stage_metrics(records, facts.window, ServiceLevel(), seed=0)
        nttft_ms, itl_ms = expected[case.llm, case.gpu_profile.rpartition("-")[0], case.users_count]
        assert metrics.nttft.median_ms == pytest.approx(nttft_ms, rel=1e-12)
        assert metrics.itl.median_ms == itl_ms
        check_throughput(content, metrics.output_tokens_per_second, records.output_tokens[records.is_ok].sum())
        seen += 1
    assert seen == CASE_COUNT


def check_throughput(content: bytes, tokens_per_second: float, token_count: int) -> None:
    """As published, all tokens by 120 s: those that came after the window are in it; ours are those that came in it."""
    rows = [row for row in csv.DictReader(io.StringIO(content.decode())) if row["status"] == "200"]
    all_rows = csv.DictReader(io.StringIO(content.decode()))
    start = min(float(row["start_timestamp"]) for row in all_rows)
    counts = [int(float(row["n_output_tokens"])) for row in rows]
    assert token_count == sum(counts)
    in_window = 0
    for row, count in zip(rows, counts, strict=True):
        stamps = json.loads(row["timestamps_per_token"])[1:]
        came = [stamp - start < 120_000 for stamp in stamps]
        in_window += sum(came) + (count - len(stamps)) * came[0]
    assert tokens_per_second == pytest.approx(in_window / 120, rel=2e-3)  # the window may be up to .2 s longer
