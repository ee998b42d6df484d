r"""The model file, suffix `.workload`: what a model counts, compact, in a form that any damage is noticed in.

    llm-pilot workload 1 SHA256\n       the format's version, and the digest of all that follows
    {"parameters": [...], ...}\n        the header, JSON on one line: `model_header.Header`
    SECTIONS                            columns one after another, as the header's `sections` says: `file_sections.py`

Sections are `keys` and `counts` of the cells, `NAME values` and `NAME counts` of each parameter's sketch and, where
requests are kept, `replay NAME` (of text: positions in `replay NAME texts`), `replay arrivals`, `replay prefix ids`
and `replay prefix starts`.

Invariant: what `model_to_bytes` made, `model_from_bytes` returns exactly; other bytes are refused.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_servicekit.file_output import write_whole
from llmpilot_workload_generator.files.file_sections import Values, pack, section_problems, unpack
from llmpilot_workload_generator.files.model_checks import LARGEST_WHOLE, model_problems
from llmpilot_workload_generator.files.model_header import (
    Header,
    ParameterForm,
    ReplayForm,
    bins_problems,
    form_violations,
    header_of,
)
from llmpilot_workload_generator.model import Column, Floats, Integers, Parameter, Replay, Sketch, WorkloadModel

SUFFIX = ".workload"
VERSION = 1
_MAGIC = b"llm-pilot workload "
_FIRST_LINE = re.compile(rb"llm-pilot workload (?P<version>[1-9][0-9]{0,8}) (?P<digest>[0-9a-f]{64})\n")


def read_model(path: Path) -> WorkloadModel:
    """Read a model file. Raises InvalidInputError where it is none or is damaged, NotFoundError where there is none."""
    return model_from_bytes(read_file(path, "workload model"), label=path.name)


def write_model(path: Path, model: WorkloadModel) -> None:
    """Write a model file, all of it or nothing."""
    write_whole(path, model_to_bytes(model))


def read_file(path: Path, kind: str) -> bytes:
    """Return a file's content; `kind` is what errors call a file that is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(kind, str(path)) from error
    except OSError as error:
        raise InvalidInputError([Violation(str(path), f"cannot be read: {error.strerror}")]) from error


def is_model(content: bytes) -> bool:
    """Whether this begins as a model file of any version does."""
    return content.startswith(_MAGIC)


def model_to_bytes(model: WorkloadModel) -> bytes:
    """Return the content of the model's file. Raises InvalidInputError for what `model_from_bytes` would refuse."""
    if problems := list(model_problems(model)):
        raise InvalidInputError(Violation("model", problem) for problem in problems)
    forms, stored = pack(_columns(model))
    body = header_of(model, forms).model_dump_json().encode() + b"\n" + stored
    return b"%s%d %s\n%s" % (_MAGIC, VERSION, hashlib.sha256(body).hexdigest().encode(), body)


def model_from_bytes(content: bytes, *, label: str) -> WorkloadModel:
    """Return the model in a file's content; `label` is what errors call the file.

    Raises InvalidInputError where it is not a model file of this version, or is damaged.
    """
    header_line, _, stored = _checked_body(content, label).partition(b"\n")
    try:
        header = Header.model_validate_json(header_line)
    except ValidationError as error:
        raise InvalidInputError(form_violations(error, label)) from error
    problems = [
        *bins_problems([form.bins for form in header.parameters]),
        *section_problems(header.sections, len(stored)),
    ]
    if not problems:
        try:
            model = _model(header, _Columns(unpack(header.sections, stored)))
        except ValueError as error:
            problems = [str(error)]
        else:
            problems = list(model_problems(model))
            if not problems:
                return model
    raise InvalidInputError(Violation(label, problem) for problem in problems)


def _checked_body(content: bytes, label: str) -> bytes:
    """Return what follows the first line, which says that it is of this version and whole."""
    match = _FIRST_LINE.match(content)
    if match is None and not is_model(content):
        raise InvalidInputError([Violation(label, "must be a workload model file; `workload fit` writes one")])
    if match is not None and int(match["version"]) != VERSION:
        problem = f"has version {int(match['version'])} of the format, this program reads version {VERSION}"
        raise InvalidInputError([Violation(label, f"{problem}; fit the model again, or use the program that wrote it")])
    body = content[match.end() :] if match else b""
    if match is None or hashlib.sha256(body).hexdigest().encode() != match["digest"]:
        raise InvalidInputError([Violation(label, "is cut off or damaged; fetch or write it again")])
    return body


