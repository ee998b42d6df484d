"""Traces as CSV: a row per request, the first line names the columns.

Invariant: every cell stays the text it is in the file until `trace_columns` makes it a value, so nothing is guessed
while parsing, and a cell that cannot be used is shown as it stands there.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.csv

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.traces.files import (
    BLOCK_BYTES,
    HEAD_BYTES,
    ByteSource,
    ByteStream,
    RawBatch,
    unreadable,
)
from llmpilot_workload_generator.traces.formats import FieldPath

_HEADER_BYTES = 1 << 16
_OTHER_SEPARATORS = ";\t"
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class CsvFile:
    """A CSV file, in whatever holds its bytes."""

    source: ByteSource
    omits_empty: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.source.label

    def names(self) -> tuple[str, ...]:
        """Return the first line."""
        try:
            with self.source.open() as stream:
                start = stream.file.read(_HEADER_BYTES)
        except OSError as error:
            raise unreadable(self.label, error) from error
        line = start.lstrip(b"\r\n").partition(b"\n")[0].decode("utf-8-sig", errors="replace").rstrip("\r")
        if not line.strip():
            raise InvalidInputError([Violation(self.label, "is empty; its first line must name the columns")])
        if not line.replace("\t", " ").isprintable() or "\N{REPLACEMENT CHARACTER}" in line:
            raise InvalidInputError([Violation(self.label, "must be CSV, its first line is no text")])
        names = tuple(next(csv.reader([line])))
        if len(names) == 1 and (found := next((other for other in _OTHER_SEPARATORS if other in line), "")):
            problem = f"must have commas between its columns, has {found!r}"
            raise InvalidInputError([Violation(self.label, problem)])
        if any(_is_number(name) for name in names):
            text = f"must name the columns in its first line, which is {line[:_SHOWN_CHARACTERS]!r}"
            raise InvalidInputError([Violation(self.label, text)])
        return names

    def head(self) -> Mapping[str, pa.Array]:
        """Return the first rows, as text."""
        fields: dict[FieldPath, pa.DataType] = {(name,): pa.string() for name in self.names()}
        batch = next(self._read(fields, HEAD_BYTES), None)
        return {path[0]: batch.columns[path] if batch else pa.array([], pa.string()) for path in fields}

    def batches(self, fields: Mapping[FieldPath, pa.DataType]) -> Iterator[RawBatch]:
        """Read some columns, as text."""
        return self._read(fields, BLOCK_BYTES)

    def _read(self, fields: Mapping[FieldPath, pa.DataType], block_bytes: int) -> Iterator[RawBatch]:
        row = 0
        ragged: list[pyarrow.csv.InvalidRow] = []
        names = [path[0] for path in fields]
        try:
            with self.source.open() as stream, _open_csv(stream, names, ragged, block_bytes) as rows:
                for batch in rows:
                    self._refuse(ragged)
                    columns = {path: batch.column(path[0]) for path in fields}
                    yield RawBatch(columns=columns, first_row=row, bytes_done=stream.position())
                    row += batch.num_rows
                self._refuse(ragged)
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(self.label, error) from error

    def _refuse(self, ragged: list[pyarrow.csv.InvalidRow]) -> None:
        """Raise the first rows that have too many or too few cells."""
        if ragged:
            raise InvalidInputError(
                Violation(
                    f"{self.label} row {row.number - 1}",
                    f"has {row.actual_columns} cells, must have {row.expected_columns}",
                )
                for row in ragged[:_SHOWN_ROWS]
            )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _open_csv(
    stream: ByteStream, names: list[str], ragged: list[pyarrow.csv.InvalidRow], block_bytes: int
) -> pyarrow.csv.CSVStreamingReader:
    def skip(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    return pyarrow.csv.open_csv(
        stream.file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=block_bytes),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=names,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
