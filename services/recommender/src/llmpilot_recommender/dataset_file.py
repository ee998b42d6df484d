"""Reading and writing the dataset file; its format is the one `llmpilot_contracts.dataset_schema` describes.

Invariant: what `write_dataset` wrote, `read_dataset` returns exactly, and neither lets a row pass that breaks the
schema.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmpilot_contracts.dataset_schema import COLUMN_NAMES, SCHEMA_VERSION, problems, row_problems
from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_recommender.measurement import Measurement, from_cells, to_cells
from llmpilot_servicekit.file_output import write_whole

BUNDLED_DATASET = Path(__file__).parent / "data" / "characterization.csv"
"""The public characterization dataset, aggregated by `llm-pilot dataset import`."""

_COMMENT = re.compile(r"# (?P<key>[a-z][a-z0-9_-]*): (?P<value>\S(?:.*\S)?)")
_SCHEMA_KEY = "schema"
_ROWS_KEY = "rows"
"""How many rows follow, so that a file cut at the end of a line is recognized; a file made by hand may leave it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFile:
    """The content of a dataset file."""

    measurements: tuple[Measurement, ...]
    """In the file's order."""
    provenance: dict[str, str]
    """The comment lines after the schema version: source, licence, command, ..."""


def read_dataset(path: Path) -> DatasetFile:
    """Read a dataset file. Raises InvalidInputError that lists every bad line, row and column."""
    text = _read_text(path)
    lines = text.split("\n")
    comments = [line.rstrip("\r") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    violations = [Violation(path.name, problem) for problem in _version_problems(comments)]
    if not text.endswith("\n"):
        violations.append(Violation(path.name, "the last line is cut off; fetch or write the file again"))
    if violations:
        raise InvalidInputError(violations)
    header, rows = _table(path.name, "\n".join(lines[len(comments) :]))
    violations = [Violation(f"{path.name} line {number}", problem) for number, problem in _comment_problems(comments)]
    violations += _schema_violations(path.name, header, rows)
    provenance = _provenance(comments)
    stated = provenance.pop(_ROWS_KEY, str(len(rows)))
    if stated != str(len(rows)):
        problem = f"has {len(rows)} rows, its '# {_ROWS_KEY}' says {stated}; fetch or write the file again"
        violations.append(Violation(path.name, problem))
    if violations:
        raise InvalidInputError(violations)
    return DatasetFile(measurements=tuple(map(from_cells, rows)), provenance=provenance)


def write_dataset(path: Path, measurements: Iterable[Measurement], provenance: Mapping[str, str]) -> None:
    """Write a dataset file in the order given, all of it or nothing. Raises InvalidInputError like `read_dataset`."""
    rows = [to_cells(measurement) for measurement in measurements]
    facts = ((_SCHEMA_KEY, str(SCHEMA_VERSION)), *provenance.items(), (_ROWS_KEY, str(len(rows))))
    comments = [f"# {key}: {value}" for key, value in facts]
    violations = [Violation(f"{path.name} line {number}", problem) for number, problem in _comment_problems(comments)]
    violations += _schema_violations(path.name, COLUMN_NAMES, rows)
    if violations:
        raise InvalidInputError(violations)
    text = io.StringIO(newline="")
    text.writelines(f"{comment}\n" for comment in comments)
    csv.writer(text, lineterminator="\n").writerows([COLUMN_NAMES, *rows])
    write_whole(path, text.getvalue().encode())


def violations_of(measurement: Measurement) -> Iterator[Violation]:
    """Yield every way in which a measurement does not fit the dataset, its fields named after the file's columns."""
    for column, description in row_problems(to_cells(measurement)):
        yield Violation(f"measurement.{column}", description)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise NotFoundError("dataset file", str(path)) from error
    except OSError as error:
        raise InvalidInputError([Violation(str(path), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            [Violation(path.name, f"must be UTF-8 text, byte {error.start} is not; is it a compressed file?")]
        ) from error


def _table(name: str, text: str) -> tuple[Sequence[str], list[list[str]]]:
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise InvalidInputError([Violation(name, f"must be CSV: {error}")]) from error
    return (table[0], table[1:]) if table else ((), [])


def _schema_violations(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Violation]:
    for problem in problems(header, rows):
        where, _, description = problem.partition(": ")
        yield Violation(f"{name} {where}", description)


def _version_problems(comments: Sequence[str]) -> Iterator[str]:
    match = _COMMENT.fullmatch(comments[0]) if comments else None
    if match is None or match["key"] != _SCHEMA_KEY:
        yield f"the first line must be '# {_SCHEMA_KEY}: {SCHEMA_VERSION}'"
    elif match["value"] != str(SCHEMA_VERSION):
        yield (
            f"has schema version {match['value']}, this program reads version {SCHEMA_VERSION}; "
            "import the raw data again or use the program's version that wrote it"
        )


def _comment_problems(comments: Sequence[str]) -> Iterator[tuple[int, str]]:
    seen: set[str] = set()
    for number, comment in enumerate(comments, start=1):
        match = _COMMENT.fullmatch(comment)
        if match is None or not comment.isprintable():
            yield number, "a comment must be '# key: value' on one line, the key in lower case"
        elif match["key"] in seen:
            yield number, f"repeats the comment {match['key']!r}"
        else:
            seen.add(match["key"])


def _provenance(comments: Sequence[str]) -> dict[str, str]:
    matches = [match for comment in comments[1:] if (match := _COMMENT.fullmatch(comment))]
    return {match["key"]: match["value"] for match in matches}
