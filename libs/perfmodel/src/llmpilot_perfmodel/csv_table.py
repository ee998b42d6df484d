"""Reads small hand-written CSV tables and collects everything that is wrong with them.

Invariant: a table that `raise_violations` lets pass was read whole. An empty cell means "not stated". Lines that
start with # are comments.
"""

import csv
import io
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, Violation

NUMBER_PATTERN = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
COUNT_PATTERN = re.compile(r"[0-9]{1,12}")


def bundled_table(name: str) -> str:
    """Return the text of a table that travels with the package."""
    return (files("llmpilot_perfmodel") / "data" / name).read_text("utf-8")


def read_table(path: Path) -> str:
    """Return the text of a user's table; raise `InvalidInputError` where it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise InvalidInputError([Violation(str(path), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError([Violation(str(path), "must be text in UTF-8")]) from error


class CsvTable:
    """A CSV table with a header; `label` names it in violations."""

    def __init__(self, text: str, *, label: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        self._label = label
        self._required = required
        self._violations: list[Violation] = []
        lines = self._lines(text)
        self._header = lines[0][1] if lines else []
        self._lines_after_header = lines[1:]
        self._check_header(optional)

    def rows(self) -> Iterator["Row"]:
        """Yield the rows that have as many cells as the header."""
        for line, cells in self._lines_after_header:
            if len(cells) == len(self._header):
                yield Row(self, line, dict(zip(self._header, cells, strict=True)))
            else:
                self.refuse(line, "", f"has {len(cells)} cells, must have {len(self._header)}")

    def refuse(self, line: int, column: str, description: str) -> None:
        """Record that a cell, or without a column a whole line, is wrong."""
        place = f"line {line}, {column}" if column else f"line {line}"
        self._violations.append(Violation(f"{self._label} {place}", description))

    def raise_violations(self) -> None:
        """Raise `InvalidInputError` with everything recorded so far, if anything was."""
        if self._violations:
            raise InvalidInputError(self._violations)

    def is_required(self, column: str) -> bool:
        """Return whether every row must state the column."""
        return column in self._required

    def _lines(self, text: str) -> list[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            raise InvalidInputError(
                [Violation(f"{self._label} line {reader.line_num}", f"is not CSV: {error}")]
            ) from error
        return [(line, cells) for line, cells in lines if any(cells) and not cells[0].startswith("#")]

    def _check_header(self, optional: tuple[str, ...]) -> None:
        missing = [column for column in self._required if column not in self._header]
        unknown = [column for column in self._header if column not in self._required + optional]
        repeated = {column for column in self._header if self._header.count(column) > 1}
        for columns, description in (
            (missing, "column is missing"),
            (unknown, f"column is unknown; known are {', '.join(self._required + optional)}"),
            (sorted(repeated), "column appears more than once"),
        ):
            self._violations.extend(Violation(f"{self._label} {column[:80]!r}", description) for column in columns)
        self.raise_violations()


class Row:
    """A row; a wrong cell becomes a violation of its table and reads as None."""

    def __init__(self, table: CsvTable, line: int, cells: dict[str, str]) -> None:
        self._table = table
        self._cells = cells
        self.line = line

    def text(self, column: str) -> str:
        """Return the cell as it stands, "" if the table has no such column."""
        cell = self._cells.get(column, "")
        if not cell and self._table.is_required(column):
            self._table.refuse(self.line, column, "must not be empty")
        return cell

    def number(self, column: str) -> float | None:
        """Return a number > 0."""
        cell = self.text(column)
        if not cell:
            return None
        if not NUMBER_PATTERN.fullmatch(cell) or float(cell) == 0:
            self._table.refuse(self.line, column, f"must be a plain number > 0, is {cell[:40]!r}")
            return None
        return float(cell)

    def count(self, column: str) -> int | None:
        """Return a whole number >= 0."""
        cell = self.text(column)
        if not cell:
            return None
        if not COUNT_PATTERN.fullmatch(cell):
            self._table.refuse(self.line, column, f"must be a whole number >= 0, is {cell[:40]!r}")
            return None
        return int(cell)

    def flag(self, column: str) -> bool | None:
        """Return a boolean."""
        cell = self.text(column).lower()
        if cell not in ("", "true", "false"):
            self._table.refuse(self.line, column, f"must be true or false, is {cell[:40]!r}")
            return None
        return cell == "true" if cell else None
