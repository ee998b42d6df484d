"""The published tables of IBM/LLM-performance-prediction: medians, and predictions of all methods."""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_recommender.decision import CurvePoint
from llmpilot_recommender.scores import Curves

GPU_OF_TYPE = {"A10": "A10-24GB", "A100": "A100-40GB", "H100": "H100-80GB", "T4": "T4-16GB", "V100": "V100-16GB"}
"""The catalogue's name of each published GPU type; their A100 has 40 GB, not the 80 GB of the paper's Table I."""
PREFIX = "expected_predictions_"
REFERENCE_METHODS = frozenset({"PARIS", "Selecta", "Morphling"})
"""These measure the unseen LLM on the reference profiles, Sec. V-C, so there their word is the measurement."""
REFERENCE_PROFILES = frozenset({"1xT4-16GB", "4xH100-80GB"})
_GPU = re.compile(rf"(?P<count>[1-9][0-9]?) x (?P<type>{'|'.join(GPU_OF_TYPE)})")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """Latencies of one LLM on one GPU profile under one load."""

    llm: str
    gpu_profile: str
    users_count: int
    nttft_ms: float
    itl_ms: float


def gpu_profile_name(gpu_count: str | int, gpu_type: str) -> str:
    """Return the catalogue's name of a GPU profile, e.g. 2xA100-40GB. Raises KeyError for an unknown type."""
    return f"{int(gpu_count)}x{GPU_OF_TYPE[gpu_type]}"


def read_rows(path: Path, *, nttft_column: str, itl_column: str, smallest_ms: float) -> tuple[PublishedRow, ...]:
    """Return the latencies of two columns of a published table.

    Raises InvalidInputError that names every bad row and column; a latency below `smallest_ms` is bad.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True, restval="")
            rows = list(reader)
    except FileNotFoundError as error:
        raise NotFoundError("published table", str(path)) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError([Violation(str(path), f"must be a CSV file: {error}")]) from error
    columns = ("model", "gpu", "num_users", nttft_column, itl_column)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    violations = [Violation(f"{path.name} column {column}", "missing") for column in missing] or [
        Violation(f"{path.name} row {number}, column {column}", problem)
        for number, row in enumerate(rows, start=1)
        for column, problem in _problems(row, (nttft_column, itl_column), smallest_ms)
    ]
    if violations:
        raise InvalidInputError(violations)
    return tuple(_row(row, nttft_column, itl_column) for row in rows)


def _problems(row: Mapping[str, str], latencies: tuple[str, ...], smallest_ms: float) -> Iterator[tuple[str, str]]:
    if not row["model"]:
        yield "model", "must not be empty"
    if not _GPU.fullmatch(row["gpu"]):
        yield "gpu", f"must be like '4 x H100' with one of {', '.join(GPU_OF_TYPE)}, is {row['gpu']!r}"
    if not re.fullmatch(r"[1-9][0-9]{0,5}", row["num_users"]):
        yield "num_users", f"must be a whole number > 0, is {row['num_users']!r}"
    for column in latencies:
        try:
            valid = smallest_ms <= float(row[column]) < math.inf
        except ValueError:
            valid = False
        if not valid:
            yield column, f"must be a number >= {smallest_ms:g}, is {row[column]!r}"


def _row(row: Mapping[str, str], nttft_column: str, itl_column: str) -> PublishedRow:
    count, _, gpu_type = row["gpu"].split()
    return PublishedRow(
        llm=row["model"],
        gpu_profile=gpu_profile_name(count, gpu_type),
        users_count=int(row["num_users"]),
        nttft_ms=float(row[nttft_column]),
        itl_ms=float(row[itl_column]),
    )


def read_published(directory: Path) -> dict[str, Curves]:
    """Return the predicted latencies of every method whose file lies in the directory."""
    files = sorted(directory.glob(f"{PREFIX}*.csv"))
    if not files:
        raise InvalidInputError(
            [Violation(str(directory), f"holds no {PREFIX}*.csv; name the published `expected` folder")]
        )
    return {file.stem.removeprefix(PREFIX): _predictions(file) for file in files}


def with_references(method: str, predicted: Curves, truth: Curves) -> Curves:
    """Return the latencies a method decides on: measured ones where it measures, else its predictions."""
    if method not in REFERENCE_METHODS:
        return predicted
    return {
        llm: {
            profile: truth.get(llm, {}).get(profile, curve) if profile in REFERENCE_PROFILES else curve
            for profile, curve in curves.items()
        }
        for llm, curves in predicted.items()
    }


def _predictions(file: Path) -> Curves:
    rows = read_rows(
        file,
        nttft_column="prediction_median_nttft",
        itl_column="prediction_median_itl",
        smallest_ms=-1e9,  # the published regressors undershoot zero
    )
    curves: dict[str, dict[str, list[CurvePoint]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row.users_count):
        curves[row.llm][row.gpu_profile].append(
            CurvePoint(users_count=row.users_count, nttft_ms=row.nttft_ms, itl_ms=row.itl_ms, error_rate=None)
        )
    return {llm: dict(by_profile) for llm, by_profile in curves.items()}
