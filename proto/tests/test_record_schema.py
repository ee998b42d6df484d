from collections.abc import Sequence

import pytest

from llmpilot_contracts.record_schema import COLUMN_NAMES, COLUMNS, problems

GOOD: dict[str, object] = {
    "request_index": 4,
    "user_index": 0,
    "scheduled_time_nanos": 1_000,
    "send_time_nanos": 1_200,
    "first_byte_time_nanos": 5_000,
    "end_time_nanos": 9_500,
    "chunk_time_nanos": [5_000, 7_000, 9_000],
    "chunk_token_counts": [1, 2, 1],
    "input_token_count": 12,
    "output_token_count": 4,
    "token_count_source": "server",
    "status": "ok",
    "error": "",
    "finish_reason": "length",
    "stamp_source": "kernel",
    "origin": "measured",
}
FAILED = GOOD | {
    "user_index": None,
    "first_byte_time_nanos": None,
    "chunk_time_nanos": [],
    "chunk_token_counts": [],
    "input_token_count": None,
    "output_token_count": 0,
    "status": "out_of_memory",
    "error": "CUDA out of memory",
    "finish_reason": None,
}


def table(*rows: dict[str, object]) -> dict[str, Sequence[object]]:
    return {name: [row[name] for row in rows] for name in COLUMN_NAMES}


def test_good_rows_have_no_problem() -> None:
    assert problems(table(GOOD, FAILED)) == []


def test_no_rows_are_no_problem() -> None:
    assert problems(table()) == []


def test_every_column_has_a_description_and_every_list_a_unit() -> None:
    assert all(column.description for column in COLUMNS)
    assert all(column.unit for column in COLUMNS if column.is_list)


def test_every_missing_and_unknown_column_is_named() -> None:
    wrong = {name: values for name, values in table(GOOD).items() if name != "status"} | {"latency": [3]}
    assert problems(wrong) == ["column status: is missing", "column latency: not in schema version 1"]


def test_columns_of_different_length_are_rejected() -> None:
    assert problems(table(GOOD) | {"error": []}) == ["columns: must have the same number of rows, have 0, 1"]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("request_index", None, "must not be empty"),
        ("request_index", -1, "must be >= 0, is -1"),
        ("request_index", 1.0, "must be a whole number, is 1.0"),
        ("request_index", True, "must be a whole number, is True"),
        ("send_time_nanos", 999, "must not be before scheduled_time_nanos 1000, is 999"),
        ("first_byte_time_nanos", 1_100, "must not be before send_time_nanos 1200, is 1100"),
        ("end_time_nanos", 8_999, "must not be before chunk_time_nanos 9000, is 8999"),
        ("chunk_time_nanos", [5_000, 4_999, 9_000], "must not decrease"),
        ("chunk_time_nanos", [4_999, 7_000, 9_000], "must not be before first_byte_time_nanos 5000, is 4999"),
        ("chunk_time_nanos", 5_000, "must be a list of whole numbers, is 5000"),
        ("chunk_time_nanos", [5_000, "7", 9_000], "entry 2 must be a whole number, is '7'"),
        ("chunk_token_counts", [2, 2], "must have an entry for every chunk time"),
        ("chunk_token_counts", [4, 0, 0], "must be > 0; a part without output tokens is no chunk"),
        ("chunk_token_counts", [1, 1, 1], "must add up to output_token_count 4, are 3"),
        ("status", "broken", "must be one of ok, out_of_memory, invalid, rejected, timeout, disconnected, "),
        ("status", "timeout", "must be empty if and only if status is ok, status is timeout"),
        ("error", "no route", "must be empty if and only if status is ok, status is ok"),
        ("error", 3, "must be text, is 3"),
        ("stamp_source", "ntp", "must be one of kernel, user_space, simulated, is 'ntp'"),
        ("origin", "published_median", "must be one of measured, simulated, is 'published_median'"),
    ],
)
def test_bad_value_is_named(column: str, value: object, problem: str) -> None:
    (found,) = problems(table(FAILED, GOOD | {column: value}))
    named = "error" if column == "status" and value == "timeout" else column
    assert found.startswith(f"row 2, column {named}: {problem}")


def test_success_without_a_token_is_rejected() -> None:
    empty = GOOD | {"chunk_time_nanos": [], "chunk_token_counts": [], "output_token_count": 0}
    assert problems(table(empty)) == ["row 1, column output_token_count: must be > 0 if status is ok"]


def test_problems_of_all_rows_are_listed() -> None:
    rows = table(GOOD | {"origin": "x", "error": None}, GOOD, GOOD | {"end_time_nanos": "late"})
    assert [problem.split(":")[0] for problem in problems(rows)] == [
        "row 1, column error",
        "row 1, column origin",
        "row 3, column end_time_nanos",
    ]
