"""The schema of request records: one row per request of a load test, measured or simulated.

A table is a sequence of values per column. Times are nanoseconds since the start of the test. None means "nobody
reported", never 0. Invariant: a table that `problems` finds nothing in gives every metric of METRICS.md without another
check.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the records."""

    name: str
    kind: type[str] | type[int]
    unit: str
    description: str
    nullable: bool = False
    is_list: bool = False
    """Whether a row has a sequence of values."""
    values: tuple[str, ...] = ()
    """The allowed values of a categorical column; empty: any."""


OK = "ok"
STATUSES = (
    OK,
    "out_of_memory",  # the server said that the GPU has no memory left
    "invalid",  # the server refused the request as such
    "rejected",  # the server would not take it now: 429, 503, queue full
    "timeout",
    "disconnected",  # the reply broke off, or there was no connection
    "malformed",  # the reply was not what the protocol says
    "server_error",
    "cancelled",  # by the client
)
TOKEN_COUNT_SOURCES = ("server", "chunks", "tokenizer", "simulated")
"""Who counted the output tokens: the server's usage report, one per chunk, a tokenizer run on the text, a simulator."""
STAMP_SOURCES = ("kernel", "user_space", "simulated")
ORIGINS = ("measured", "simulated")
FINISH_REASONS = ("stop", "length", "error", "other")

COLUMNS: tuple[Column, ...] = (
    Column(name="request_index", kind=int, unit="", description="Which request of the workload, from 0"),
    Column(
        name="user_index",
        kind=int,
        unit="",
        description="Which user sent it, from 0; none: it was sent by a schedule",
        nullable=True,
    ),
    Column(name="scheduled_time_nanos", kind=int, unit="ns", description="When it should have been sent"),
    Column(name="send_time_nanos", kind=int, unit="ns", description="When it was sent"),
    Column(
        name="first_byte_time_nanos",
        kind=int,
        unit="ns",
        description="When the first byte of the reply came, of whatever kind",
        nullable=True,
    ),
    Column(name="end_time_nanos", kind=int, unit="ns", description="When the reply was complete or the request failed"),
    Column(
        name="chunk_time_nanos",
        kind=int,
        unit="ns",
        description="When each part of the reply came that has output tokens",
        is_list=True,
    ),
    Column(
        name="chunk_token_counts",
        kind=int,
        unit="tokens",
        description="Output tokens of each of those parts",
        is_list=True,
    ),
    Column(
        name="input_token_count",
        kind=int,
        unit="tokens",
        description="Tokens of the prompt",
        nullable=True,
    ),
    Column(name="output_token_count", kind=int, unit="tokens", description="Tokens of the reply, as far as it came"),
    Column(
        name="token_count_source",
        kind=str,
        unit="",
        description="Who counted the output tokens",
        values=TOKEN_COUNT_SOURCES,
    ),
    Column(name="status", kind=str, unit="", description="ok, or what went wrong", values=STATUSES),
    Column(name="error", kind=str, unit="", description="What the server or the network said; empty if ok"),
    Column(
        name="finish_reason",
        kind=str,
        unit="",
        description="Why the reply ended",
        nullable=True,
        values=FINISH_REASONS,
    ),
    Column(
        name="stamp_source",
        kind=str,
        unit="",
        description="Whose clock stamped the chunks, of the same clock as the send time",
        values=STAMP_SOURCES,
    ),
    Column(name="origin", kind=str, unit="", description="How the record came about", values=ORIGINS),
)

COLUMN_NAMES = tuple(column.name for column in COLUMNS)

RecordTable = Mapping[str, Sequence[object]]
"""A sequence per column, all of the same length."""


def problems(table: RecordTable) -> list[str]:
    """Return every way in which a table breaks the schema, each with its column and row (1 is the first)."""
    return [*_shape_problems(table)] or [
        f"row {number}{', column ' + name if name else ''}: {problem}"
        for number, row in enumerate(zip(*(table[name] for name in COLUMN_NAMES), strict=True), start=1)
        for name, problem in row_problems(row)
    ]


def row_problems(row: Sequence[object]) -> Iterator[tuple[str, str]]:
    """Yield the column and the description of every way in which one row, a value per column, breaks the schema."""
    found = [
        (column.name, problem)
        for column, value in zip(COLUMNS, row, strict=True)
        if (problem := _value_problem(column, value))
    ]
    yield from found or _consistency_problems(dict(zip(COLUMN_NAMES, row, strict=True)))


def _shape_problems(table: RecordTable) -> Iterator[str]:
    for name in COLUMN_NAMES:
        if name not in table:
            yield f"column {name}: is missing"
    for name in table:
        if name not in COLUMN_NAMES:
            yield f"column {name}: not in schema version {SCHEMA_VERSION}"
    lengths = {len(values) for values in table.values()}
    if len(lengths) > 1:
        yield f"columns: must have the same number of rows, have {', '.join(map(str, sorted(lengths)))}"


def _value_problem(column: Column, value: object) -> str | None:
    if value is None:
        return None if column.nullable else "must not be empty"
    if column.is_list:
        return _list_problem(value)
    if column.kind is int:
        return _number_problem(value)
    if not isinstance(value, str):
        return f"must be text, is {value!r}"
    if column.values and value not in column.values:
        return f"must be one of {', '.join(column.values)}, is {value!r}"
    return None


def _number_problem(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return f"must be a whole number, is {value!r}"
    return None if int(value) >= 0 else f"must be >= 0, is {value}"


def _list_problem(values: object) -> str | None:
    if isinstance(values, str) or not isinstance(values, Iterable):
        return f"must be a list of whole numbers, is {values!r}"
    for number, value in enumerate(values, start=1):
        if problem := _number_problem(value):
            return f"entry {number} {problem}"
    return None


def _consistency_problems(row: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    yield from _time_problems(row)
    counts = _numbers(row["chunk_token_counts"])
    output = row["output_token_count"]
    if len(counts) != len(_numbers(row["chunk_time_nanos"])):
        yield "chunk_token_counts", "must have an entry for every chunk time"
    if 0 in counts:
        yield "chunk_token_counts", "must be > 0; a part without output tokens is no chunk"
    if sum(counts) != output:
        yield "chunk_token_counts", f"must add up to output_token_count {output}, are {sum(counts)}"
    if (row["status"] == OK) != (row["error"] == ""):
        yield "error", f"must be empty if and only if status is {OK}, status is {row['status']}"
    if row["status"] == OK and not counts:
        yield "output_token_count", f"must be > 0 if status is {OK}"


def _time_problems(row: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    chunks = _numbers(row["chunk_time_nanos"])
    if any(later < earlier for earlier, later in pairwise(chunks)):
        yield "chunk_time_nanos", "must not decrease"
    moments = [
        ("scheduled_time_nanos", row["scheduled_time_nanos"]),
        ("send_time_nanos", row["send_time_nanos"]),
        ("first_byte_time_nanos", row["first_byte_time_nanos"]),
        ("chunk_time_nanos", chunks[0] if chunks else None),
        ("chunk_time_nanos", chunks[-1] if chunks else None),
        ("end_time_nanos", row["end_time_nanos"]),
    ]
    known = [(name, value) for name, value in moments if isinstance(value, Integral)]
    for (earlier_name, earlier), (name, value) in pairwise(known):
        if int(value) < int(earlier) and name != earlier_name:
            yield name, f"must not be before {earlier_name} {earlier}, is {value}"


def _numbers(values: object) -> list[int]:
    return [int(value) for value in values] if isinstance(values, Iterable) else []
