"""Public traces, read as they are published, against what pandas and plain Python read from the same files."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_workload_generator.model import Kind
from llmpilot_workload_generator.traces.reader import open_trace
from llmpilot_workload_generator.traces.trace import Trace

TABLE = "input_tokens,output_tokens,temperature\n374,44,0.7\n12,1,0\n"


def read(trace: Trace) -> tuple[dict[str, list[object]], int]:
    """All rows of a trace, column by column, and how many failed."""
    columns: dict[str, list[object]] = {name: [] for name in trace.kinds}
    skipped = 0
    for batch in trace.batches():
        assert list(batch.columns) == list(trace.kinds)
        for name, column in batch.columns.items():
            columns[name] += column.to_pylist() if isinstance(column, pa.Array) else column.tolist()
        skipped += batch.skipped_row_count
    return columns, skipped


def arrivals(trace: Trace) -> list[int]:
    return [
        nanos
        for batch in trace.batches()
        for nanos in (batch.arrival_nanos.tolist() if batch.arrival_nanos is not None else [])
    ]


def refusal(path: Path, **options: object) -> list[str]:
    """What is wrong with a trace, without the folder it is in."""
    with pytest.raises(InvalidInputError) as caught:
        read(open_trace(path, **options))  # type: ignore[arg-type]  # a test hands on whatever it tests
    return [str(violation).replace(f"{path.parent}/", "") for violation in caught.value.violations]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["azure_2023_code", "azure_2023_conv"])
def test_azure_2023_is_what_pandas_reads(public_data: Path, name: str) -> None:
    path = public_data / "traces" / f"{name}.csv"
    expected = pd.read_csv(path)
    trace = open_trace(path)
    columns, skipped = read(trace)
    assert (trace.format_name, trace.licence, trace.has_absolute_times) == ("azure-2023", "CC-BY-4.0", True)
    assert columns == {
        "input_tokens": expected["ContextTokens"].tolist(),
        "output_tokens": expected["GeneratedTokens"].tolist(),
    }
    assert arrivals(trace) == pd.to_datetime(expected["TIMESTAMP"]).astype("datetime64[ns]").astype("int64").tolist()
    assert skipped == 0
    assert [batch.bytes_done for batch in trace.batches()][-1] == trace.size_bytes == path.stat().st_size


def test_mooncake_is_what_json_reads(public_data: Path) -> None:
    path = public_data / "traces" / "mooncake_conversation.jsonl"
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    trace = open_trace(path)
    columns, skipped = read(trace)
    assert (trace.format_name, trace.prefix_block_tokens, trace.has_absolute_times) == ("mooncake", 512, False)
    assert (len(columns["input_tokens"]), skipped) == (12_031, 0)
    assert columns["input_tokens"] == [row["input_length"] for row in expected]
    assert columns["output_tokens"] == [row["output_length"] for row in expected]
    assert arrivals(trace) == [row["timestamp"] * 10**6 for row in expected]
    (batch,) = trace.batches()
    assert batch.prefix_ids is not None
    assert batch.prefix_starts is not None
    assert batch.prefix_ids.tolist() == [block for row in expected for block in row["hash_ids"]]
    assert np.diff(batch.prefix_starts).tolist() == [len(row["hash_ids"]) for row in expected]


def test_vidur_is_what_pandas_reads(public_data: Path) -> None:
    path = public_data / "traces" / "arxiv_summarization.csv"
    expected = pd.read_csv(path)
    trace = open_trace(path)
    columns, _ = read(trace)
    assert trace.format_name == "vidur"
    assert columns["input_tokens"] == expected["num_prefill_tokens"].tolist()
    assert columns["output_tokens"] == expected["num_decode_tokens"].tolist()
    assert arrivals(trace) == []


def test_the_characterization_dataset_has_the_published_counts(public_data: Path) -> None:
    """FACTS section 2: 829,495 requests, 34,357 of them failed. The sums are pandas' over rows of status 200."""
    trace = open_trace(public_data / "llm-pilot" / "performance_characterization_data_raw.tar.xz")
    rows = skipped = inputs = outputs = batches = 0
    for batch in trace.batches():
        rows += len(batch)
        skipped += batch.skipped_row_count
        inputs += int(batch.columns["input_tokens"].sum())
        outputs += int(batch.columns["output_tokens"].sum())
        batches += int(batch.columns["batch_size"].sum())
    assert (trace.format_name, rows, skipped) == ("characterization", 795_138, 34_357)
    assert (inputs, outputs, batches) == (95_843_826, 14_673_846, 795_138)


