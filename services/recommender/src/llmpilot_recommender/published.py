"""The published predictions of the paper's method and its rivals, as files of IBM/LLM-performance-prediction."""

import csv
from collections import defaultdict
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.decision import CurvePoint
from llmpilot_recommender.raw_records import gpu_profile_name
from llmpilot_recommender.scores import Curves

PREFIX = "expected_predictions_"
REFERENCE_METHODS = frozenset({"PARIS", "Selecta", "Morphling"})
"""These measure the unseen LLM on the reference profiles, Sec. V-C, so there their word is the measurement."""
REFERENCE_PROFILES = frozenset({"1xT4-16GB", "4xH100-80GB"})
COLUMNS = ("model", "gpu", "num_users", "prediction_median_nttft", "prediction_median_itl")


def read_published(directory: Path) -> dict[str, Curves]:
    """Return the predicted latencies of every method whose file lies in the directory."""
    files = sorted(directory.glob(f"{PREFIX}*.csv"))
    if not files:
        raise InvalidInputError(
            [Violation(str(directory), f"holds no {PREFIX}*.csv; name the published `expected` folder")]
        )
    return {file.stem.removeprefix(PREFIX): _read(file) for file in files}


def with_references(method: str, predicted: Curves, truth: Curves) -> Curves:
    """Return the latencies a method decides on: measured ones where it measures, else its predictions."""
    if method not in REFERENCE_METHODS:
        return predicted
    return {
        llm: {
            profile: truth[llm][profile] if profile in REFERENCE_PROFILES else curve
            for profile, curve in curves.items()
        }
        for llm, curves in predicted.items()
    }


def _read(file: Path) -> Curves:
    curves: dict[str, dict[str, list[CurvePoint]]] = defaultdict(lambda: defaultdict(list))
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidInputError(Violation(f"{file.name} column {name}", "missing") for name in missing)
        try:
            for row in reader:
                curves[row["model"]][gpu_profile_name(*row["gpu"].split(" x "))].append(
                    CurvePoint(
                        users_count=int(row["num_users"]),
                        nttft_ms=float(row["prediction_median_nttft"]),
                        itl_ms=float(row["prediction_median_itl"]),
                        error_rate=None,
                    )
                )
        except (TypeError, ValueError) as error:
            raise InvalidInputError([Violation(f"{file.name} line {reader.line_num}", str(error))]) from error
    return {
        llm: {profile: sorted(points, key=lambda point: point.users_count) for profile, points in by_profile.items()}
        for llm, by_profile in curves.items()
    }
