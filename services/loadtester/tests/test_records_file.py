import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_contracts.record_schema import COLUMN_NAMES, STATUSES, problems
from llmpilot_loadtester.domain.records import RecordBatch, empty_records
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    LoadTestSpec,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
)
from llmpilot_loadtester.outputs.records_file import METADATA_KEY, read_records, write_records
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts, facts_of_spec, newest_attempts

TTFT_SECONDS, ITL_SECONDS = 0.05, 0.01
UNKNOWN_CODE = -1


def streams(*, users_count: int, tokens_count: int, seconds: float, seed: int = 0) -> RecordBatch:
    """Users who each send when the last reply has come; tokens come as planned plus an exponential 100 us."""
    generator = np.random.default_rng(seed)
    sends, users, chunks = [], [], []
    for user in range(users_count):
        send = generator.uniform(0, TTFT_SECONDS + tokens_count * ITL_SECONDS)
        while send < seconds:
            planned = send + TTFT_SECONDS + ITL_SECONDS * np.arange(tokens_count)
            sends.append(send)
            users.append(user)
            chunks.append(np.sort(planned + generator.exponential(1e-4, tokens_count)))
            send = chunks[-1][-1] + 5e-4
    order = np.argsort(sends)
    chunk_nanos = (np.concatenate([chunks[row] for row in order]) * 1e9).astype(np.int64)
    starts = np.arange(len(order) + 1, dtype=np.int64) * tokens_count
    send_nanos = (np.array(sends)[order] * 1e9).astype(np.int64)
    some = np.arange(len(order)) % 3
    status = np.where(some == 1, STATUSES.index("timeout"), 0)
    return RecordBatch(
        request_index=np.arange(len(order)),
        user_index=np.where(some == 2, UNKNOWN_CODE, np.array(users)[order]),
        scheduled_nanos=send_nanos - 1000,
        send_nanos=send_nanos,
        first_byte_nanos=np.where(some == 1, UNKNOWN_CODE, send_nanos + 7),
        end_nanos=chunk_nanos[starts[1:] - 1] + 11,
        input_tokens=np.where(some == 2, UNKNOWN_CODE, 128 + some),
        reasoning_tokens=np.where(some == 2, 5, UNKNOWN_CODE),
        token_count_source=some,
        status=status,
        finish_reason=np.where(some == 1, UNKNOWN_CODE, 1),
        stamp_source=some % 2,
        errors=tuple("it broke ✗" if code else "" for code in status),
        chunk_starts=starts,
        chunk_nanos=chunk_nanos,
        chunk_tokens=np.ones(len(chunk_nanos), np.int64),
    )


def stage_of(index: int, *, users_count: int = 4, attempt: int = 1) -> StageFacts:
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=users_count),))
    return StageFacts(
        stage_index=index,
        attempt=attempt,
        stage=Stage(load=load, warm_up_seconds=1.0, measure_seconds=2.5),
        start_unix_nanos=1_763_740_000_123_456_789,
        verdict=Verdict(is_valid=index == 0, reasons=() if index == 0 else ("too slow",), notes=("a note",)),
        llm="llama-13b",
        gpu_profile="1xA100-40GB",
    )


def same(batch: RecordBatch, other: RecordBatch) -> bool:
    return all(np.array_equal(getattr(batch, field.name), getattr(other, field.name)) for field in fields(RecordBatch))


def test_what_is_read_is_what_was_written_to_the_nanosecond(tmp_path: Path) -> None:
    facts = RunFacts(name="loadTests/a", seed=7, service_level=ServiceLevel(ttft_ms=100.0), notes=("hm",))
    stages = [
        (stage_of(0), streams(users_count=4, tokens_count=5, seconds=1.0)),
        (stage_of(1, users_count=8), empty_records()),
        (stage_of(1, attempt=2), streams(users_count=2, tokens_count=9, seconds=1.0, seed=1)),
    ]
    write_records(tmp_path / "r.parquet", facts, stages)
    file = read_records(tmp_path / "r.parquet")
    assert replace(file.facts, stages=()) == facts
    assert file.stages == tuple(replace(stage, request_count=len(batch)) for stage, batch in stages)
    for read, (_, batch) in zip(file.stages, stages, strict=True):
        assert same(file.records(read), batch)
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 3


