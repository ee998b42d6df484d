"""Traces as Parquet: read in batches, the asked columns only, with the types they are stored in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from llmpilot_workload_generator.traces.files import RawBatch, unreadable
from llmpilot_workload_generator.traces.formats import FieldPath

_BATCH_ROWS = 1 << 18
"""So few that the memory of one batch is there for the next; as many as make a batch's own cost small."""
_HEAD_ROWS = 1 << 10


@dataclass(frozen=True, slots=True)
class ParquetTrace:
    """A Parquet file."""

    path: Path
    label: str
    omits_empty: ClassVar[bool] = False

    def names(self) -> tuple[str, ...]:
        """Return the columns of its schema."""
        with self._open(()) as file:
            return tuple(file.schema_arrow.names)

    def head(self) -> Mapping[str, pa.Array]:
        """Return the first rows."""
        with self._open(()) as file:
            schema = file.schema_arrow
            try:
                batch = next(file.iter_batches(batch_size=_HEAD_ROWS), None)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.label, error) from error
        table = pa.RecordBatch.from_pylist([], schema) if batch is None else batch
        return dict(zip(schema.names, table.columns, strict=True))

    def batches(self, fields: Mapping[FieldPath, pa.DataType]) -> Iterator[RawBatch]:
        """Read some columns; text stays encoded as it is stored, with a dictionary."""
        row = 0
        with self._open([path[0] for path in fields]) as file:
            total_rows, total_bytes = file.metadata.num_rows, self.path.stat().st_size
            try:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[path[0] for path in fields]):
                    columns = {path: batch.column(path[0]) for path in fields}
                    done = total_bytes * (row + batch.num_rows) // total_rows
                    yield RawBatch(columns=columns, first_row=row, bytes_done=done)
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.label, error) from error

    def _open(self, names: list[str] | tuple[()]) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path)
            texts = [name for name in names if pa.types.is_string(file.schema_arrow.field(name).type)]
            if texts:
                file.close()
                file = pq.ParquetFile(self.path, read_dictionary=texts)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.label, error) from error
        return file
