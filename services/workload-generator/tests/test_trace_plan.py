"""Tables of no publisher: which columns are parameters, which is the time, and what a caller may choose."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.model import Kind
from llmpilot_workload_generator.traces.reader import open_trace

SEVEN = ("input_tokens", "output_tokens", "batch_size", "temperature", "top_p", "top_k", "is_greedy")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(text)
    return path


def refusal(path: Path, **options: object) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        list(open_trace(path, **options).batches())  # type: ignore[arg-type]  # a test hands on whatever it tests
    return [str(violation).replace(f"{path.parent}/", "") for violation in caught.value.violations]


def test_the_seven_parameters_have_their_kinds_whatever_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path, ",".join(SEVEN) + "\n5,6,1,0,1,50.0,True\n7,8,2,1,0.5,0,False\n")
    trace = open_trace(path)
    (batch,) = trace.batches()
    assert (trace.format_name, trace.source, trace.licence) == ("table", "t.csv", "")
    assert [trace.kinds[name].value[0] for name in SEVEN] == ["i", "i", "i", "n", "n", "i", "i"]
    assert [np.asarray(batch.columns[name]).tolist() for name in SEVEN] == [
        [5, 7], [6, 8], [1, 2], [0.0, 1.0], [1.0, 0.5], [50, 0], [1, 0],
    ]  # fmt: skip


def test_times_and_identifiers_are_no_parameters(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        ",request_id,timestamp,input_tokens,user-id,Session ID,model,start_date,gap,id,uuid\n"
        "0,7,0.5,5,1,2,llama,2024-01-01,1.5,9,f\n1,8,0.75,6,1,2,mpt,2024-01-01,2,9,f\n",
    )
    trace = open_trace(path)
    (batch,) = trace.batches()
    assert dict(trace.kinds) == {"input_tokens": Kind.INTEGER, "model": Kind.CATEGORY, "gap": Kind.NUMBER}
    assert isinstance(batch.columns["model"], pa.DictionaryArray)
    assert batch.columns["model"].to_pylist() == ["llama", "mpt"]
    assert batch.arrival_nanos is not None
    assert (batch.arrival_nanos.tolist(), trace.has_absolute_times) == ([500_000_000, 750_000_000], False)


@pytest.mark.parametrize(("time", "nanos", "is_absolute"), [
    ("12", 12 * 10**9, False),
    ("1715299200.5", 1715299200_500000000, True),
    ("2024-05-10 00:00:00", 1715299200_000000000, True),
    ("2024-05-10T02:00:00+02:00", 1715299200_000000000, True),
])  # fmt: skip
def test_a_timestamp_is_seconds_or_a_date(tmp_path: Path, time: str, nanos: int, is_absolute: bool) -> None:
    trace = open_trace(written(tmp_path, f"arrival_time,input_tokens\n{time},5\n"))
    (batch,) = trace.batches()
    assert batch.arrival_nanos is not None
    assert (batch.arrival_nanos.tolist(), trace.has_absolute_times) == ([nanos], is_absolute)


def test_a_timestamp_that_does_not_parse_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "timestamp,input_tokens\n2024-05-10 00:00:00,5\nnoon,6\n")
    assert refusal(path) == [
        "t.csv row 2, column timestamp: must be a date and time such as 2023-11-16 18:17:03.979, is 'noon'"
    ]


def test_parameters_are_chosen_and_ordered(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,timestamp,c\n1,2,3,x\n")
    trace = open_trace(path, parameters=["c", "a"])
    (batch,) = trace.batches()
    assert list(batch.columns) == ["c", "a"]
    assert batch.arrival_nanos is not None


def test_columns_may_have_any_name(tmp_path: Path) -> None:
    path = written(tmp_path, "when,prompt,reply,other\n1700158623,5,6,zzz\n")
    names = {"input_tokens": "prompt", "output_tokens": "reply", "timestamp": "when"}
    trace = open_trace(path, columns=names)
    (batch,) = trace.batches()
    assert (list(batch.columns), trace.has_absolute_times) == (["input_tokens", "output_tokens"], True)
    assert batch.columns["output_tokens"].tolist() == [6]
    assert list(open_trace(path, columns=names, parameters=["output_tokens"]).kinds) == ["output_tokens"]


def test_a_missing_column_says_what_there_is(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt,reply\n5,6\n")
    there = "is missing; there are 'prompt', 'reply'"
    known = (
        "; the known formats are azure-2023, azure-2024, burstgpt, mooncake, servegen, vidur, vllm, guidellm, aiperf, "
        "characterization, llm-pilot"
    )
    assert refusal(path, columns={"input_tokens": "promt", "timestamp": "when"}) == [
        f"t.csv column promt: {there}{known}",
        f"t.csv column when: {there}",
    ]
    assert refusal(path, parameters=["input_tokens"]) == [f"t.csv column input_tokens: {there}{known}"]


def test_a_list_is_no_parameter(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "ids": pa.array([[1, 2]])}), tmp_path / "t.parquet")
    assert list(open_trace(tmp_path / "t.parquet").kinds) == ["a"]
    assert refusal(tmp_path / "t.parquet", parameters=["ids"]) == [
        "t.parquet column ids: is no parameter but list<element: int64>"
    ]


@pytest.mark.parametrize(("rows", "problems"), [
    ("12,5\nabc,6\n", ["t.csv row 2, column input_tokens: must be a whole number, is 'abc'"]),
    ("12,1\n13,two\n", ["t.csv row 2, column other: must be a number, is 'two'"]),
    ("12,1\n,\n",
     ["t.csv row 2, column input_tokens: must not be empty", "t.csv row 2, column other: must not be empty"]),
    ("-1,1\n0,1\n", ["t.csv row 1, column input_tokens: must be >= 1, is -1"]),
    ("3,1\nnan,1\n", ["t.csv row 2, column input_tokens: must be a finite number, is nan"]),
    ("3,1.5\n4,inf\n", ["t.csv row 2, column other: must be a finite number, is inf"]),
    ("3.5,1\n", ["t.csv row 1, column input_tokens: must be a whole number, is 3.5"]),
    ("9007199254740993,1\n", ["t.csv row 1, column input_tokens: must be less than 2^53, is 9007199254740993"]),
    ("3,\n4,\n", ["t.csv row 1, column other: must not be empty"]),
])  # fmt: skip
def test_every_column_names_its_first_bad_row(tmp_path: Path, rows: str, problems: list[str]) -> None:
    assert refusal(written(tmp_path, f"input_tokens,other\n{rows}")) == problems


def test_rows_are_counted_across_batches(tmp_path: Path) -> None:
    """A block is 2^24 bytes; the bad row is in the second one."""
    path = tmp_path / "t.csv"
    path.write_text("input_tokens,b\n" + "1000000,1000001\n" * 1_500_000 + "1,x\n")
    assert refusal(path) == ["t.csv row 1500001, column b: must be a whole number, is 'x'"]


def test_a_parquet_of_seven_columns_keeps_its_narrow_types(tmp_path: Path) -> None:
    widths = {"input_tokens": np.int16, "output_tokens": np.int16, "batch_size": np.int8, "top_k": np.uint8}
    table = {name: np.array([1, 2], width) for name, width in widths.items()}
    pq.write_table(pa.table({**table, "is_greedy": [True, False], "temperature": [0.7, 0.0]}), tmp_path / "t.parquet")
    (batch,) = open_trace(tmp_path / "t.parquet").batches()
    assert {name: batch.columns[name].dtype for name in widths} == widths
    assert batch.columns["is_greedy"].tolist() == [1, 0]


def test_text_of_a_parquet_stays_a_dictionary(tmp_path: Path) -> None:
    pq.write_table(pa.table({"model": ["a", "b"] * 1000, "n": [1] * 2000}), tmp_path / "t.parquet")
    (batch,) = open_trace(tmp_path / "t.parquet").batches()
    model = batch.columns["model"]
    assert isinstance(model, pa.DictionaryArray)
    assert model.dictionary.to_pylist() == ["a", "b"]