def test_an_unpacked_characterization_file_is_what_pandas_reads(public_data: Path, tmp_path: Path) -> None:
    archive = public_data / "llm-pilot" / "performance_characterization_data_raw.tar.xz"
    with tarfile.open(archive) as members:
        first = next(member for member in members if member.name.endswith(".csv"))
        content = members.extractfile(first)
        assert content is not None
        path = written(tmp_path / "raw" / Path(first.name).name, content.read())
    expected = pd.read_csv(path)
    good = expected[expected["status"] == 200]
    trace = open_trace(path.parent)
    columns, skipped = read(trace)
    assert columns["output_tokens"] == good["n_output_tokens"].astype(int).tolist()
    assert skipped == len(expected) - len(good) > 0
    assert arrivals(trace) == (good["start_timestamp"].astype("int64") * 10**6).tolist()


def test_a_folder_is_its_files_in_the_order_of_their_names(public_data: Path, tmp_path: Path) -> None:
    for name, copy in (("azure_2023_conv", "b.csv"), ("azure_2023_code", "a.csv")):
        shutil.copy(public_data / "traces" / f"{name}.csv", tmp_path / copy)
    written(tmp_path / ".hidden.csv", "no trace")
    written(tmp_path / "_SUCCESS", "")
    trace = open_trace(tmp_path)
    columns, _ = read(trace)
    assert len(columns["input_tokens"]) == 8_819 + 19_366
    assert columns["input_tokens"][:1] == [4808]
    assert columns["input_tokens"][8_819] == 374
    done = [batch.bytes_done for batch in trace.batches()]
    assert done == sorted(done)
    assert done[-1] == trace.size_bytes == 320_117 + 719_188


def test_partitions_may_be_of_several_syntaxes(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", TABLE)
    written(tmp_path / "deeper" / "b.jsonl", '{"input_tokens": 5, "output_tokens": 6.0, "temperature": 1}\n')
    pq.write_table(pa.table({"input_tokens": [7], "output_tokens": [8], "temperature": [0.5]}), tmp_path / "c.parquet")
    columns, _ = read(open_trace(tmp_path))
    assert columns == {
        "input_tokens": [374, 12, 7, 5],
        "output_tokens": [44, 1, 8, 6],
        "temperature": [0.7, 0.0, 0.5, 1.0],
    }


def test_partitions_of_different_formats_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "num_prefill_tokens,num_decode_tokens\n1,2\n")
    written(tmp_path / "b.csv", TABLE)
    written(tmp_path / "c.csv", "Timestamp,num_prefill_tokens,num_decode_tokens,Request tokens,Response tokens\n")
    with pytest.raises(InvalidInputError) as caught:
        open_trace(tmp_path)
    assert [str(violation).replace(f"{tmp_path}/", "") for violation in caught.value.violations] == [
        "b.csv column num_decode_tokens: is missing; there are 'input_tokens', 'output_tokens', 'temperature'",
        "b.csv column num_prefill_tokens: is missing; there are 'input_tokens', 'output_tokens', 'temperature'",
        "c.csv: must be of format vidur as the first file is, is burstgpt",
    ]


def test_a_column_that_only_a_later_partition_has_is_not_lost_silently(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", TABLE)
    written(tmp_path / "b.csv", "input_tokens,output_tokens,temperature,top_k,request_id\n1,2,0,50,x\n")
    with pytest.raises(InvalidInputError, match=r"b.csv column top_k: is not in the first file; give the parameters"):
        open_trace(tmp_path)
    columns, _ = read(open_trace(tmp_path, parameters=["output_tokens"]))
    assert columns == {"output_tokens": [44, 1, 2]}


def test_failed_requests_are_counted_and_their_empty_cells_do_not_matter(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n7.5,GPT-4,0,0,0,API log\n9,GPT-4,3,4,7,API log\n",
    )
    trace = open_trace(path, parameters=["output_tokens", "model", "log_type"])
    columns, skipped = read(trace)
    assert (trace.format_name, skipped) == ("burstgpt", 1)
    assert columns == {
        "output_tokens": [18, 4],
        "model": ["ChatGPT", "GPT-4"],
        "log_type": ["Conversation log", "API log"],
    }
    assert arrivals(trace) == [5 * 10**9, 9 * 10**9]
    assert list(open_trace(path).kinds) == ["input_tokens", "output_tokens"]


def test_a_bad_row_after_failed_ones_is_named_as_the_file_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "Timestamp,Request tokens,Response tokens\n1,1,0\n2,0,0\n3,0,5\nx,2,-1\n")
    assert refusal(path) == [
        "t.csv row 3, column Request tokens: must be >= 1, is 0",
        "t.csv row 4, column Response tokens: must be >= 1, is -1",
        "t.csv row 4, column Timestamp: must be a number, is 'x'",
    ]


def test_a_trace_can_be_read_twice(tmp_path: Path) -> None:
    trace = open_trace(written(tmp_path / "t.csv", TABLE))
    assert read(trace) == read(trace)


def test_a_reader_that_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    for content, name in ((TABLE, "t.csv"), ('{"input_tokens": 1, "output_tokens": 2}\n', "t.jsonl")):
        batches = open_trace(written(tmp_path / name, content)).batches()
        next(batches)
        batches.close()  # type: ignore[attr-defined]  # it is a generator
        (tmp_path / name).unlink()


