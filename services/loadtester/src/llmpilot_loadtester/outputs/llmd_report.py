"""A stage as an llm-d benchmark report, schema v0.2.1.

The schema forbids names that are not its own, so what it has no place for (the verdict, where counts and stamps come
from) goes under `scenario.load.native.config`. Latencies are in seconds. Invariant: a statistic without a mean is left
out, as the schema asks for one. Source: github.com/llm-d/llm-d-benchmark, Python package llmd-benchmark-report.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import numpy.typing as npt
import yaml

from llmpilot_loadtester.domain.records import UNKNOWN, RecordBatch
from llmpilot_loadtester.domain.results import LatencySummary, StageMetrics
from llmpilot_loadtester.domain.spec import RATED
from llmpilot_loadtester.outputs.number_format import utc
from llmpilot_loadtester.outputs.run_facts import RunFacts
from llmpilot_loadtester.outputs.stage_report import StageReport

VERSION = "0.2.1"
_TOOL = "llm-pilot-loadtester"

Yaml = str | int | float | bool | None | Sequence["Yaml"] | Mapping[str, "Yaml"]


def llmd_report(facts: RunFacts, report: StageReport, records: RecordBatch) -> str:
    """Return the YAML of one stage."""
    content = _report(facts, report, records.take(report.facts.window.holds(records.send_nanos)))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _report(facts: RunFacts, report: StageReport, counted: RecordBatch) -> Yaml:
    return {
        "version": VERSION,
        "run": _run(facts, report),
        "scenario": {"load": _load(facts, report, counted)},
        "results": {
            "request_performance": {
                "aggregate": {
                    "requests": _requests(report.result.metrics, counted),
                    "latency": _latency(report.result.metrics),
                    "throughput": _throughput(report.result.metrics),
                }
            }
        },
    }


def _run(facts: RunFacts, report: StageReport) -> Yaml:
    window = report.facts.window
    start, end = (report.facts.start_unix_nanos + nanos for nanos in (window.from_nanos, window.until_nanos))
    experiment = facts.name or f"{facts.target_url} {facts.created_unix_nanos}"
    identity = f"{experiment} stage {report.facts.stage_index} attempt {report.facts.attempt}"
    return {
        "uid": str(uuid5(NAMESPACE_URL, identity)),
        "eid": str(uuid5(NAMESPACE_URL, experiment)),
        "time": {
            "start": utc(start).isoformat(),
            "end": utc(end).isoformat(),
            "duration": f"PT{timedelta(seconds=window.seconds).total_seconds():g}S",
        },
        "description": f"{facts.served_model} at {facts.target_url}: {report.facts.label}",
        "keywords": [*["simulated"] * facts.simulated, *["not valid"] * (not report.result.verdict.is_valid)],
    }


def _load(facts: RunFacts, report: StageReport, counted: RecordBatch) -> Yaml:
    load, verdict = report.facts.stage.load, report.result.verdict
    known = counted.input_tokens[counted.input_tokens != UNKNOWN]
    standardized: dict[str, Yaml] = {
        "tool": _TOOL,
        "tool_version": facts.tool_version or "unknown",
        "source": "random" if facts.requests.startswith("synthetic") else "sampled",
        "stage": report.facts.stage_index,
        "input_seq_len": {"distribution": "other", "value": float(known.mean()) if len(known) else 0},
    }
    if load.kind in RATED:
        standardized["rate_qps"] = load.rate_per_second
    if load.most_users:
        standardized["concurrency"] = load.most_users
    return {
        "metadata": {"description": f"{load.label}; {facts.requests}"},
        "standardized": standardized,
        "native": {
            "config": {
                "protocol": facts.protocol,
                "simulated": facts.simulated,
                "valid": verdict.is_valid,
                "not_valid_because": list(verdict.reasons),
                "goodput_requests_per_second": report.result.metrics.goodput_requests_per_second,
                "input_tokens_known": bool(len(known)),
                "stamp_sources": list(report.result.metrics.stamp_sources),
                "token_count_sources": list(report.result.metrics.token_count_sources),
            }
        },
    }


def _requests(metrics: StageMetrics, counted: RecordBatch) -> Yaml:
    known = counted.input_tokens[counted.is_ok & (counted.input_tokens != UNKNOWN)]
    incomplete = sum(error.count for error in metrics.errors if error.status == "cancelled")
    return {
        "total": metrics.request_count,
        "failures": metrics.error_count - incomplete,
        "incomplete": incomplete,
        **_named("input_length", _statistics(known, "count")),
        **_named("output_length", _statistics(counted.output_tokens[counted.is_ok], "count")),
    }


def _latency(metrics: StageMetrics) -> Yaml:
    return {
        **_named("time_to_first_token", _seconds(metrics.ttft, "s")),
        **_named("normalized_time_per_output_token", _seconds(metrics.normalized_latency, "s/token")),
        **_named("time_per_output_token", _seconds(metrics.tpot, "s/token")),
        **_named("inter_token_latency", _seconds(metrics.itl, "s/token")),
        **_named("request_latency", _seconds(metrics.end_to_end, "s")),
    }


def _throughput(metrics: StageMetrics) -> Yaml:
    output, inputs = metrics.output_tokens_per_second, metrics.input_tokens_per_second
    rates = {
        "input_token_rate": ("tokens/s", inputs),
        "output_token_rate": ("tokens/s", output),
        "total_token_rate": ("tokens/s", None if inputs is None else inputs + output),
        "request_rate": ("queries/s", metrics.requests_per_second),
    }
    return {name: {"units": units, "mean": rate} for name, (units, rate) in rates.items() if rate is not None}


def _named(name: str, statistics: Yaml) -> dict[str, Yaml]:
    return {} if statistics is None else {name: statistics}


def _seconds(summary: LatencySummary, units: str) -> Yaml:
    if summary.mean_ms is None:
        return None
    values = {
        "mean": summary.mean_ms,
        "stddev": summary.std_ms,
        "min": summary.min_ms,
        "p50": summary.median_ms,
        "p90": summary.p90_ms,
        "p95": summary.p95_ms,
        "p99": summary.p99_ms,
        "max": summary.max_ms,
    }
    return {"units": units, **{name: value / 1e3 for name, value in values.items() if value is not None}}


def _statistics(values: npt.NDArray[np.int64], units: str) -> Yaml:
    if not len(values):
        return None
    names = ("p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99")
    quantiles = np.quantile(values, [int(name[1:]) / 100 for name in names]).tolist()
    return {
        "units": units,
        "mean": float(values.mean()),
        "stddev": float(values.std()),
        "min": int(values.min()),
        **dict(zip(names, quantiles, strict=True)),
        "max": int(values.max()),
    }
