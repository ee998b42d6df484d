"""The records of a whole load test in one Parquet file that any tool can read.

A row per request, in the columns of `record_schema` after some that say which stage it belongs to; times are since the
start of the stage. A row group per run of a stage, and what else is known of the load test as JSON in the file's
metadata. Times of chunks are stored byte plane by byte plane (BYTE_STREAM_SPLIT) under zstd: about 3 bytes a token at
nanoseconds. Invariant: what `read_records` gives is what `write_records` took, to the nanosecond.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError, Violation
from llmpilot_contracts.record_schema import COLUMNS, FINISH_REASONS, STAMP_SOURCES, STATUSES, TOKEN_COUNT_SOURCES
from llmpilot_loadtester.domain.records import UNKNOWN, Integers, RecordBatch
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts
from llmpilot_servicekit.file_output import written_whole

METADATA_KEY = b"llm-pilot"
_COMPRESSION = "zstd"
_STAGE_FIELDS = (
    pa.field("stage_index", pa.int64(), nullable=False),
    pa.field("attempt", pa.int64(), nullable=False),
    pa.field("load", pa.string(), nullable=False),
    pa.field("users_count", pa.int64()),
    pa.field("llm", pa.string(), nullable=False),
    pa.field("gpu_profile", pa.string(), nullable=False),
)
_REASONING = pa.field("reasoning_token_count", pa.int64())
"""Beyond the schema: output tokens before the answer, as the server counts them."""


def _record_field(name: str) -> pa.Field:
    column = next(column for column in COLUMNS if column.name == name)
    kind = pa.string() if column.kind is str else pa.int64()
    element = pa.list_(pa.field("element", kind, nullable=False)) if column.is_list else kind
    return pa.field(name, element, nullable=column.nullable)


SCHEMA = pa.schema([*_STAGE_FIELDS, *(_record_field(column.name) for column in COLUMNS), _REASONING])
_TEXT_COLUMNS = [field.name for field in SCHEMA if field.type == pa.string()]
_DICTIONARY_COLUMNS = [
    *_TEXT_COLUMNS, "stage_index", "attempt", "users_count", "chunk_token_counts.list.element"
]  # fmt: skip
_TIME_COLUMNS = (
    "scheduled_time_nanos",
    "send_time_nanos",
    "first_byte_time_nanos",
    "end_time_nanos",
    "chunk_time_nanos.list.element",
)


class RecordsWriter:
    """Writes a file stage by stage; the facts come last, as they are known when the load test has ended."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pq.ParquetWriter(
            file,
            SCHEMA,
            compression=_COMPRESSION,
            use_dictionary=_DICTIONARY_COLUMNS,
            column_encoding=dict.fromkeys(_TIME_COLUMNS, "BYTE_STREAM_SPLIT"),
            write_statistics=[name for name in SCHEMA.names if not name.startswith("chunk_")],
        )
        self._stages: list[StageFacts] = []

    def add(self, facts: StageFacts, records: RecordBatch, *, simulated: bool = False) -> None:
        """Write one run of a stage; times of the records are since its start."""
        table = _table(facts, records, simulated=simulated)
        self._writer.write_table(table, row_group_size=max(1, len(records)))
        self._stages.append(replace(facts, request_count=len(records)))

    def close(self, facts: RunFacts) -> None:
        """End the file; the stages are those that were added."""
        content = msgspec.json.encode(replace(facts, stages=tuple(self._stages)))
        self._writer.add_key_value_metadata({METADATA_KEY: content})
        self._writer.close()


@contextmanager
def records_writer(path: Path) -> Iterator[RecordsWriter]:
    """Give a writer whose file is put in place whole when it was closed; raises PreconditionError."""
    with written_whole(path) as file:
        yield RecordsWriter(file)


