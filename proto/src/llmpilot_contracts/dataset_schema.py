"""The schema of the characterization dataset: one row per (LLM, GPU profile, concurrent users).

A dataset file is CSV: comment lines `# key: value` (the first is `# schema: <SCHEMA_VERSION>`, then provenance), the
header, the rows. An empty cell means "nobody reported", never 0. Invariant: a table that `problems` finds nothing in
can be turned into measurements without a further check.
"""

import math
from collections.abc import Iterator, Sequence
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
    Column(
        name="error_rate", kind=float, unit="", description="error_count / request_count", nullable=True, maximum=1
    ),
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


def problems(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return every way in which a table breaks the schema, each with its column and row (1 is the first data row)."""
    return [*_header_problems(header)] or [*_row_problems(rows)]


def _header_problems(header: Sequence[str]) -> Iterator[str]:
    for name in COLUMN_NAMES:
        if name not in header:
            yield f"column {name}: missing"
    for name in header:
        if name not in COLUMN_NAMES:
            yield f"column {name}: not in schema version {SCHEMA_VERSION}"
        elif header.count(name) > 1:
            yield f"column {name}: appears {header.count(name)} times"
    if not [*_unordered(header)]:
        return
    yield from _unordered(header)


def _unordered(header: Sequence[str]) -> Iterator[str]:
    if sorted(header) == sorted(COLUMN_NAMES) and tuple(header) != COLUMN_NAMES:
        yield f"columns: must be in the order {', '.join(COLUMN_NAMES)}"


def _row_problems(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    seen: dict[tuple[str, ...], int] = {}
    if not rows:
        yield "rows: none"
    for number, row in enumerate(rows, start=1):
        if len(row) != len(COLUMNS):
            yield f"row {number}: has {len(row)} cells, must have {len(COLUMNS)}"
            continue
        for column, cell in zip(COLUMNS, row, strict=True):
            problem = _cell_problem(column, cell)
            if problem:
                yield f"row {number}, column {column.name}: {problem}"
        key = tuple(row[: len(KEY)])
        if key in seen:
            yield f"row {number}: repeats row {seen[key]} ({', '.join(key)})"
        seen.setdefault(key, number)


def _cell_problem(column: Column, cell: str) -> str | None:
    if cell == "":
        return None if column.nullable else "must not be empty"
    if column.kind is str:
        allowed = not column.values or cell in column.values
        return None if allowed else f"must be one of {', '.join(column.values)}, is {cell!r}"
    try:
        value = column.kind(cell)
    except ValueError:
        return f"must be {'a whole number' if column.kind is int else 'a number'}, is {cell!r}"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return f"must be finite, is {cell!r}"
    if not column.minimum <= value <= column.maximum:
        return f"must be between {column.minimum:g} and {column.maximum:g}, is {cell}"
    return None
