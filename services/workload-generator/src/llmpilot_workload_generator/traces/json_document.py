"""Request logs that are one JSON value: what `vllm bench serve` and guidellm save, and arrays of objects.

Invariant: such a file is held in memory, for a JSON value ends where its file ends; logs of load tests are small.
Sources: vLLM, benchmarks/serve.py; guidellm, GenerativeRequestStats.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.traces.files import RawBatch, unreadable
from llmpilot_workload_generator.traces.formats import FieldPath

_BENCHMARKS = "benchmarks"


@dataclass(frozen=True, slots=True)
class JsonDocument:
    """A file that is one JSON value."""

    path: Path
    label: str
    omits_empty: ClassVar[bool] = True

    def names(self) -> tuple[str, ...]:
        """Return the keys of the object and of the requests in it, or those of the array's objects."""
        document = self._load()
        inside = [".".join(path) for path in self._columns(document)]
        return tuple(dict.fromkeys([*document, *inside] if isinstance(document, dict) else inside))

    def head(self) -> Mapping[str, pa.Array]:
        """Return the lists of the object, or the values of the array's objects."""
        columns = self._columns(self._load())
        return {path[0]: _array(values) for path, values in columns.items() if len(path) == 1}

    def batches(self, fields: Mapping[FieldPath, pa.DataType]) -> Iterator[RawBatch]:
        """Read some fields, all rows at once."""
        columns = self._columns(self._load())
        counts = {path: len(columns[path]) for path in fields if path in columns}
        if len(set(counts.values())) > 1:
            described = ", ".join(f"{'.'.join(path)} {count}" for path, count in counts.items())
            raise InvalidInputError([Violation(self.label, f"must have a value of each per request, has {described}")])
        row_count = next(iter(counts.values()), 0)
        arrays = {path: _array(columns.get(path, [None] * row_count)) for path in fields}
        yield RawBatch(columns=arrays, first_row=0, bytes_done=self.path.stat().st_size)

    def _load(self) -> Any:
        try:
            content = self.path.read_bytes()
            document = json.loads(content)
        except OSError as error:
            raise unreadable(self.label, error) from error
        except (ValueError, RecursionError) as error:
            text = f"must be one JSON value: {error}; call it .jsonl if each line is one" if content else "is empty"
            raise InvalidInputError([Violation(self.label, text)]) from error
        if not isinstance(document, dict | list):
            raise InvalidInputError([Violation(self.label, "must be a JSON object or an array of objects")])
        return document

    def _columns(self, document: Any) -> Mapping[FieldPath, Sequence[Any]]:
        if isinstance(document, list):
            rows = self._objects(document)
            return {(key,): [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        columns: dict[FieldPath, Sequence[Any]] = {
            (key,): values for key, values in document.items() if isinstance(values, list) and key != _BENCHMARKS
        }
        if _BENCHMARKS in document:
            columns |= self._guidellm_columns(document[_BENCHMARKS])
        return columns

    def _objects(self, values: list[Any]) -> list[dict[str, Any]]:
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict):
                raise InvalidInputError([Violation(f"{self.label} entry {number}", "must be an object")])
        return values

    def _guidellm_columns(self, benchmarks: Any) -> dict[FieldPath, Sequence[Any]]:
        """Return the requests of all benchmarks of a file, each with the group it is in as its status."""
        try:
            requests = [
                (status, request)
                for benchmark in benchmarks
                for status, group in benchmark["requests"].items()
                for request in group or ()
            ]
            values = {
                "status": [status for status, _ in requests],
                "prompt_tokens": [request.get("prompt_tokens") for _, request in requests],
                "output_tokens": [request.get("output_tokens") for _, request in requests],
                "start_time": [_guidellm_start(request) for _, request in requests],
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise InvalidInputError(
                [Violation(f"{self.label} {_BENCHMARKS}", "must each have the requests, grouped by how they ended")]
            ) from error
        if not any(time is not None for time in values["start_time"]):
            del values["start_time"]
        return {(_BENCHMARKS, name): column for name, column in values.items()}


def _guidellm_start(request: Mapping[str, Any]) -> Any:
    """Return the seconds since 1970, which have moved from version to version."""
    for key in ("request_start_time", "start_time"):
        if request.get(key) is not None:
            return request[key]
    timings = (request.get("scheduler_info") or {}).get("request_timings") or (request.get("info") or {}).get("timings")
    return (timings or {}).get("request_start")


def _array(values: Sequence[Any]) -> pa.Array:
    """Return values as Arrow has them; as text where they are of several types."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
