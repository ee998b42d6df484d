"""The metrics of a load test as CSV: a row a stage, a column a number, its unit in the name.

Invariant: an empty cell is what nobody reported.
"""

import csv
from collections.abc import Sequence
from dataclasses import fields
from io import StringIO

from llmpilot_loadtester.domain.results import Interval, LatencySummary, StageMetrics
from llmpilot_loadtester.outputs.run_facts import RunFacts
from llmpilot_loadtester.outputs.stage_report import StageReport

Cell = str | int | float | bool | None


def csv_table(facts: RunFacts, reports: Sequence[StageReport]) -> str:
    """Return the table as text."""
    rows = [_row(facts, report) for report in reports]
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["stage_index"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(facts: RunFacts, report: StageReport) -> dict[str, Cell]:
    result = report.result
    load = result.stage.load
    return {
        "stage_index": result.stage_index,
        "attempt": result.attempt,
        "load": load.label,
        "users_count": load.most_users,
        "rate_per_second": load.rate_per_second or None,
        "llm": report.facts.llm,
        "gpu_profile": report.facts.gpu_profile,
        "served_model": facts.served_model,
        "simulated": _truth(facts.simulated),
        "start_unix_nanos": result.start_unix_nanos,
        "valid": _truth(result.verdict.is_valid),
        "not_valid_because": "; ".join(result.verdict.reasons),
        **_cells(result.metrics),
    }


def _truth(value: bool | None) -> str | None:
    return None if value is None else str(value).lower()


def _cells(metrics: StageMetrics) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for field in fields(metrics):
        value = getattr(metrics, field.name)
        if isinstance(value, LatencySummary):
            cells |= _latency_cells(field.name, value)
        elif field.name == "errors":
            cells |= {"error_count": metrics.error_count, "error_rate": metrics.error_rate}
            cells["errors"] = "; ".join(f"{error.status}: {error.count}" for error in metrics.errors)
        elif isinstance(value, tuple):
            cells[field.name] = "; ".join(value)
        else:
            cells[field.name] = _truth(value) if field.name == "steady" else value
    return cells


def _latency_cells(name: str, summary: LatencySummary) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for field in fields(summary):
        value = getattr(summary, field.name)
        if field.name.endswith("_interval"):
            statistic = field.name.removesuffix("_interval")
            interval = value if isinstance(value, Interval) else None
            cells[f"{name}_{statistic}_low_ms"] = interval.low if interval else None
            cells[f"{name}_{statistic}_high_ms"] = interval.high if interval else None
        else:
            cells[f"{name}_{field.name}"] = value
    return cells