def _columns(model: WorkloadModel) -> Iterator[tuple[str, str, Values]]:
    """Yield the name, coding and values of every section."""
    yield "keys", "delta-varint", model.keys
    yield "counts", "varint", model.counts
    for parameter in model.parameters:
        coding, values = _compact(parameter.sketch.values)
        yield f"{parameter.name} values", coding, values
        yield f"{parameter.name} counts", "varint", parameter.sketch.counts
    if model.replay is None:
        return
    for name, column in model.replay.columns.items():
        if column.dtype.kind == "U":
            texts, positions = np.unique(column, return_inverse=True)
            yield f"replay {name} texts", "json", texts.tolist()
            yield f"replay {name}", "varint", positions.astype(np.int64)
        else:
            yield f"replay {name}", "zigzag" if column.dtype.kind == "i" else "float64", column
    yield "replay arrivals", "delta-zigzag", model.replay.arrival_nanos
    yield "replay prefix ids", "delta-zigzag", model.replay.prefix_ids
    yield "replay prefix starts", "delta-varint", model.replay.prefix_starts


def _compact(values: Floats) -> tuple[str, npt.NDArray[Any]]:
    """Return rising values and their coding: as whole numbers where all are, of which -0.0 is none."""
    whole = (np.abs(values) <= LARGEST_WHOLE) & (values == np.trunc(values)) & ((values != 0) | ~np.signbit(values))
    return ("delta-zigzag", values.astype(np.int64)) if whole.all() else ("float64", values)


class _Columns:
    """The sections of a file, each of which is taken once."""

    def __init__(self, columns: Mapping[str, Values]) -> None:
        self._left = dict(columns)

    @property
    def names(self) -> list[str]:
        """The names of the sections not taken yet."""
        return list(self._left)

    def take(self, name: str) -> Values:
        """Return a section."""
        if name not in self._left:
            raise ValueError(f"must have the section {name!r}")
        return self._left.pop(name)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """Return a section of numbers."""
        values = self.take(name)
        if isinstance(values, list):
            raise ValueError(f"the section {name!r} must hold numbers, holds texts")
        return values

    def integers(self, name: str) -> Integers:
        """Return a section of whole numbers."""
        values = self.numbers(name)
        if values.dtype.kind != "i":
            raise ValueError(f"the section {name!r} must hold whole numbers")
        return values


def _model(header: Header, columns: _Columns) -> WorkloadModel:
    model = WorkloadModel(
        keys=columns.integers("keys").view(np.uint64),
        counts=columns.integers("counts"),
        parameters=tuple(_parameter(form, columns) for form in header.parameters),
        provenance=header.provenance.to_provenance(),
        arrivals=header.arrivals.to_arrivals(),
        replay=_replay(header, header.replay, columns) if header.replay else None,
    )
    if columns.names:
        raise ValueError(f"must not have the sections {', '.join(map(repr, columns.names))}")
    return model


def _parameter(form: ParameterForm, columns: _Columns) -> Parameter:
    name = form.bins.name
    return Parameter(
        bins=form.bins.to_bins(),
        lows=np.array(form.lows, np.float64),
        highs=np.array(form.highs, np.float64),
        sketch=Sketch(
            values=columns.numbers(f"{name} values").astype(np.float64),
            counts=columns.integers(f"{name} counts"),
            exact=form.sketch.exact,
            low=form.sketch.low,
            high=form.sketch.high,
        ),
    )


def _replay(header: Header, form: ReplayForm, columns: _Columns) -> Replay:
    return Replay(
        columns={one.bins.name: _replay_column(one.bins.name, columns) for one in header.parameters},
        arrival_nanos=columns.integers("replay arrivals"),
        prefix_ids=columns.integers("replay prefix ids"),
        prefix_starts=columns.integers("replay prefix starts"),
        prefix_block_tokens=form.prefix_block_tokens,
    )


def _replay_column(name: str, columns: _Columns) -> Column:
    if f"replay {name} texts" not in columns.names:
        return columns.numbers(f"replay {name}")
    texts, positions = columns.take(f"replay {name} texts"), columns.integers(f"replay {name}")
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(texts):
        raise ValueError(f"the section 'replay {name}' must hold positions in its texts")
    return np.array(texts, np.str_)[positions]
