"""Step constants that were fitted on measured runs, by LLM and GPU profile (data/step_constants.csv).

Invariant: what `write_fitted` wrote, `read_fitted` returns, but for digits beyond the fifth.
Source: fitted by `llm-pilot dataset calibrate` on the raw records of Lazuka et al., 2024.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llmpilot_contracts.errors import NotFoundError
from llmpilot_perfmodel.csv_table import CsvTable, Row, bundled_table
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_perfmodel.steps.calibration import CONSTANT_NAMES
from llmpilot_perfmodel.steps.step_time import StepConstants

_TABLE = "step_constants.csv"
_ERRORS = tuple(f"{name}_standard_error" for name in CONSTANT_NAMES)
_REQUIRED = (
    "llm",
    "gpu_profile",
    "is_padded",
    "users",
    *CONSTANT_NAMES,
    *_ERRORS,
    "decode_error_percent",
    "largest_batch_tokens",
)
_OPTIONAL = ("prefill_error_percent",)
_NOT_NEGATIVE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20})?")
_DIGITS = 5

_MEASURED_NAMES: Mapping[str, str] = {
    "meta-llama/llama-2-7b-hf": "llama-7b",
    "meta-llama/llama-2-7b": "llama-7b",
    "llama-2-7b": "llama-7b",
    "meta-llama/llama-2-13b-hf": "llama-13b",
    "meta-llama/llama-2-13b": "llama-13b",
    "llama-2-13b": "llama-13b",
    "gpt-neox-20b": "EleutherAI/gpt-neox-20b",
    "starcoder": "bigcode/starcoder",
    "flan-t5-xl": "google/flan-t5-xl",
    "flan-t5-xxl": "google/flan-t5-xxl",
    "flan-ul2": "google/flan-ul2",
    "mt0-xxl": "bigscience/mt0-xxl",
    "mpt-7b-instruct2": "ibm/mpt-7b-instruct2",
    "codegen2-16b": "Salesforce/codegen2-16B",
}
"""Other names of the measured LLMs, lower case; the llama models are Llama-2 (Table III of the paper)."""
_MEASURED_SHAPES: Mapping[tuple[str, int], tuple[str, float]] = {
    ("llama", 32): ("llama-7b", 6.74e9),
    ("llama", 40): ("llama-13b", 13.02e9),
    ("gpt_neox", 44): ("EleutherAI/gpt-neox-20b", 20.55e9),
    ("gpt_bigcode", 40): ("bigcode/starcoder", 15.5e9),
}
"""Measured LLM and its parameter count by model type and layers: one of the same shape takes the same time."""
_SAME_SIZE = 0.05
"""Relative difference in parameters below which shapes count as the same; embeddings are published in and out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedConstants:
    """Step constants of one LLM on one GPU profile, and how well they are known."""

    llm: str
    gpu_profile: str
    constants: StepConstants
    standard_errors: StepConstants
    decode_error: float
    """Mean of |fitted - measured| / measured over the decodes."""
    prefill_error: float | None
    """The same over prefills; None: not known."""
    largest_batch_tokens: int
    """The most tokens seen in a batch, padding included where the server pads."""
    is_padded: bool
    """Whether the server padded its batches, so that the constants count padded tokens."""
    users: tuple[int, ...]
    """Levels of concurrent users that the constants were fitted on."""
    origin: Literal["calibrated"] = "calibrated"
    source: str = "IBM/LLM-performance-prediction (Lazuka et al., 2024), CDLA-Permissive-2.0"


def measured_name(llm: str) -> str:
    """Return the dataset's name of an LLM that has another one elsewhere, else the name as given."""
    return _MEASURED_NAMES.get(llm.lower(), llm)


def same_shape(spec: LlmSpec) -> str | None:
    """Return the measured LLM that has the shape of this one; None: there is none."""
    name, parameter_count = _MEASURED_SHAPES.get((spec.model_type, spec.layer_count), (None, 1.0))
    return name if abs(spec.parameter_count / parameter_count - 1) <= _SAME_SIZE else None


