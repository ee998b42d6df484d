"""Opens traces, whatever their format and however many files they have, and delivers them in checked batches.

Invariant: memory holds a few batches, however long the trace; a row is delivered, or counted as a failed request, or
the reason of an error that names its file, row and column.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import OUTPUT_TOKENS, Integers, Kind
from llmpilot_workload_generator.traces.columns import BadCellError, nanos_of, numpy_of, values_of
from llmpilot_workload_generator.traces.csv_rows import CsvFile
from llmpilot_workload_generator.traces.files import (
    RawBatch,
    StoredBytes,
    TraceFile,
    archive_members,
    is_archive,
    partitions,
    suffix_of,
)
from llmpilot_workload_generator.traces.formats import FieldPath, Success
from llmpilot_workload_generator.traces.json_document import JsonDocument
from llmpilot_workload_generator.traces.json_lines import JsonLinesFile
from llmpilot_workload_generator.traces.parquet import ParquetTrace
from llmpilot_workload_generator.traces.plan import Plan, Request, plan_for, same_format
from llmpilot_workload_generator.traces.trace import Trace, TraceBatch

_V = TypeVar("_V")

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def open_trace(
    path: Path,
    *,
    format_name: str | None = None,
    parameters: Sequence[str] = (),
    columns: Mapping[str, str] = NO_COLUMNS,
) -> Trace:
    """Look at a trace: a file, or a folder of files of one format.

    `parameters` are those to read, in this order; none: all there are. `columns` names the file's column of each
    parameter, and of `timestamp`, in a format nobody knows. Raises NotFoundError and InvalidInputError.
    """
    paths = partitions(path)
    request = Request(format_name=format_name, parameters=tuple(parameters), columns=columns)
    plan: Plan | None = None
    violations: list[Violation] = []
    for file_path in paths:
        with closing(_files(file_path)) as files:
            file, _ = next(files)
            if plan is None:
                plan = plan_for(file, request)
            else:
                violations += same_format(file, plan, request)
    if violations or plan is None:
        raise InvalidInputError(violations)
    fixed = plan
    return Trace(
        source=fixed.source or path.name,
        licence=fixed.licence,
        format_name=fixed.format_name,
        kinds=fixed.kinds,
        read=lambda: _read(paths, fixed, request),
        prefix_block_tokens=fixed.prefix.block_tokens if fixed.prefix else 0,
        has_absolute_times=fixed.time is not None and fixed.time.is_absolute,
        size_bytes=sum(file_path.stat().st_size for file_path in paths),
    )


def _files(path: Path) -> Generator[tuple[TraceFile, int | None], None, None]:
    """Yield the files of rows that a file is, or has in it, and how much of an archive was read."""
    label = str(path)
    suffix = suffix_of(path)
    if is_archive(path):
        found = False
        for member, bytes_done in archive_members(path, label):
            found = True
            yield CsvFile(member), bytes_done
        if not found:
            raise InvalidInputError([Violation(label, "has no CSV file in it")])
    elif suffix == ".parquet":
        yield ParquetTrace(path, label), None
    elif suffix == ".json":
        yield JsonDocument(path, label), None
    elif suffix.startswith(".csv"):
        yield CsvFile(StoredBytes(path, label)), None
    else:
        yield JsonLinesFile(StoredBytes(path, label)), None


def _read(paths: Sequence[Path], plan: Plan, request: Request) -> Iterator[TraceBatch]:
    bytes_before = 0
    for path in paths:
        for number, (file, archive_bytes) in enumerate(_files(path)):
            if number and (violations := same_format(file, plan, request)):
                raise InvalidInputError(violations)
            for raw in file.batches(plan.types):
                bytes_done = raw.bytes_done if archive_bytes is None else archive_bytes
                yield _checked(raw, file.label, plan, bytes_before + bytes_done)
        bytes_before += path.stat().st_size


def _checked(raw: RawBatch, label: str, plan: Plan, bytes_done: int) -> TraceBatch:
    """Return the rows of a batch that did not fail. Raises InvalidInputError with the first bad row of every column."""
    batch = _Rows(raw, label)
    row_count = len(batch)
    batch.keep(_succeeded(batch.columns, plan.successes))
    if OUTPUT_TOKENS in plan.columns:
        batch.keep(_has_output(batch.columns[plan.columns[OUTPUT_TOKENS]]))
    values = {
        name: batch.convert(path, partial(values_of, kind=plan.kinds[name], name=name))
        for name, path in plan.columns.items()
    }
    arrival_nanos = batch.convert(plan.time.path, partial(nanos_of, unit=plan.time.unit)) if plan.time else None
    prefixes = batch.convert(plan.prefix.path, _prefixes) if plan.prefix else None
    prefix_ids, prefix_starts = prefixes or (None, None)
    if batch.violations:
        raise InvalidInputError(batch.violations)
    return TraceBatch(
        columns={name: column for name, column in values.items() if column is not None},
        arrival_nanos=arrival_nanos,
        prefix_ids=prefix_ids,
        prefix_starts=prefix_starts,
        skipped_row_count=row_count - len(batch),
        bytes_done=bytes_done,
    )


class _Rows:
    """The rows of a batch that are left, and where in the file they are."""

    def __init__(self, raw: RawBatch, label: str) -> None:
        self.columns = dict(raw.columns)
        self._label = label
        self._first_row = raw.first_row
        self._positions: Integers | None = None
        self.violations: list[Violation] = []

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def keep(self, mask: pa.BooleanArray | None) -> None:
        """Drop the rows that a mask has no True for; None: keep all."""
        if mask is None or pc.all(mask, min_count=0).as_py():
            return
        kept = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
        self._positions = kept if self._positions is None else self._positions[kept]
        self.columns = {path: column.filter(mask) for path, column in self.columns.items()}

    def convert(self, path: FieldPath, checked: Callable[[pa.Array], _V]) -> _V | None:
        """Return what a column's values are, or add to the violations where in the file they cannot be used."""
        try:
            return checked(self.columns[path])
        except BadCellError as error:
            position = error.position if self._positions is None else int(self._positions[error.position])
            field = f"{self._label} row {self._first_row + position + 1}, column {'.'.join(path)}"
            self.violations.append(Violation(field, str(error)))
            return None


