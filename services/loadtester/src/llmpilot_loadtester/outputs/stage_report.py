"""A stage ready to be reported: its metrics, computed anew from its records, and what the plots show.

Invariant: nothing here depends on anything but the records file, the limits asked for and the seed in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import ServiceLevel
from llmpilot_loadtester.outputs.records_file import RecordsFile
from llmpilot_loadtester.outputs.run_facts import StageFacts, newest_attempts
from llmpilot_loadtester.outputs.stage_series import StageSeries, stage_series


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What is told of a stage."""

    facts: StageFacts
    result: StageResult
    series: StageSeries


def stage_report(facts: StageFacts, records: RecordBatch, service_level: ServiceLevel, *, seed: int) -> StageReport:
    """Return the report of a stage from its records."""
    result = StageResult(
        stage_index=facts.stage_index,
        attempt=facts.attempt,
        stage=facts.stage,
        start_unix_nanos=facts.start_unix_nanos,
        metrics=stage_metrics(records, facts.window, service_level, seed=seed),
        verdict=facts.verdict,
        service_level=service_level,
    )
    return StageReport(facts=facts, result=result, series=stage_series(records, facts.window))


def stage_reports(
    file: RecordsFile, service_level: ServiceLevel | None = None
) -> Iterator[tuple[StageReport, RecordBatch]]:
    """Yield the last attempt at each stage with its records, one stage in memory at a time; None: the file's limits."""
    limits = file.facts.service_level if service_level is None else service_level
    for facts in newest_attempts(file.stages):
        records = file.records(facts)
        yield stage_report(facts, records, limits, seed=file.facts.seed), records