def fitted_constants(llm: str, gpu_profile: str, spec: LlmSpec | None = None) -> FittedConstants:
    """Return what was fitted for an LLM, by its name or else by the shape in its spec, on a GPU profile.

    Raises NotFoundError where nobody has measured it.
    """
    table = bundled_constants()
    names = [measured_name(llm), *filter(None, [same_shape(spec) if spec else None])]
    for name in names:
        if found := table.get((name, gpu_profile)):
            return found
    profiles = sorted({profile for name, profile in table if name in names})
    hint = (
        f"measured on {', '.join(profiles)}" if profiles else f"measured are {', '.join(sorted({n for n, _ in table}))}"
    )
    raise NotFoundError("step constants", f"{llm} on {gpu_profile}", hint=f"{hint}; or take the roofline's")


@cache
def bundled_constants() -> Mapping[tuple[str, str], FittedConstants]:
    """Return the table that travels with the package, by LLM and GPU profile."""
    return {(row.llm, row.gpu_profile): row for row in read_fitted(bundled_table(_TABLE), label=_TABLE)}


def read_fitted(text: str, *, label: str) -> tuple[FittedConstants, ...]:
    """Read a table of fitted constants. Raises InvalidInputError that lists every bad cell."""
    table = CsvTable(text, label=label, required=_REQUIRED, optional=_OPTIONAL)
    rows = [_read_row(table, row) for row in table.rows()]
    table.raise_violations()
    return tuple(rows)


def write_fitted(rows: Iterable[FittedConstants], comments: Mapping[str, str]) -> str:
    """Return the text of a table, under comment lines such as its source, licence and command."""
    out = io.StringIO(newline="")
    out.writelines(f"# {key}: {value}\n" for key, value in comments.items())
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_REQUIRED, *_OPTIONAL])
    for row in rows:
        writer.writerow(
            [
                row.llm,
                row.gpu_profile,
                str(row.is_padded).lower(),
                " ".join(map(str, row.users)),
                *(_plain(getattr(row.constants, name)) for name in CONSTANT_NAMES),
                *(_plain(getattr(row.standard_errors, name)) for name in CONSTANT_NAMES),
                _plain(100 * row.decode_error),
                row.largest_batch_tokens,
                "" if row.prefill_error is None else _plain(100 * row.prefill_error),
            ]
        )
    return out.getvalue()


def _plain(value: float) -> str:
    """Return a number without an exponent."""
    return f"{float(f'{value:.{_DIGITS}g}'):.12f}".rstrip("0").rstrip(".")


def _read_row(table: CsvTable, row: Row) -> FittedConstants:
    users = row.text("users")
    if not re.fullmatch(r"[1-9][0-9]{0,5}( [1-9][0-9]{0,5})*", users):
        table.refuse(row.line, "users", f"must be whole numbers with spaces between, is {users[:40]!r}")
        users = ""
    prefill_error = row.text("prefill_error_percent")
    return FittedConstants(
        llm=row.text("llm"),
        gpu_profile=row.text("gpu_profile"),
        constants=StepConstants(**{name: _number(table, row, name) for name in CONSTANT_NAMES}),
        standard_errors=StepConstants(
            **{name: _number(table, row, error) for name, error in zip(CONSTANT_NAMES, _ERRORS, strict=True)}
        ),
        decode_error=_number(table, row, "decode_error_percent") / 100,
        prefill_error=_number(table, row, "prefill_error_percent") / 100 if prefill_error else None,
        largest_batch_tokens=row.count("largest_batch_tokens") or 0,
        is_padded=bool(row.flag("is_padded")),
        users=tuple(map(int, users.split())),
    )


def _number(table: CsvTable, row: Row, column: str) -> float:
    cell = row.text(column)
    if not _NOT_NEGATIVE.fullmatch(cell):
        table.refuse(row.line, column, f"must be a plain number >= 0, is {cell[:40]!r}")
        return 0.0
    return float(cell)
