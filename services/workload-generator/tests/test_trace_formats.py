"""A small file of every format, as its publisher writes it, and how formats are told apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.record_schema import COLUMNS
from llmpilot_workload_generator.traces.formats import FORMAT_NAMES, FORMATS, format_named, formats_with
from llmpilot_workload_generator.traces.reader import open_trace
from llmpilot_workload_generator.traces.trace import Trace


def only_batch(trace: Trace) -> dict[str, list[object]]:
    """The parameters, `arrival` and `skipped` of a trace of one batch."""
    (batch,) = trace.batches()
    values: dict[str, list[object]] = {
        name: column.to_pylist() if isinstance(column, pa.Array) else column.tolist()
        for name, column in batch.columns.items()
    }
    values["arrival"] = [] if batch.arrival_nanos is None else batch.arrival_nanos.tolist()
    values["skipped"] = [batch.skipped_row_count]
    return values


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*objects: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def test_every_name_is_a_format_and_no_two_are_the_same() -> None:
    assert len(set(FORMAT_NAMES)) == len(FORMAT_NAMES) == len(FORMATS) + 1
    assert all(format_named(known.name) is known for known in FORMATS)


def test_formats_are_told_by_their_columns_alone() -> None:
    for known in FORMATS:
        assert known in formats_with([*known.signature, "another column"])
    assert formats_with(["input_tokens", "output_tokens"]) == ()


def test_azure_2024_is_told_from_2023_by_its_utc_offsets(tmp_path: Path) -> None:
    """1715299200 s is 2024-05-10 00:00 UTC."""
    path = written(
        tmp_path / "t.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 02:00:01+02:00,2399,6\n",
    )
    trace = open_trace(path)
    assert (trace.format_name, trace.has_absolute_times) == ("azure-2024", True)
    assert only_batch(trace) == {
        "input_tokens": [2162, 2399],
        "output_tokens": [5, 6],
        "arrival": [1715299200_009930000, 1715299201_000000000],
        "skipped": [0],
    }


def test_newer_burstgpt_has_sessions(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.csv",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.5,,3.2,ChatGPT,472,18,490,Conversation log\n6.25,abc,1.0,GPT-4,1087,0,1087,API log\n",
    )
    trace = open_trace(path)
    assert trace.format_name == "burstgpt"
    assert only_batch(trace) == {
        "input_tokens": [472],
        "output_tokens": [18],
        "arrival": [5_500_000_000],
        "skipped": [1],
    }


def test_servegen_offline_lengths(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl",
        lines(
            {"request_id": 0, "type": "text", "input_length": 61, "output_length": 2370, "duration": 14000},
            {"request_id": 1, "type": "multimodal", "input_length": 54, "output_length": 2031, "duration": 11630},
        ),
    )
    trace = open_trace(path)
    assert (trace.format_name, trace.prefix_block_tokens) == ("servegen", 0)
    assert only_batch(trace) == {
        "input_tokens": [61, 54],
        "output_tokens": [2370, 2031],
        "arrival": [],
        "skipped": [0],
    }
    assert only_batch(open_trace(path, parameters=["type"]))["type"] == ["text", "multimodal"]


def test_servegen_content_hashes_have_no_output(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl",
        lines(
            {"request_id": 0, "type": "text", "input_length": 33, "hash_ids": [0, 1, 2], "img_ids": []},
            {"request_id": 1, "type": "text", "input_length": 20, "hash_ids": [0, 7], "img_ids": ["img_00001"]},
        ),
    )
    trace = open_trace(path)
    (batch,) = trace.batches()
    assert (trace.format_name, trace.prefix_block_tokens, list(trace.kinds)) == ("servegen", 16, ["input_tokens"])
    assert batch.prefix_ids is not None
    assert batch.prefix_starts is not None
    assert batch.prefix_ids.tolist() == [0, 1, 2, 0, 7]
    assert batch.prefix_starts.tolist() == [0, 3, 5]


def test_prefixes_of_failed_requests_go_with_them(tmp_path: Path) -> None:
    rows = [
        {"timestamp": n, "input_length": 5, "output_length": n % 2, "hash_ids": [n, n, n][: n + 1]} for n in range(3)
    ]
    (batch,) = open_trace(written(tmp_path / "t.jsonl", lines(*rows))).batches()
    assert batch.prefix_ids is not None
    assert batch.prefix_starts is not None
    assert (batch.prefix_ids.tolist(), batch.prefix_starts.tolist()) == ([1, 1], [0, 2])
    assert batch.skipped_row_count == 2


@pytest.mark.parametrize(("ids", "problem"), [
    ([1, None], "row 2, column hash_ids: must not have an empty id"),
    (None, "row 2, column hash_ids: must not be empty"),
    ([1, 2.5], "line 2, column hash_ids: must be whole numbers, is '[1, 2.5]'"),
])  # fmt: skip
def test_bad_hash_ids_are_refused(tmp_path: Path, ids: object, problem: str) -> None:
    row = {"timestamp": 0, "input_length": 5, "output_length": 5}
    path = written(tmp_path / "t.jsonl", lines({**row, "hash_ids": [4, 5]}, {**row, "hash_ids": ids}))
    with pytest.raises(InvalidInputError) as caught:
        list(open_trace(path).batches())
    assert str(caught.value) == f"{path} {problem}"


def test_vidur_with_arrivals(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.3145,396,109\n")
    assert only_batch(open_trace(path))["arrival"] == [0, 4_314_500_000]


def test_vllm_results_skip_what_has_an_error(tmp_path: Path) -> None:
    result = {
        "date": "20260101-000000",
        "backend": "vllm",
        "completed": 2,
        "input_lens": [512, 100, 64],
        "output_lens": [128, 0, 5],
        "ttfts": [0.1, 0.0, 0.2],
        "itls": [[0.01] * 127, [], [0.01] * 4],
        "start_times": [1000.25, 1000.5, 1001.0],
        "generated_texts": ["a", "", "b"],
        "errors": ["", "Service Unavailable", ""],
    }
    trace = open_trace(written(tmp_path / "run.json", result))
    assert (trace.format_name, trace.has_absolute_times) == ("vllm", False)
    assert only_batch(trace) == {
        "input_tokens": [512, 64],
        "output_tokens": [128, 5],
        "arrival": [1000_250_000_000, 1001_000_000_000],
        "skipped": [1],
    }


def guidellm_request(prompt: int | None, output: int | None, **times: object) -> dict[str, object]:
    return {"type_": "generative_request_stats", "prompt_tokens": prompt, "output_tokens": output, **times}


@pytest.mark.parametrize("times", [
    {"request_start_time": 1777451316.5},
    {"start_time": 1777451316.5},
    {"scheduler_info": {"request_timings": {"request_start": 1777451316.5}}},
    {"info": {"timings": {"request_start": 1777451316.5}}},
])  # fmt: skip
def test_guidellm_results_of_every_version(tmp_path: Path, times: dict[str, object]) -> None:
    groups = {
        "successful": [guidellm_request(550, 9, **times)],
        "incomplete": [guidellm_request(550, 3, **times)],
        "errored": [guidellm_request(None, None)],
    }
    report = {"metadata": {}, "benchmarks": [{"requests": groups}, {"requests": {**groups, "errored": None}}]}
    trace = open_trace(written(tmp_path / "benchmarks.json", report))
    assert (trace.format_name, trace.has_absolute_times) == ("guidellm", True)
    assert only_batch(trace) == {
        "input_tokens": [550, 550],
        "output_tokens": [9, 9],
        "arrival": [1777451316_500_000_000] * 2,
        "skipped": [3],
    }


def test_guidellm_results_without_times_have_no_arrivals(tmp_path: Path) -> None:
    report = {"benchmarks": [{"requests": {"successful": [guidellm_request(550, 9)]}}]}
    assert only_batch(open_trace(written(tmp_path / "t.json", report)))["arrival"] == []


def aiperf_record(**changes: object) -> dict[str, object]:
    metrics = {
        "input_sequence_length": {"value": 550, "unit": "tokens"},
        "inter_chunk_latency": {"value": [4.9, 5.3], "unit": "ms"},
        "output_sequence_length": {"value": 9, "unit": "tokens"},
    }
    metadata = {"session_num": 45, "request_start_ns": 1759813207532900363, "was_cancelled": False}
    return {"metadata": metadata, "metrics": metrics, "error": None} | changes


def test_aiperf_records_skip_what_failed_or_was_cancelled(tmp_path: Path) -> None:
    failed = {"code": 499, "type": "RequestCancellationError", "message": "Request was cancelled after 0.000 seconds"}
    cancelled = {"session_num": 80, "request_start_ns": 1759879161119147826, "was_cancelled": True}
    path = written(
        tmp_path / "profile_export.jsonl",
        lines(
            aiperf_record(),
            aiperf_record(metrics={"error_isl": {"value": 550, "unit": "tokens"}}, error=failed),
            aiperf_record(metadata=cancelled),
        ),
    )
    trace = open_trace(path)
    assert (trace.format_name, trace.has_absolute_times) == ("aiperf", True)
    assert only_batch(trace) == {
        "input_tokens": [550],
        "output_tokens": [9],
        "arrival": [1759813207532900363],
        "skipped": [2],
    }


def test_aiperf_records_may_leave_out_what_is_empty(tmp_path: Path) -> None:
    record = aiperf_record()
    del record["error"]
    path = written(tmp_path / "t.jsonl", lines(record, aiperf_record(error={"type": "Timeout"}, metrics={})))
    assert only_batch(open_trace(path))["skipped"] == [1]


def test_llm_pilot_records(tmp_path: Path) -> None:
    rows = 3
    table: dict[str, list[Any]] = {
        column.name: [None if column.nullable else ([] if column.is_list else column.kind())] * rows
        for column in COLUMNS
    }
    table |= {
        "input_token_count": [874, None, 5],
        "output_token_count": [20, 3, 7],
        "status": ["ok", "timeout", "ok"],
        "scheduled_time_nanos": [0, 10, 20],
    }
    path = tmp_path / "records.parquet"
    pq.write_table(pa.table(table), path)
    trace = open_trace(path)
    assert (trace.format_name, trace.has_absolute_times) == ("llm-pilot", False)
    assert only_batch(trace) == {
        "input_tokens": [874, 5],
        "output_tokens": [20, 7],
        "arrival": [0, 20],
        "skipped": [1],
    }


def test_characterization_has_two_headers(tmp_path: Path) -> None:
    """The cells of `errors` have line breaks, and 143 files have one more column without a name."""
    header = "smpnum,errors,status,model,requests,start_timestamp,n_input_tokens,n_output_tokens,latency_ms_per_token\n"
    rows = [
        '69,"[\'{""code"":2,\n""message"":""CUDA out of memory""}\']",0,llama-13b,1,1697552047000.0,,,\n',
        '262,[],200,llama-13b,1,1697552047123.0,16.0,50.0,"[128, 4858]"\n',
    ]
    for name, text in (
        ("a.csv", "," + header + "".join(f"{n},{row}" for n, row in enumerate(rows))),
        ("b.csv", ",Unnamed: 0," + header + "".join(f"{n},{n},{row}" for n, row in enumerate(rows))),
    ):
        assert only_batch(open_trace(written(tmp_path / name, text))) == {
            "input_tokens": [16],
            "output_tokens": [50],
            "batch_size": [1],
            "arrival": [1697552047_123_000_000],
            "skipped": [1],
        }


def test_a_format_can_be_asked_for_and_then_must_fit(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "num_prefill_tokens,num_decode_tokens,pd_ratio\n1,2,0.5\n")
    with pytest.raises(InvalidInputError) as caught:
        open_trace(path, format_name="burstgpt")
    there = "there are 'num_prefill_tokens', 'num_decode_tokens', 'pd_ratio'"
    assert [str(violation) for violation in caught.value.violations] == [
        f"{path} column Request tokens: is missing; {there}",
        f"{path} column Response tokens: is missing; {there}",
    ]
    assert list(open_trace(path, format_name="table").kinds) == ["num_prefill_tokens", "num_decode_tokens", "pd_ratio"]
    assert list(open_trace(path).kinds) == ["input_tokens", "output_tokens"]


@pytest.mark.parametrize(("options", "problem"), [
    ({"format_name": "azure"}, "format_name: must be one of azure-2023, azure-2024, burstgpt"),
    ({"parameters": ["top_k"]}, "parameters: top_k: format vidur has input_tokens, output_tokens"),
    ({"format_name": "vidur", "columns": {"a": "b"}}, "columns: cannot be given together with format vidur"),
])  # fmt: skip
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object], problem: str) -> None:
    path = written(tmp_path / "t.csv", "num_prefill_tokens,num_decode_tokens\n1,2\n")
    with pytest.raises(InvalidInputError) as caught:
        open_trace(path, **options)  # type: ignore[arg-type]  # a test hands on whatever it tests
    assert str(caught.value).startswith(problem)


def test_a_format_may_come_as_parquet_with_its_own_types(tmp_path: Path) -> None:
    times = pa.array([1, 2], pa.timestamp("us", "UTC"))
    columns = {"TIMESTAMP": times, "ContextTokens": np.array([5, 6], np.int16), "GeneratedTokens": [7.0, 0.0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    trace = open_trace(tmp_path / "t.parquet", format_name="azure-2024")
    (batch,) = trace.batches()
    assert batch.columns["input_tokens"].dtype == np.int16
    assert only_batch(trace) == {"input_tokens": [5], "output_tokens": [7], "arrival": [1000], "skipped": [1]}
