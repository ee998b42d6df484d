"""The files made of a records file: one HTML page, CSV, and for each stage what vLLM and llm-d would write.

Invariant: every file is written whole or not at all, and follows from the records file and the limits alone.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import ServiceLevel
from llmpilot_loadtester.outputs.csv_table import csv_table
from llmpilot_loadtester.outputs.html_report import html_report
from llmpilot_loadtester.outputs.llmd_report import llmd_report
from llmpilot_loadtester.outputs.records_file import RecordsFile
from llmpilot_loadtester.outputs.run_facts import RunFacts, with_service_level
from llmpilot_loadtester.outputs.stage_report import StageReport, stage_reports
from llmpilot_loadtester.outputs.vllm_json import vllm_result
from llmpilot_servicekit.file_output import make_folder, write_whole

FORMATS = ("html", "json", "csv", "llm-d")
"""What can be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReports:
    """What was written, and the results in it."""

    paths: tuple[Path, ...]
    results: tuple[StageResult, ...]


def write_reports(
    file: RecordsFile,
    folder: Path,
    formats: Collection[str] = FORMATS,
    service_level: ServiceLevel | None = None,
) -> list[Path]:
    """Write reports into a folder, which is made if there is none; raises PreconditionError.

    `service_level` takes the place of the limits in the records file.
    """
    return list(reported(file, folder, formats, service_level).paths)


def reported(
    file: RecordsFile, folder: Path, formats: Collection[str], service_level: ServiceLevel | None
) -> WrittenReports:
    """Write reports as `write_reports` does, and give the results, too."""
    make_folder(folder)
    facts = with_service_level(file.facts, service_level)
    paths: list[Path] = []
    reports: list[StageReport] = []
    for position, (report, records) in enumerate(stage_reports(file, service_level)):
        reports.append(report)
        for suffix, text in _stage_texts(facts, report, records, formats):
            paths.append(_written(folder / f"stage-{position:02d}{suffix}", text))
    if "csv" in formats:
        paths.append(_written(folder / "stages.csv", csv_table(facts, reports)))
    if "html" in formats:
        paths.append(_written(folder / "report.html", html_report(facts, reports)))
    return WrittenReports(paths=tuple(paths), results=tuple(report.result for report in reports))


def _stage_texts(
    facts: RunFacts, report: StageReport, records: RecordBatch, formats: Collection[str]
) -> list[tuple[str, str]]:
    texts = []
    if "json" in formats:
        texts.append((".vllm.json", json.dumps(vllm_result(facts, report, records), allow_nan=False)))
    if "llm-d" in formats:
        texts.append((".llm-d.yaml", llmd_report(facts, report, records)))
    return texts


def _written(path: Path, text: str) -> Path:
    write_whole(path, text.encode())
    return path
