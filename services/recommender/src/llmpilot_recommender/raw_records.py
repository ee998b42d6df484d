"""The public raw records: one CSV per load test, a row per request, in a folder or a tar archive.

Invariant: an archive is streamed and nothing of it is written to disk; a file either becomes a `RawFile` or an
InvalidInputError that names every bad column and row.
Source: IBM/LLM-performance-prediction (Lazuka et al., 2024).
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.published import GPU_OF_TYPE, gpu_profile_name

_CONSTANT_COLUMNS = ("model", "gpu_type", "n_gpus", "num_users", "experiment_duration_s")
_NUMBER_COLUMNS = ("status", "n_input_tokens", "n_output_tokens")
_COLUMNS = (*_CONSTANT_COLUMNS, *_NUMBER_COLUMNS, "errors", "latency_ms_per_token")
_FILE_NAME = re.compile(r"results_(?P<llm>.+)_gpu(?P<gpu_count>\d+)_(?P<gpu_type>[^_]+)_u(?P<users_count>\d+)\.csv")
_WHOLE_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_OUT_OF_MEMORY = r"OutOfMemory|CUDA out of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile:
    """The records of one load test; every array has a value per request."""

    name: str
    llm: str
    gpu_profile: str
    users_count: int
    test_seconds: int
    status: npt.NDArray[np.float64]
    """200: the request succeeded."""
    input_tokens: npt.NDArray[np.float64]
    """NaN where nobody counted them, as in failed requests."""
    output_tokens: npt.NDArray[np.float64]
    is_out_of_memory: npt.NDArray[np.bool_]
    """Whether the request's error text says that the GPU ran out of memory."""
    latency_text: npt.NDArray[np.uint8]
    """The requests' lists of milliseconds, e.g. `[8, 164, 19]`, one right after the other."""
    latency_offsets: npt.NDArray[np.int64]
    """Where each list begins in `latency_text`; one more entry for where the last one ends."""


def parse_raw_file(name: str, content: bytes) -> RawFile:
    """Read one CSV. Raises InvalidInputError that lists every bad column and row."""
    table = read_columns(name, content, _COLUMNS)
    violations: list[Violation] = []
    constant = {column: _constant(name, table[column], column, violations) for column in _CONSTANT_COLUMNS}
    number = {column: read_numbers(name, table[column], column, violations) for column in _NUMBER_COLUMNS}
    violations += _empty_cells(name, table["latency_ms_per_token"], "latency_ms_per_token")
    violations += _file_name_violations(name, constant)
    if violations:
        raise InvalidInputError(violations)
    latencies = pa.concat_arrays(table["latency_ms_per_token"].cast(pa.large_string()).chunks)
    _, offsets, text = latencies.buffers()
    return RawFile(
        name=name,
        llm=constant["model"],
        gpu_profile=gpu_profile_name(constant["n_gpus"], constant["gpu_type"]),
        users_count=int(constant["num_users"]),
        test_seconds=int(constant["experiment_duration_s"]),
        status=number["status"],
        input_tokens=number["n_input_tokens"],
        output_tokens=number["n_output_tokens"],
        is_out_of_memory=pc.match_substring_regex(table["errors"], _OUT_OF_MEMORY).fill_null(False).to_numpy(),
        latency_text=np.frombuffer(text, np.uint8),
        latency_offsets=np.frombuffer(offsets, np.int64)[: len(latencies) + 1],
    )


def read_columns(name: str, content: bytes, columns: tuple[str, ...]) -> pa.Table:
    """Return these columns of a raw file as text. Raises InvalidInputError that lists what keeps it from being read."""
    violations = list(_text_violations(name, content, columns))
    if violations:
        raise InvalidInputError(violations)
    ragged: list[pyarrow.csv.InvalidRow] = []
    try:
        table = _read_csv(content, ragged, columns)
    except pa.ArrowInvalid as error:
        raise InvalidInputError([Violation(name, f"must be CSV: {error}")]) from error
    violations = [
        Violation(f"{name} row {row.number - 1}", f"has {row.actual_columns} cells, must have {row.expected_columns}")
        for row in ragged
    ]
    if not violations and not table.num_rows:
        violations.append(Violation(name, "has no rows"))
    if violations:
        raise InvalidInputError(violations)
    return table


def _text_violations(name: str, content: bytes, columns: tuple[str, ...]) -> Iterator[Violation]:
    if not content.endswith(b"\n"):
        yield Violation(name, "the last line is cut off; fetch the raw data again")
    if not content.isascii():  # quick, and true of the public files
        try:
            content.decode()
        except UnicodeDecodeError as error:
            yield Violation(name, f"must be UTF-8 text, byte {error.start} is not")
    header = next(csv.reader([content.partition(b"\n")[0].decode("utf-8-sig", errors="replace")]), [])
    for column in columns:
        if header.count(column) != 1:
            yield Violation(f"{name} column {column}", f"must appear once, appears {header.count(column)} times")


def _read_csv(content: bytes, ragged: list[pyarrow.csv.InvalidRow], columns: tuple[str, ...]) -> pa.Table:
    def skip(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # the caller has a thread per file
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=columns,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _constant(name: str, column: pa.ChunkedArray, column_name: str, violations: list[Violation]) -> str:
    values = [str(value) for value in column.unique().to_pylist()]
    field = f"{name} column {column_name}"
    if len(values) > 1:
        violations.append(Violation(field, f"must be the same in every row, is {', '.join(values[:5])}"))
    elif column_name == "gpu_type" and values[0] not in GPU_OF_TYPE:
        violations.append(Violation(field, f"must be one of {', '.join(GPU_OF_TYPE)}, is {values[0]!r}"))
    elif column_name == "model" and not column[0].is_valid:
        violations.append(Violation(field, "must not be empty"))
    elif column_name not in {"gpu_type", "model"} and not _WHOLE_NUMBER.fullmatch(values[0]):
        violations.append(Violation(field, f"must be a whole number > 0, is {values[0]!r}"))
    return values[0]


def read_numbers(
    name: str, column: pa.ChunkedArray, column_name: str, violations: list[Violation]
) -> npt.NDArray[np.float64]:
    """Return a column's numbers, NaN for an empty cell; add what is no number to the violations."""
    try:
        numbers: npt.NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        violations += [
            Violation(f"{name} row {row}, column {column_name}", f"must be a number, is {cell!r}")
            for row, cell in enumerate(column.to_pylist(), start=1)
            if cell is not None and not _is_number(cell)
        ]
        return np.empty(0)
    return numbers


def _is_number(cell: str) -> bool:
    try:
        pa.scalar(cell).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _empty_cells(name: str, column: pa.ChunkedArray, column_name: str) -> Iterator[Violation]:
    for row in np.flatnonzero(column.is_null().to_numpy()):
        yield Violation(f"{name} row {row + 1}, column {column_name}", "must not be empty")


def _file_name_violations(name: str, constant: dict[str, str]) -> Iterator[Violation]:
    match = _FILE_NAME.fullmatch(name.rpartition("/")[2])
    if match is None:
        return
    expected = {
        "model": match["llm"].replace("__", "/"),
        "n_gpus": match["gpu_count"],
        "gpu_type": match["gpu_type"].upper(),
        "num_users": match["users_count"],
    }
    for column, value in expected.items():
        if constant[column] != value:
            yield Violation(
                f"{name} column {column}", f"must be {value!r} as the file name says, is {constant[column]!r}"
            )
