from collections.abc import Sequence

import pytest

from llmpilot_contracts.dataset_schema import COLUMN_NAMES, COLUMNS, KEY, problems

ROW = "llama-13b,1xA100-40GB,64,measured,120,44.0,75.6,112.2,134.0,.5,2.2,2.9,7.1,19,20.0,20,20,50.2,100,80,0.8,75"
GOOD = ROW.split(",")
ONLY_KEY = ["llama-13b", "1xA100-40GB", "64", "published_median", *[""] * 18]


def with_cell(column: str, cell: str, row: Sequence[str] = GOOD) -> list[str]:
    changed = list(row)
    changed[COLUMN_NAMES.index(column)] = cell
    return changed


def test_good_row_has_no_problem() -> None:
    assert problems(COLUMN_NAMES, [GOOD]) == []


def test_everything_but_key_and_origin_may_be_unknown() -> None:
    assert problems(COLUMN_NAMES, [ONLY_KEY]) == []


def test_key_columns_come_first() -> None:
    assert COLUMN_NAMES[: len(KEY)] == KEY


def test_every_column_has_a_description_and_every_quantity_a_unit() -> None:
    assert all(column.description for column in COLUMNS)
    assert [column.name for column in COLUMNS if column.kind is not str and not column.unit] == ["error_rate"]


def test_empty_table_is_rejected() -> None:
    assert problems(COLUMN_NAMES, []) == ["rows: there are none"]


def test_every_missing_unknown_and_repeated_column_is_named() -> None:
    header = [*COLUMN_NAMES[2:], "cost", "origin"]
    assert problems(header, [GOOD]) == [
        "column llm: must appear once, appears 0 times",
        "column gpu_profile: must appear once, appears 0 times",
        "column origin: must appear once, appears 2 times",
        "column cost: not in schema version 1",
    ]


def test_columns_in_another_order_are_rejected() -> None:
    (problem,) = problems(COLUMN_NAMES[::-1], [GOOD])
    assert problem.startswith("columns: must be in the order llm, gpu_profile, users_count, ")


@pytest.mark.parametrize(
    ("column", "cell", "problem"),
    [
        ("llm", "", "must not be empty"),
        ("llm", " llama", "must be printable text without spaces around it, is ' llama'"),
        ("llm", "a\nb", "must be printable text without spaces around it, is 'a\\nb'"),
        ("users_count", "0", "must be between 1 and 1e+06, is 0"),
        ("users_count", "-1", "must be between 1 and 1e+06, is -1"),
        ("users_count", "1.0", "must be a whole number, is '1.0'"),
        ("users_count", "1_0", "must be a whole number, is '1_0'"),
        ("users_count", "1234567890123456789", "must be a whole number, is '1234567890123456789'"),
        ("origin", "guessed", "must be one of measured, published_median, simulated, is 'guessed'"),
        ("itl_ms_median", "nan", "must be a number, is 'nan'"),
        ("itl_ms_median", "inf", "must be a number, is 'inf'"),
        ("itl_ms_median", "1e999", "must be finite, is 1e999"),
        ("itl_ms_median", "12ms", "must be a number, is '12ms'"),
        ("itl_ms_median", "-0.5", "must be between 0 and inf, is -0.5"),
        ("error_rate", "1.5", "must be between 0 and 1, is 1.5"),
        ("error_rate", "0.7", "must be error_count / request_count = 0.8, is '0.7'"),
        ("error_rate", "", "must be error_count / request_count = 0.8, is ''"),
        ("error_count", "101", "must be at most request_count 100, is 101"),
        ("oom_count", "81", "must be at most error_count 80, is 81"),
    ],
)
def test_bad_cell_is_named(column: str, cell: str, problem: str) -> None:
    assert f"row 1, column {column}: {problem}" in problems(COLUMN_NAMES, [with_cell(column, cell)])


def test_error_rate_without_counts_is_rejected() -> None:
    row = with_cell("error_rate", "0.1", ONLY_KEY)
    assert problems(COLUMN_NAMES, [row]) == [
        "row 1, column error_rate: must be empty without error_count and request_count, is 0.1"
    ]


def test_error_rate_rounded_to_six_digits_is_accepted() -> None:
    row = with_cell("error_count", "33", with_cell("request_count", "99", with_cell("oom_count", "")))
    assert problems(COLUMN_NAMES, [with_cell("error_rate", "0.333333", row)]) == []


def test_row_with_a_cell_too_few_is_named() -> None:
    assert problems(COLUMN_NAMES, [GOOD, GOOD[:-1]]) == ["row 2: has 21 cells, must have 22"]


def test_repeated_key_is_named_even_when_the_number_is_written_otherwise() -> None:
    assert problems(COLUMN_NAMES, [GOOD, with_cell("users_count", "064")]) == [
        "row 2: repeats row 1 (llama-13b, 1xA100-40GB, 64)"
    ]


def test_problems_of_all_rows_are_listed() -> None:
    rows = [with_cell("llm", ""), GOOD, with_cell("origin", "x", with_cell("users_count", "many"))]
    assert [problem.split(":")[0] for problem in problems(COLUMN_NAMES, rows)] == [
        "row 1, column llm",
        "row 3, column users_count",
        "row 3, column origin",
    ]
