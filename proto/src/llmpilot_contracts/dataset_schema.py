"""The schema of the characterization dataset: one row per (LLM, GPU profile, concurrent users).

A dataset file is CSV: comment lines `# key: value` (the first is `# schema: <SCHEMA_VERSION>`, then provenance), the
header, the rows. An empty cell means "nobody reported", never 0. Invariant: a table that `problems` finds nothing in
can be turned into measurements without a further check.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the dataset."""

    name: str
    kind: type[str] | type[int] | type[float]
    unit: str
    description: str
    nullable: bool = False
    minimum: float = 0
    maximum: float = math.inf
    values: tuple[str, ...] = ()
    """The allowed values of a categorical column; empty: any."""


ORIGINS = ("measured", "published_median", "simulated")


def _quantiles(latency: str, unit: str, description: str) -> tuple[Column, ...]:
    return tuple(
        Column(
            name=f"{latency}_ms_{quantile}",
            kind=float,
            unit=unit,
            description=f"{words} of the {description}",
            nullable=True,
        )
        for quantile, words in (
            ("median", "Median"),
            ("p90", "90th percentile"),
            ("p95", "95th percentile"),
            ("p99", "99th percentile"),
        )
    )


COLUMNS: tuple[Column, ...] = (
    Column(name="llm", kind=str, unit="", description="LLM name"),
    Column(name="gpu_profile", kind=str, unit="", description="GPU profile name, e.g. 2xA100-40GB"),
    Column(name="users_count", kind=int, unit="users", description="Concurrent users", minimum=1, maximum=1e6),
    Column(name="origin", kind=str, unit="", description="How the numbers came about", values=ORIGINS),
    Column(name="test_seconds", kind=float, unit="s", description="Length of the load test", nullable=True),
    *_quantiles("ttft", "ms", "time to first token over successful requests, queue included"),
    *_quantiles("nttft", "ms/token", "time to first token divided by the input tokens, over successful requests"),
    *_quantiles("itl", "ms", "inter-token latency over all tokens but the first of successful requests"),
    Column(
        name="throughput_tokens_per_second",
        kind=float,
        unit="token/s",
        description="Output tokens of successful requests per second of the test",
        nullable=True,
    ),
    Column(name="request_count", kind=int, unit="requests", description="Requests sent", nullable=True),
    Column(name="error_count", kind=int, unit="requests", description="Requests that failed", nullable=True),
    Column(name="error_rate", kind=float, unit="", description="error_count / request_count", nullable=True, maximum=1),
    Column(
        name="oom_count",
        kind=int,
        unit="requests",
        description="Requests that failed because the GPU ran out of memory",
        nullable=True,
    ),
)

KEY = ("llm", "gpu_profile", "users_count")
COLUMN_NAMES = tuple(column.name for column in COLUMNS)

# Python's int and float also take "1_000", " 1 " and "nan"; other readers of the file do not.
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ERROR_RATE_TOLERANCE = 1e-6


def problems(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return every way in which a table breaks the schema, each with its column and row (1 is the first data row)."""
    return [*_header_problems(header)] or [*_rows_problems(rows)]


def row_problems(row: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the column and the description of every way in which one row, with a cell per column, breaks the schema."""
    cell_problems = [
        (column.name, problem)
        for column, cell in zip(COLUMNS, row, strict=True)
        if (problem := _cell_problem(column, cell))
    ]
    yield from cell_problems or _count_problems(dict(zip(COLUMN_NAMES, row, strict=True)))


def _header_problems(header: Sequence[str]) -> Iterator[str]:
    for name in COLUMN_NAMES:
        if header.count(name) != 1:
            yield f"column {name}: must appear once, appears {header.count(name)} times"
    for name in dict.fromkeys(header):
        if name not in COLUMN_NAMES:
            yield f"column {name}: not in schema version {SCHEMA_VERSION}"
    if tuple(header) != COLUMN_NAMES and sorted(header) == sorted(COLUMN_NAMES):
        yield f"columns: must be in the order {', '.join(COLUMN_NAMES)}"


def _rows_problems(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    seen: dict[tuple[str, ...], int] = {}
    if not rows:
        yield "rows: there are none"
    for number, row in enumerate(rows, start=1):
        if len(row) != len(COLUMNS):
            yield f"row {number}: has {len(row)} cells, must have {len(COLUMNS)}"
            continue
        for name, problem in row_problems(row):
            yield f"row {number}, column {name}: {problem}"
        key = (*row[: len(KEY) - 1], row[len(KEY) - 1].lstrip("0"))  # 1 and 01 are the same users_count
        if key in seen:
            yield f"row {number}: repeats row {seen[key]} ({', '.join(key)})"
        seen.setdefault(key, number)


def _cell_problem(column: Column, cell: str) -> str | None:
    if cell == "":
        return None if column.nullable else "must not be empty"
    if column.kind is str:
        return _text_problem(column, cell)
    if not (_WHOLE_NUMBER if column.kind is int else _NUMBER).fullmatch(cell):
        return f"must be a {'whole ' if column.kind is int else ''}number, is {cell!r}"
    value = float(cell)
    if not math.isfinite(value):
        return f"must be finite, is {cell}"
    if not column.minimum <= value <= column.maximum:
        return f"must be between {column.minimum:g} and {column.maximum:g}, is {cell}"
    return None


def _text_problem(column: Column, cell: str) -> str | None:
    if column.values and cell not in column.values:
        return f"must be one of {', '.join(column.values)}, is {cell!r}"
    if cell != cell.strip() or not cell.isprintable():
        return f"must be printable text without spaces around it, is {cell!r}"
    return None


def _count_problems(row: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    requests, errors, out_of_memory = (
        int(row[name]) if row[name] else None for name in ("request_count", "error_count", "oom_count")
    )
    if requests is not None and errors is not None and errors > requests:
        yield "error_count", f"must be at most request_count {requests}, is {errors}"
    if errors is not None and out_of_memory is not None and out_of_memory > errors:
        yield "oom_count", f"must be at most error_count {errors}, is {out_of_memory}"
    if errors is None or not requests:
        if row["error_rate"]:
            yield "error_rate", f"must be empty without error_count and request_count, is {row['error_rate']}"
    elif not row["error_rate"] or abs(float(row["error_rate"]) - errors / requests) > _ERROR_RATE_TOLERANCE:
        yield "error_rate", f"must be error_count / request_count = {errors / requests:g}, is {row['error_rate']!r}"