def test_another_reader_finds_plain_lists_in_the_record_schema(tmp_path: Path) -> None:
    batch = streams(users_count=3, tokens_count=6, seconds=1.0)
    write_records(tmp_path / "r.parquet", RunFacts(simulated=True), [(stage_of(0), batch)])
    table = pl.read_parquet(tmp_path / "r.parquet")
    assert problems({name: table[name].to_list() for name in COLUMN_NAMES}) == []
    assert table.columns[:6] == ["stage_index", "attempt", "load", "users_count", "llm", "gpu_profile"]
    assert table.row(0)[:6] == (0, 1, "4 users", 4, "llama-13b", "1xA100-40GB")
    assert set(table["origin"]) == {"simulated"}
    assert table["chunk_time_nanos"][2].to_list() == batch.chunk_nanos[12:18].tolist()


def test_arrivals_take_at_most_four_bytes_a_token(tmp_path: Path) -> None:
    """128 users, 100 tokens each, 10 ms and 100 us of jitter: 17 bits a gap are noise, so less than 2 is impossible."""
    batch = streams(users_count=128, tokens_count=100, seconds=20.0)
    write_records(tmp_path / "r.parquet", RunFacts(), [(stage_of(0, users_count=128), batch)])
    assert 2 < (tmp_path / "r.parquet").stat().st_size / len(batch.chunk_nanos) < 4


def test_file_holds_no_secret(tmp_path: Path) -> None:
    target = Target(
        url="https://me:secret1@host:8000/v1?key=secret2#secret3",
        api_key="secret4",
        headers=(("x-key", "secret5"),),
        served_model="m",
    )
    spec = LoadTestSpec(target=target, requests=SyntheticRequests(input_tokens=10, output_tokens=20))
    facts = facts_of_spec(spec, tool_version="1", created_unix_nanos=1)
    write_records(tmp_path / "r.parquet", facts, [(stage_of(0), empty_records())])
    assert facts.target_url == "https://host:8000/v1"
    assert b"secret" not in (tmp_path / "r.parquet").read_bytes()
    assert b"secret" not in pq.read_metadata(tmp_path / "r.parquet").metadata[METADATA_KEY]


def test_last_attempt_at_a_stage_counts() -> None:
    stages = [stage_of(1), stage_of(0, attempt=2), stage_of(0), stage_of(1, attempt=2)]
    assert newest_attempts(stages) == (stage_of(0, attempt=2), stage_of(1, attempt=2))


FULL_DISK = """
import resource, sys
from pathlib import Path
from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.outputs.records_file import read_records, write_records

path = Path(sys.argv[1])
file = read_records(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_records(path, file.facts, [(stage, file.records(stage)) for stage in file.stages])
except PreconditionError as error:
    sys.exit(str(error))
"""
"""A process that may write files of so many bytes only, as on a disk that is nearly full."""


def test_full_disk_is_said_and_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, RunFacts(), [(stage_of(0), streams(users_count=9, tokens_count=50, seconds=2.0))])
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == f"{path} cannot be written: File too large\n"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="records file"):
        read_records(tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("kept_bytes", [0, 4, 500, -1])
def test_file_that_was_cut_off_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, RunFacts(), [(stage_of(0), streams(users_count=2, tokens_count=5, seconds=1.0))])
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InvalidInputError, match="must be a Parquet file that is whole"):
        read_records(path)


def test_everything_that_is_wrong_with_a_foreign_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, RunFacts(), [(stage_of(0), streams(users_count=2, tokens_count=5, seconds=1.0))])
    table = pq.read_table(path).drop_columns(["status"]).replace_schema_metadata(None)
    column = table.schema.get_field_index("send_time_nanos")
    pq.write_table(table.set_column(column, "send_time_nanos", table["send_time_nanos"].cast(pa.float64())), path)
    with pytest.raises(InvalidInputError) as raised:
        read_records(path)
    assert [violation.description for violation in raised.value.violations] == [
        "column status is missing",
        "column send_time_nanos must be int64",
        "metadata 'llm-pilot' is missing; no load test wrote it",
    ]


def test_rows_that_break_the_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, RunFacts(), [(stage_of(0), streams(users_count=2, tokens_count=5, seconds=1.0))])
    table = pq.read_table(path).replace_schema_metadata(pq.read_metadata(path).metadata)
    count = table.num_rows
    strange = pa.array(["fine", *["ok"] * (count - 1)])
    shorter = pa.array([[1]] * count, table.schema.field("chunk_token_counts").type)
    for name, values in (("status", strange), ("chunk_token_counts", shorter)):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(name), values)
    pq.write_table(table, path)
    file = read_records(path)
    with pytest.raises(InvalidInputError) as raised:
        file.records(file.stages[0])
    assert [violation.description for violation in raised.value.violations] == [
        "chunk_token_counts: must have an entry for every chunk time",
        f"status: must be one of {', '.join(STATUSES)}, is 'fine'",
    ]
