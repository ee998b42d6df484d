"""What is to be read of a trace: its format, told by its columns, and where each parameter is.

Invariant: a plan is made from the first file and fits every other one, or there is an error that names both.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import Kind
from llmpilot_workload_generator.traces.columns import KINDS, first_text, has_utc_offset, is_date_time, kind_of
from llmpilot_workload_generator.traces.files import TraceFile
from llmpilot_workload_generator.traces.formats import (
    FORMAT_NAMES,
    FORMATS,
    TABLE,
    FieldPath,
    PrefixField,
    Success,
    TimeField,
    TimeUnit,
    TraceFormat,
    format_named,
    formats_with,
)

TIMESTAMP = "timestamp"
"""What the time of arrival is called where columns are given names."""

_TIME_NAMES = (TIMESTAMP, "arrival_time", "arrived_at", "arrival", "start_time", "send_time", "time", "datetime")
_IDENTIFIER = re.compile(r"|id|uuid|guid|index|unnamed_\d+|.*_(id|ids|uuid|guid|index)")
_FIRST_EPOCH_SECOND = 10**9  # of 2001; no trace that starts at 0 is 31 years long
_SHOWN_COLUMNS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the caller wants, beyond the file."""

    format_name: str | None
    parameters: tuple[str, ...]
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which fields of a file are what."""

    format_name: str
    source: str
    licence: str
    signature: frozenset[str]
    """Columns that every file must have."""
    columns: Mapping[str, FieldPath]
    """The parameters, in the order they are delivered."""
    kinds: Mapping[str, Kind]
    time: TimeField | None
    successes: tuple[Success, ...]
    prefix: PrefixField | None
    types: Mapping[FieldPath, pa.DataType]
    """How to read each field where the syntax has no types of its own."""


def plan_for(file: TraceFile, request: Request) -> Plan:
    """Return what to read of a file. Raises InvalidInputError that lists every problem."""
    names = file.names()
    if request.format_name not in {None, *FORMAT_NAMES}:
        _refuse("format_name", f"must be one of {', '.join(FORMAT_NAMES)}, is {request.format_name!r}")
    if request.columns and request.format_name not in {None, TABLE}:
        _refuse("columns", f"cannot be given together with format {request.format_name}, which has its own")
    known = None if request.columns else _known_format(file, names, request.format_name)
    if known is None:
        return _table_plan(file, names, request)
    return _known_plan(file, names, known, request)


def same_format(file: TraceFile, plan: Plan, request: Request) -> list[Violation]:
    """Return why a further file of a trace does not fit the plan of the first one."""
    names = file.names()
    missing = [name for name in sorted(plan.signature) if name not in names]
    if missing:
        return [_missing(file.label, name, names) for name in missing]
    if plan.format_name == TABLE:
        return list(_further_columns(file, names, plan, request))
    found = _known_format(file, names, request.format_name)
    if found is None or found.name != plan.format_name:
        text = f"must be of format {plan.format_name} as the first file is, is {found.name if found else TABLE}"
        return [Violation(file.label, text)]
    return []


def _further_columns(file: TraceFile, names: Sequence[str], plan: Plan, request: Request) -> Iterator[Violation]:
    if request.columns or request.parameters or set(names) <= plan.signature:
        return
    for name, head in file.head().items():
        if name not in plan.columns and _is_parameter(name, head) and (plan.time is None or plan.time.path != (name,)):
            yield Violation(f"{file.label} column {name}", "is not in the first file; give the parameters to read")


def _known_format(file: TraceFile, names: Sequence[str], format_name: str | None) -> TraceFormat | None:
    """Return the format that was asked for, or whose columns these are; None: a table of no publisher."""
    if format_name == TABLE:
        return None
    asked = format_named(format_name) if format_name else None
    if asked is not None:
        return asked
    candidates = formats_with(names)
    if len(candidates) > 1:  # told apart by how a time is written
        time = candidates[0].times[0].path[0]
        offset = has_utc_offset(first_text(file.head()[time]))
        candidates = tuple(known for known in candidates if known.has_utc_offsets in {None, offset})
    return candidates[0] if candidates else None


def _known_plan(file: TraceFile, names: Sequence[str], known: TraceFormat, request: Request) -> Plan:
    there = {**known.columns, **known.extras}
    asked = request.parameters or tuple(
        name for name, path in known.columns.items() if name not in known.optional or path[0] in names
    )
    violations = [
        Violation(f"parameters: {name}", f"format {known.name} has {', '.join(there)}")
        for name in asked
        if name not in there
    ]
    columns = {name: there[name] for name in asked if name in there}
    successes = tuple(
        success for success in known.successes if not success.or_empty or file.omits_empty or success.path[0] in names
    )
    needed = {path[0] for path in columns.values()}
    needed |= {success.path[0] for success in successes if not (success.or_empty and file.omits_empty)}
    violations += [_missing(file.label, name, names) for name in sorted(needed - set(names))]
    violations += list(_duplicated(file.label, needed, names))
    if violations:
        raise InvalidInputError(violations)
    prefix = known.prefix if known.prefix and known.prefix.path[0] in names else None
    time = next((time for time in known.times if _has(names, time.path)), None)
    kinds = {name: KINDS.get(name, Kind.CATEGORY) for name in columns}
    types = {path: _json_type(kinds[name]) for name, path in columns.items()}
    types |= {success.path: _success_type(success) for success in successes}
    if time:
        types[time.path] = _time_type(time)
    if prefix:
        types[prefix.path] = pa.list_(pa.int64())
    return Plan(
        format_name=known.name,
        source=known.source,
        licence=known.licence,
        signature=frozenset(needed),
        columns=columns,
        kinds=kinds,
        time=time,
        successes=successes,
        prefix=prefix,
        types=types,
    )


def _has(names: Sequence[str], path: FieldPath) -> bool:
    """Whether a file has a field, as far as its names tell: one that names any field inside an object names all."""
    if len(path) > 1 and any(name.startswith(f"{path[0]}.") for name in names):
        return ".".join(path) in names
    return path[0] in names


def _json_type(kind: Kind) -> pa.DataType:
    return pa.string() if kind is Kind.CATEGORY else pa.float64()


def _time_type(time: TimeField) -> pa.DataType:
    if time.unit is TimeUnit.DATE_TIME:
        return pa.string()
    return pa.int64() if time.unit is TimeUnit.NANOSECONDS else pa.float64()


def _success_type(success: Success) -> pa.DataType:
    if not success.values:
        return pa.struct([("type", pa.string())])
    return pa.bool_() if success.values <= {"true", "false"} else pa.string()


def _table_plan(file: TraceFile, names: Sequence[str], request: Request) -> Plan:
    head = file.head()
    columns, time_name = _table_columns(head, request)
    formats = ", ".join(known.name for known in FORMATS)
    violations = [
        _missing(file.label, name, names, f"; the known formats are {formats}")
        for name in columns.values()
        if name not in names
    ]
    violations += list(_duplicated(file.label, set(columns.values()), names))
    kinds: dict[str, Kind] = {}
    for name, column in columns.items():
        kind = KINDS.get(name) or (kind_of(head[column]) if column in head else Kind.CATEGORY)
        if kind is None:
            violations.append(Violation(f"{file.label} column {column}", f"is no parameter but {head[column].type}"))
        else:
            kinds[name] = kind
    if not columns:
        text = f"has no column that could be a parameter, has {_shown(names)}; the known formats are {formats}"
        violations.append(Violation(file.label, text))
    if time_name is not None and time_name not in names:
        violations.append(_missing(file.label, time_name, names))
    if violations:
        raise InvalidInputError(violations)
    time = _table_time(time_name, head.get(time_name)) if time_name else None
    types: dict[FieldPath, pa.DataType] = {
        (column,): _table_type(file, head.get(column), kinds[name]) for name, column in columns.items()
    }
    if time:
        types[time.path] = _time_type(time)
    return Plan(
        format_name=TABLE,
        source="",
        licence="",
        signature=frozenset(columns.values()) | ({time_name} if time_name else set()),
        columns={name: (column,) for name, column in columns.items()},
        kinds=kinds,
        time=time,
        successes=(),
        prefix=None,
        types=types,
    )


def _table_columns(head: Mapping[str, pa.Array], request: Request) -> tuple[dict[str, str], str | None]:
    """Return the parameters and their columns, and the column of the arrival time."""
    if request.columns:
        columns = {name: column for name, column in request.columns.items() if name != TIMESTAMP}
        if request.parameters:
            columns = {name: columns.get(name, name) for name in request.parameters}
        return columns, request.columns.get(TIMESTAMP)
    by_word = {_word(name): name for name in reversed(tuple(head))}
    time_name = next((by_word[word] for word in _TIME_NAMES if word in by_word), None)
    if request.parameters:
        return {name: name for name in request.parameters}, None if time_name in request.parameters else time_name
    return {name: name for name in head if name != time_name and _is_parameter(name, head[name])}, time_name


def _is_parameter(name: str, head: pa.Array) -> bool:
    word = _word(name)
    return word not in _TIME_NAMES and not _IDENTIFIER.fullmatch(word) and kind_of(head) is not None


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _table_time(name: str, head: pa.Array | None) -> TimeField:
    if head is None or is_date_time(head):
        return TimeField(path=(name,), unit=TimeUnit.DATE_TIME, is_absolute=True)
    text = first_text(head)
    try:
        is_absolute = float(text or 0) >= _FIRST_EPOCH_SECOND
    except ValueError:
        return TimeField(path=(name,), unit=TimeUnit.DATE_TIME, is_absolute=True)
    return TimeField(path=(name,), unit=TimeUnit.SECONDS, is_absolute=is_absolute)


def _table_type(file: TraceFile, head: pa.Array | None, kind: Kind) -> pa.DataType:
    """Return the type of a JSON field: whole numbers may be written as 374.0, truth values and text are as they are."""
    if file.omits_empty and head is not None and (pa.types.is_boolean(head.type) or pa.types.is_string(head.type)):
        return head.type
    return _json_type(kind)


def _missing(label: str, name: str, names: Sequence[str], hint: str = "") -> Violation:
    return Violation(f"{label} column {name}", f"is missing; there are {_shown(names)}{hint}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return (", ".join(map(repr, names[:_SHOWN_COLUMNS])) or "none") + more


def _duplicated(label: str, needed: set[str], names: Sequence[str]) -> Iterator[Violation]:
    for name in sorted(needed):
        if (count := list(names).count(name)) > 1:
            yield Violation(f"{label} column {name}", f"must appear once, appears {count} times")


def _refuse(field: str, description: str) -> None:
    raise InvalidInputError([Violation(field, description)])
