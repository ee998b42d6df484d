"""Files that cannot be read, and what the message says: CSV, JSON and Parquet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.traces.files import partitions
from llmpilot_workload_generator.traces.reader import open_trace


def refusal(path: Path, content: str | bytes) -> list[str]:
    """What is wrong with a file, by the name of the file."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInputError) as caught:
        list(open_trace(path).batches())
    return [str(violation).replace(f"{path.parent}/", "") for violation in caught.value.violations]


GARBAGE = bytes(range(256)) * 8


@pytest.mark.parametrize(("content", "problem"), [
    ("", "t.csv: is empty; its first line must name the columns"),
    ("\n\n", "t.csv: is empty; its first line must name the columns"),
    (GARBAGE, "t.csv: must be CSV, its first line is no text"),
    (b"PK\x03\x04garbage\n1,2\n", "t.csv: must be CSV, its first line is no text"),
    ("374,44\n91,16\n", "t.csv: must name the columns in its first line, which is '374,44'"),
    ("0,1.33,8.6,Gamma,.37,.4\n", "t.csv: must name the columns in its first line, which is '0,1.33,8.6,Gamma,.37,.4'"),
    ("input_tokens;output_tokens\n1;2\n", "t.csv: must have commas between its columns, has ';'"),
    ("input_tokens\toutput_tokens\n1\t2\n", "t.csv: must have commas between its columns, has '\\t'"),
    ("input_tokens\n\xff\n".encode("latin-1"), "t.csv: cannot be read: In CSV column #0"),
])  # fmt: skip
def test_what_is_no_csv_is_refused(tmp_path: Path, content: str | bytes, problem: str) -> None:
    (refused,) = refusal(tmp_path / "t.csv", content)
    assert refused.startswith(problem)


def test_rows_of_another_width_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "t.csv", "input_tokens,output_tokens\n1,2\n3\n\n4,5,6\n") == [
        "t.csv row 2: has 1 cells, must have 2",
        "t.csv row 3: has 3 cells, must have 2",
    ]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "t.csv", "num_prefill_tokens,num_decode_tokens,num_decode_tokens\n1,2,3\n") == [
        "t.csv column num_decode_tokens: must appear once, appears 2 times"
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_file_without_rows_is_an_empty_trace(tmp_path: Path, name: str) -> None:
    if name.endswith("csv"):
        (tmp_path / name).write_text("input_tokens,output_tokens,model\n")
    else:
        empty = pa.table({"input_tokens": pa.array([], pa.int32()), "output_tokens": pa.array([], pa.int32())})
        pq.write_table(empty, tmp_path / name)
    trace = open_trace(tmp_path / name)
    assert list(trace.kinds)[:2] == ["input_tokens", "output_tokens"]
    assert sum(len(batch) for batch in trace.batches()) == 0


def test_a_csv_may_begin_with_a_byte_order_mark_and_end_lines_with_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfinput_tokens,output_tokens\r\n 5 ,6\r\n7,8")
    (batch,) = open_trace(tmp_path / "t.csv").batches()
    assert batch.columns["input_tokens"].tolist() == [5, 7]
    assert batch.columns["output_tokens"].tolist() == [6, 8]


LINE = '{"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": []}\n'


@pytest.mark.parametrize(("content", "problem"), [
    ("", "t.jsonl: is empty; each line must be a JSON object"),
    ("\n \n", "t.jsonl: is empty; each line must be a JSON object"),
    (GARBAGE, "t.jsonl line 1: must be a JSON object, is "),
    ("[1, 2]\n", "t.jsonl line 1: must be a JSON object, is [1, 2]"),
    (LINE + "\n" + LINE[:30] + "\n", "t.jsonl line 3: must be a JSON object, is '{\"timestamp\": 0, \"input_length'"),
    (LINE + "7\n", "t.jsonl line 2: must be a JSON object, is 7"),
    (LINE + LINE.replace("5", '"five"'), "t.jsonl line 2, column input_length: must be a number, is 'five'"),
    (LINE + LINE.replace("6", "true"), "t.jsonl line 2, column output_length: must be a number, is 'True'"),
    (LINE + LINE.replace("6", "NaN"), "t.jsonl row 2, column output_length: must be a finite number, is nan"),
    (LINE + LINE.replace("5", "5.5"), "t.jsonl row 2, column input_length: must be a whole number, is 5.5"),
    (LINE + "{}\n", "t.jsonl row 2, column input_length: must not be empty"),
])  # fmt: skip
def test_what_is_no_json_object_per_line_is_refused(tmp_path: Path, content: str | bytes, problem: str) -> None:
    assert refusal(tmp_path / "t.jsonl", content)[0].startswith(problem)


def test_mixed_types_in_json_lines_of_no_format_are_named(tmp_path: Path) -> None:
    content = '{"x": 1, "y": null, "z": 1}\n{"x": 2.0, "y": 5}\n{"y": "two", "x": 3, "z": {}}\n'
    assert refusal(tmp_path / "t.jsonl", content) == [
        "t.jsonl line 3, column y: must be a number, is 'two'",
        "t.jsonl line 3, column z: must be a number, is '{}'",
    ]


def test_columns_that_are_not_asked_for_may_be_of_any_types(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"x": 1, "error": null, "y": 1}\n{"x": 2, "error": {"a": 1}, "y": "two"}\n{"x": 3, "error": "no"}\n'
    )
    (batch,) = open_trace(path, parameters=["x"]).batches()
    assert batch.columns["x"].tolist() == [1, 2, 3]