def test_a_long_file_comes_in_several_batches(tmp_path: Path) -> None:
    """Lines of 15 bytes; a block is 2^24 bytes, so 2 * 10^6 rows are in two blocks."""
    path = written(tmp_path / "t.csv", "input_tokens,b\n" + "1000000,1000001\n" * 2_000_000)
    sizes, done = [], []
    for batch in open_trace(path, parameters=["input_tokens"]).batches():
        sizes.append(len(batch))
        done.append(batch.bytes_done)
    assert sum(sizes) == 2_000_000
    assert len(sizes) >= 2
    assert done == sorted(done)
    assert done[-1] == path.stat().st_size


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.zst", ".jsonl.gz"])
def test_compressed_text_is_read(tmp_path: Path, suffix: str) -> None:
    text = TABLE if "csv" in suffix else '{"input_tokens": 374, "output_tokens": 44, "temperature": 0.7}\n'
    codec = "gzip" if suffix.endswith("gz") else "zstd"
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / f"t{suffix}"), "wb"), codec) as file:
        file.write(text.encode())
    columns, _ = read(open_trace(tmp_path))
    assert columns["temperature"][0] == 0.7


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(
        ("input_tokens,output_tokens\n" + "".join(f"{n},{n * n}\n" for n in range(1, 50_000))).encode()
    )
    (refused,) = refusal(written(tmp_path / "t.csv.gz", content[: len(content) // 2]))
    assert refused.startswith("t.csv.gz: cannot be read:")
    assert refused.endswith("it may be cut off, fetch it again")


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    header = "n_input_tokens,n_output_tokens,status,requests,latency_ms_per_token,start_timestamp\n"
    row = '16.0,50.0,200,1,"[1, 2]",1697028729448\n'
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name in ("raw/a.csv", "raw/._a.csv", "raw/b.csv"):
            member = tarfile.TarInfo(name)
            member.size = len(header + row)
            archive.addfile(member, io.BytesIO((header + row).encode()))
    whole = open_trace(written(tmp_path / "t.tar.xz", packed.getvalue()))
    assert read(whole) == ({"input_tokens": [16, 16], "output_tokens": [50, 50], "batch_size": [1, 1]}, 0)
    (refused,) = refusal(written(tmp_path / "u.tar.xz", packed.getvalue()[:-40]))
    assert refused.startswith("u.tar.xz: cannot be read:")


def test_members_of_different_formats_are_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, text in (("a.csv", TABLE), ("b.csv", "other\n1\n")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    refused = refusal(written(tmp_path / "t.tar.xz", packed.getvalue()))
    assert refused[0] == "t.tar.xz: b.csv column input_tokens: is missing; there are 'other'"


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="give a file or a folder of files"):
        open_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(("make", "problem"), [
    (lambda path: path.mkdir(), "has no file of a trace; it must end with one of .csv, .jsonl"),
    (lambda path: path.write_text("a,b\n1,2\n"), "must end with one of .csv, .jsonl"),
])  # fmt: skip
def test_what_cannot_be_a_trace_is_refused(tmp_path: Path, make: object, problem: str) -> None:
    path = tmp_path / "trace.txt"
    assert callable(make)
    make(path)
    assert refusal(path)[0].startswith(f"trace.txt: {problem}")


def test_an_archive_without_csv_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    tarfile.open(fileobj=packed, mode="w:xz").close()
    assert refusal(written(tmp_path / "t.tar.xz", packed.getvalue())) == ["t.tar.xz: has no CSV file in it"]


numbers = st.lists(
    st.tuples(st.integers(1, 2**53 - 1), st.integers(0, 2**31), st.floats(0, 2)), min_size=1, max_size=30
)


@settings(max_examples=30, deadline=None)
@given(rows=numbers)
def test_every_syntax_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[int, int, float]]
) -> None:
    folder = tmp_path_factory.mktemp("syntaxes")
    frame = pd.DataFrame(rows, columns=["input_tokens", "output_tokens", "temperature"])
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_json(folder / "t.jsonl", orient="records", lines=True, double_precision=15)
    frame.to_parquet(folder / "t.parquet")
    (folder / "t.json").write_text(json.dumps(frame.to_dict(orient="records")))
    good = [row for row in rows if row[1]]
    expected = {"input_tokens": [row[0] for row in good], "output_tokens": [row[1] for row in good]}
    for suffix in ("csv", "jsonl", "parquet", "json"):
        trace = open_trace(folder / f"t.{suffix}")
        columns, skipped = read(trace)
        temperatures = columns.pop("temperature")
        assert (columns, skipped) == (expected, len(rows) - len(good))
        assert temperatures == pytest.approx([row[2] for row in good], abs=1e-14)
        assert dict(trace.kinds) == {
            "input_tokens": Kind.INTEGER,
            "output_tokens": Kind.INTEGER,
            "temperature": Kind.NUMBER,
        }