def _succeeded(columns: Mapping[FieldPath, pa.Array], successes: Sequence[Success]) -> pa.BooleanArray | None:
    mask: pa.BooleanArray | None = None
    for success in successes:
        column = columns[success.path]
        good = pc.is_null(column) if success.or_empty else pa.array(np.zeros(len(column), np.bool_))
        if success.values:
            good = pc.or_(good, pc.is_in(column.cast(pa.string()), pa.array(sorted(success.values))))
        mask = good if mask is None else pc.and_(mask, good)
    return mask


def _has_output(column: pa.Array) -> pa.BooleanArray | None:
    """Return which rows have output tokens; a request without any failed. What is no number is kept, to be refused."""
    try:
        values = values_of(column, Kind.INTEGER, "")
    except BadCellError:
        return None
    return pa.array(values != 0) if (values == 0).any() else None


def _prefixes(column: pa.Array) -> tuple[Integers, Integers]:
    """Return the ids of all rows and where each row's begin."""
    if column.null_count:
        raise BadCellError(int(pc.index(pc.is_null(column), pa.scalar(True)).as_py()), "must not be empty")
    ids = column.flatten()
    starts = np.zeros(len(column) + 1, np.int64)
    np.cumsum(numpy_of(pc.list_value_length(column)), out=starts[1:])
    if ids.null_count:
        first = int(pc.index(pc.is_null(ids), pa.scalar(True)).as_py())
        raise BadCellError(int(np.searchsorted(starts, first, side="right")) - 1, "must not have an empty id")
    return numpy_of(ids.cast(pa.int64(), safe=False)), starts
