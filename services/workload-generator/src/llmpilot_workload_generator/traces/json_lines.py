"""Traces as JSON, one object per line: Mooncake's traces, AIPerf's exports, and logs of one's own.

Invariant: Arrow reads the lines; only where it refuses one are they read again, slowly, to name the line and the field.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

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

_SHOWN_CHARACTERS = 60
_NO_OBJECTS = "Empty JSON stream"


@dataclass(frozen=True, slots=True)
class JsonLinesFile:
    """A file with a JSON object per line."""

    source: ByteSource
    omits_empty: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.source.label

    def names(self) -> tuple[str, ...]:
        """Return the keys of the first object."""
        for number, line in self._lines():
            if line.strip():
                return tuple(_parse(line, f"{self.label} line {number}"))
        raise InvalidInputError([Violation(self.label, "is empty; each line must be a JSON object")])

    def head(self) -> Mapping[str, pa.Array]:
        """Return the first rows of every key that they have."""
        rows: list[dict[str, Any]] = []
        unread = HEAD_BYTES
        for number, line in self._lines():
            if line.strip():
                rows.append(_parse(line, f"{self.label} line {number}"))
            unread -= len(line)
            if unread < 0:
                break
        return {
            key: _first_values([row.get(key) for row in rows])
            for key in dict.fromkeys(key for row in rows for key in row)
        }

    def batches(self, fields: Mapping[FieldPath, pa.DataType]) -> Iterator[RawBatch]:
        """Read some fields; a key that a line does not have is empty there."""
        row = 0
        schema = _schema(fields)
        try:
            with self.source.open() as stream, _open_json(stream, schema) as rows:
                for batch in rows:
                    columns = {path: _value_at(batch, path) for path in fields}
                    yield RawBatch(columns=columns, first_row=row, bytes_done=stream.position())
                    row += batch.num_rows
        except pa.ArrowInvalid as error:
            if str(error) == _NO_OBJECTS:
                return
            self._refuse(schema, error)
        except OSError as error:
            raise unreadable(self.label, error) from error

    def _refuse(self, schema: pa.Schema, error: pa.ArrowInvalid) -> NoReturn:
        """Raise the first line that is not as the schema says."""
        for number, line in self._lines():
            if line.strip():
                values = _parse(line, f"{self.label} line {number}")
                violations = list(_type_violations(values, schema, f"{self.label} line {number}"))
                if violations:
                    raise InvalidInputError(violations) from error
        text = f"cannot be read as one JSON object per line: {error}"
        raise InvalidInputError([Violation(self.label, text)]) from error

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.source.open() as stream, io.BufferedReader(stream.file) as lines:
                yield from enumerate(lines, start=1)
        except OSError as error:
            raise unreadable(self.label, error) from error


def _open_json(stream: ByteStream, schema: pa.Schema) -> pa.RecordBatchReader:
    return pyarrow.json.open_json(
        stream.file,
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _first_values(values: list[Any]) -> pa.Array:
    """Return values as Arrow has them; those of another type than the first one, which reading refuses, as empty."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, dict | list):
        return pa.array([[]])
    same = {int, float} if type(first) in {int, float} else {type(first)}
    try:
        return pa.array([value if type(value) in same else None for value in values])
    except (pa.ArrowInvalid, OverflowError):  # a whole number of more than 64 bits
        return pa.array([0.0])


def _schema(fields: Mapping[FieldPath, pa.DataType]) -> pa.Schema:
    """Return the type of the outermost objects, given those of the values inside them."""
    tree: dict[str, Any] = {}
    for path, value_type in fields.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value_type
    return pa.schema(_struct(tree).fields)


def _struct(tree: Mapping[str, Any]) -> pa.StructType:
    return pa.struct([(key, _struct(part) if isinstance(part, dict) else part) for key, part in tree.items()])


def _value_at(batch: pa.RecordBatch, path: FieldPath) -> pa.Array:
    column = batch.column(path[0])
    return pc.struct_field(column, list(path[1:])) if path[1:] else column


def _parse(line: bytes, label: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:_SHOWN_CHARACTERS].decode(errors="replace").strip()
        raise InvalidInputError([Violation(label, f"must be a JSON object, is {shown!r}: {error}")]) from error
    if not isinstance(values, dict):
        raise InvalidInputError([Violation(label, f"must be a JSON object, is {str(values)[:_SHOWN_CHARACTERS]}")])
    return values


def _type_violations(values: Mapping[str, Any], schema: Any, label: str, prefix: str = "") -> Iterator[Violation]:
    """Yield what keeps Arrow from reading these values with these types."""
    for field in schema:
        value = values.get(field.name)
        wanted = _wanted(field.type)
        if value is None or wanted is None:
            continue
        name = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type) and isinstance(value, dict):
            yield from _type_violations(value, field.type.fields, label, f"{name}.")
        elif not wanted[0](value):
            yield Violation(f"{label}, column {name}", f"must be {wanted[1]}, is {str(value)[:_SHOWN_CHARACTERS]!r}")


def _wanted(field_type: pa.DataType) -> tuple[Callable[[Any], bool], str] | None:
    """Return a test of a value for a type, and the words for it; None: any value will do."""
    return next(((test, words) for is_type, test, words in _TESTS if is_type(field_type)), None)


def _is_whole(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


_TESTS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any], bool], str], ...] = (
    (pa.types.is_integer, _is_whole, "a whole number"),
    (pa.types.is_floating, lambda value: type(value) in {int, float}, "a number"),
    (pa.types.is_boolean, lambda value: isinstance(value, bool), "true or false"),
    (pa.types.is_string, lambda value: isinstance(value, str), "text"),
    (pa.types.is_timestamp, lambda value: isinstance(value, str), "text"),
    (pa.types.is_struct, lambda value: isinstance(value, dict), "an object"),
    (pa.types.is_list, lambda value: isinstance(value, list) and all(map(_is_whole, value)), "whole numbers"),
)
