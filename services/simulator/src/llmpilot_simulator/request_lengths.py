"""The lengths of the requests that simulated users send.

Invariant: lengths are positive; a table of them keeps how often each pair occurs.
Source of the bundled table: the request list of the public characterization, Lazuka et al., 2024.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.csv_table import CsvTable, bundled_table, read_table

BUNDLED_TABLE = "characterization_requests.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLengths:
    """Lengths of requests, one entry per request, in tokens."""

    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]


def bundled_lengths() -> RequestLengths:
    """Return the requests of the published load tests."""
    return _parse(bundled_table(BUNDLED_TABLE), label=BUNDLED_TABLE)


def read_lengths(path: Path) -> RequestLengths:
    """Read a CSV of input_tokens, output_tokens and, if it likes, count."""
    return _parse(read_table(path), label=path.name)


def fixed_lengths(input_tokens: int, output_tokens: int) -> RequestLengths:
    """Return requests of one length."""
    return RequestLengths(input_tokens=np.array([input_tokens]), output_tokens=np.array([output_tokens]))


def _parse(text: str, *, label: str) -> RequestLengths:
    table = CsvTable(text, label=label, required=("input_tokens", "output_tokens"), optional=("count",))
    rows = [
        (row.count("input_tokens") or 0, row.count("output_tokens") or 0, row.count("count"), row.line)
        for row in table.rows()
    ]
    for input_tokens, output_tokens, count, line in rows:
        for column, value in (("input_tokens", input_tokens), ("output_tokens", output_tokens), ("count", count)):
            if value == 0:
                table.refuse(line, column, "must be > 0")
    table.raise_violations()
    if not rows:
        raise InvalidInputError([Violation(label, "has no rows")])
    counts = [1 if count is None else count for _, _, count, _ in rows]
    return RequestLengths(
        input_tokens=np.repeat(np.array([row[0] for row in rows]), counts),
        output_tokens=np.repeat(np.array([row[1] for row in rows]), counts),
    )