def test_fields_inside_objects_are_named(tmp_path: Path) -> None:
    good = {"metadata": {"request_start_ns": 5}, "metrics": {"input_sequence_length": {"value": 5}}}
    bad = {"metadata": {"request_start_ns": "5"}, "metrics": {"input_sequence_length": 5}}
    assert refusal(tmp_path / "t.jsonl", json.dumps(good) + "\n" + json.dumps(bad) + "\n") == [
        "t.jsonl line 2, column metrics.input_sequence_length: must be an object, is '5'",
        "t.jsonl line 2, column metadata.request_start_ns: must be a whole number, is '5'",
    ]


@pytest.mark.parametrize(("content", "problem"), [
    ("", "t.json: is empty"),
    ("{", "t.json: must be one JSON value: "),
    (LINE + LINE,
     "t.json: must be one JSON value: Extra data: line 2 column 1 (char 72); call it .jsonl if each line is one"),
    ("7", "t.json: must be a JSON object or an array of objects"),
    ("[[1]]", "t.json entry 1: must be an object"),
    ("{}", "t.json: has no column that could be a parameter, has none; the known formats are azure-2023"),
    ('{"completed": 5}', "t.json: has no column that could be a parameter, has 'completed'; the known formats are"),
    ('{"input_lens": [1], "output_lens": [1, 2], "errors": [""]}',
     "t.json: must have a value of each per request, has input_lens 1, output_lens 2, errors 1"),
    ('{"input_lens": [1, "two"], "output_lens": [1, 2]}',
     "t.json row 2, column input_lens: must be a whole number, is 'two'"),
    ('{"benchmarks": [{"requests": [1]}]}',
     "t.json benchmarks: must each have the requests, grouped by how they ended"),
    ('{"benchmarks": 7}', "t.json benchmarks: must each have the requests, grouped by how they ended"),
])  # fmt: skip
def test_what_is_no_request_log_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    assert refusal(tmp_path / "t.json", content)[0].startswith(problem)


def parquet_bytes(tmp_path: Path) -> bytes:
    rng = np.random.default_rng(1)
    path = tmp_path / "whole.parquet"
    table = pa.table({name: rng.integers(1, 4000, 50_000) for name in ("input_tokens", "output_tokens")})
    pq.write_table(table, path, row_group_size=10_000, write_page_checksum=True)
    return path.read_bytes()


def test_a_truncated_parquet_is_refused(tmp_path: Path) -> None:
    whole = parquet_bytes(tmp_path)
    for kept in (0, 4, len(whole) // 2, len(whole) - 1):
        (refused,) = refusal(tmp_path / "t.parquet", whole[:kept])
        assert refused.startswith("t.parquet: cannot be read:")
        assert "it may be cut off" in refused


def test_a_parquet_with_a_hole_is_refused_where_it_is_read(tmp_path: Path) -> None:
    whole = bytearray(parquet_bytes(tmp_path))
    middle = len(whole) // 2
    whole[middle : middle + 4096] = os.urandom(4096)
    (refused,) = refusal(tmp_path / "t.parquet", bytes(whole))
    assert refused.startswith("t.parquet: cannot be read:")


def test_garbage_is_no_parquet(tmp_path: Path) -> None:
    assert refusal(tmp_path / "t.parquet", GARBAGE)[0].startswith("t.parquet: cannot be read:")


def test_hidden_files_and_folders_are_no_partitions(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", ".c.csv", "_d.csv", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.csv").touch()
    assert partitions(tmp_path) == [tmp_path / "a.parquet", tmp_path / "b.csv"]


def test_a_folder_that_cannot_be_looked_through_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "t.csv").write_text("input_tokens\n1\n")
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InvalidInputError, match="must be a folder of nothing but readable files"):
        partitions(tmp_path)


def test_a_parquet_is_read_without_pandas(tmp_path: Path) -> None:
    """Whose import takes a tenth of the CPU time of a fit to 17 million rows."""
    lengths = pa.table({"input_tokens": pa.array([1, 2], pa.int16()), "output_tokens": pa.array([4, 3], pa.int32())})
    pq.write_table(lengths, tmp_path / "t.parquet")
    program = (
        "import sys; from pathlib import Path; from llmpilot_workload_generator.traces.reader import open_trace;"
        "rows = sum(map(len, open_trace(Path(sys.argv[1])).batches())); print(rows, 'pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "t.parquet")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["2", "False"]