def write_records(path: Path, facts: RunFacts, stages: Iterable[tuple[StageFacts, RecordBatch]]) -> None:
    """Write a file of records, whole or not at all; raises PreconditionError, e.g. when the disk is full."""
    with records_writer(path) as writer:
        for stage_facts, records in stages:
            writer.add(stage_facts, records, simulated=facts.simulated)
        writer.close(facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsFile:
    """A file of records; the records of a stage are read when they are asked for."""

    path: Path
    facts: RunFacts

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        """Every run of every stage, in the file's order."""
        return self.facts.stages

    def records(self, facts: StageFacts) -> RecordBatch:
        """Read the records of one of `stages`; raises InvalidInputError."""
        with _readable(self.path) as file:
            table = file.read_row_group(self.stages.index(facts))
            return _batch(self.path, table)


def read_records(path: Path) -> RecordsFile:
    """Open a file of records. Raises NotFoundError, and InvalidInputError for a file that a load test did not write."""
    if not path.exists():
        raise NotFoundError("records file", str(path), hint="`llm-pilot loadtest run` writes one")
    with _readable(path) as file:
        schema = file.schema_arrow
        missing = [name for name in SCHEMA.names if name not in schema.names]
        wrong = [
            f"{field.name} must be {field.type}"
            for field in SCHEMA
            if field.name in schema.names and not _same_kind(schema.field(field.name).type, field.type)
        ]
        problems = [f"column {name} is missing" for name in missing] + [f"column {text}" for text in wrong]
        content = (file.metadata.metadata or {}).get(METADATA_KEY)
        if content is None:
            problems.append(f"metadata {METADATA_KEY.decode()!r} is missing; no load test wrote it")
        if problems or content is None:
            raise InvalidInputError(Violation(str(path), problem) for problem in problems)
        facts = _decoded(path, content)
        if len(facts.stages) != file.num_row_groups:
            raise InvalidInputError(
                [Violation(str(path), f"has {file.num_row_groups} row groups for {len(facts.stages)} stages")]
            )
    return RecordsFile(path=path, facts=facts)


@contextmanager
def _readable(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError([Violation(str(path), f"must be a Parquet file that is whole: {error}")]) from error


def _decoded(path: Path, content: bytes) -> RunFacts:
    try:
        return msgspec.json.decode(content, type=RunFacts)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            [Violation(f"{path} metadata {METADATA_KEY.decode()}", f"cannot be read: {error}")]
        ) from error


def _same_kind(actual: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(actual) and actual.value_type == wanted.value_type)
    return bool(actual == wanted)


def _table(facts: StageFacts, records: RecordBatch, *, simulated: bool) -> pa.Table:
    count = len(records)
    stage_values: list[object] = [
        facts.stage_index,
        facts.attempt,
        facts.stage.load.label,
        facts.stage.load.most_users,
        facts.llm,
        facts.gpu_profile,
    ]
    columns = {
        field.name: pa.repeat(pa.scalar(value, field.type), count)
        for field, value in zip(_STAGE_FIELDS, stage_values, strict=True)
    }
    offsets = records.chunk_starts.astype(np.int32)
    if records.chunk_starts[-1] != offsets[-1]:
        raise PreconditionError("a stage has more than 2^31 chunks; make its stages shorter")
    columns |= {
        "request_index": pa.array(records.request_index),
        "user_index": _nullable(records.user_index),
        "scheduled_time_nanos": pa.array(records.scheduled_nanos),
        "send_time_nanos": pa.array(records.send_nanos),
        "first_byte_time_nanos": _nullable(records.first_byte_nanos),
        "end_time_nanos": pa.array(records.end_nanos),
        "chunk_time_nanos": _lists("chunk_time_nanos", offsets, records.chunk_nanos),
        "chunk_token_counts": _lists("chunk_token_counts", offsets, records.chunk_tokens),
        "input_token_count": _nullable(records.input_tokens),
        "output_token_count": pa.array(records.output_tokens),
        "token_count_source": _words(records.token_count_source, TOKEN_COUNT_SOURCES),
        "status": _words(records.status, STATUSES),
        "error": pa.array(records.errors, pa.string()),
        "finish_reason": _words(records.finish_reason, FINISH_REASONS),
        "stamp_source": _words(records.stamp_source, STAMP_SOURCES),
        "origin": pa.repeat(pa.scalar("simulated" if simulated else "measured"), count),
        _REASONING.name: _nullable(records.reasoning_tokens),
    }
    return pa.table(columns, schema=SCHEMA)


def _lists(name: str, offsets: npt.NDArray[np.int32], values: Integers) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCHEMA.field(name).type)


def _nullable(values: Integers) -> pa.Array:
    return pa.array(values, mask=values == UNKNOWN)


def _words(codes: Integers, words: tuple[str, ...]) -> pa.Array:
    return pa.array(words).take(_nullable(codes))


def _batch(path: Path, table: pa.Table) -> RecordBatch:
    times, counts = (table[name].combine_chunks() for name in ("chunk_time_nanos", "chunk_token_counts"))
    starts = _offsets(times)
    problems = []
    if not np.array_equal(starts, _offsets(counts)):
        problems.append("chunk_token_counts: must have an entry for every chunk time")
    problems += [
        f"{field.name}: must not be empty" for field in SCHEMA if table[field.name].null_count and not field.nullable
    ]
    codes = {}
    for name, words in _CODED.items():
        codes[name], problem = _codes(table[name], words)
        problems += [f"{name}: {problem}"] * bool(problem)
    if problems:
        raise InvalidInputError(Violation(str(path), problem) for problem in problems)
    return RecordBatch(
        request_index=_numbers(table["request_index"]),
        user_index=_numbers(table["user_index"]),
        scheduled_nanos=_numbers(table["scheduled_time_nanos"]),
        send_nanos=_numbers(table["send_time_nanos"]),
        first_byte_nanos=_numbers(table["first_byte_time_nanos"]),
        end_nanos=_numbers(table["end_time_nanos"]),
        input_tokens=_numbers(table["input_token_count"]),
        reasoning_tokens=_numbers(table[_REASONING.name]),
        **codes,
        errors=tuple(table["error"].to_pylist()),
        chunk_starts=starts,
        chunk_nanos=np.asarray(times.flatten().to_numpy(), dtype=np.int64),
        chunk_tokens=np.asarray(counts.flatten().to_numpy(), dtype=np.int64),
    )


_CODED = {
    "token_count_source": TOKEN_COUNT_SOURCES,
    "status": STATUSES,
    "finish_reason": FINISH_REASONS,
    "stamp_source": STAMP_SOURCES,
}


def _offsets(lists: pa.ListArray) -> Integers:
    offsets = np.asarray(lists.offsets.to_numpy(), dtype=np.int64)
    return np.asarray(offsets - offsets[0], dtype=np.int64)


def _numbers(column: pa.ChunkedArray) -> Integers:
    return np.asarray(column.fill_null(UNKNOWN).to_numpy(), dtype=np.int64)


def _codes(column: pa.ChunkedArray, words: tuple[str, ...]) -> tuple[Integers, str]:
    codes = _numbers(pc.index_in(column, value_set=pa.array(words)))
    strange = pc.unique(column.filter(pa.array((codes == UNKNOWN) & column.is_valid().to_numpy()))).to_pylist()
    return codes, f"must be one of {', '.join(words)}, is {', '.join(map(repr, strange))}" if strange else ""
