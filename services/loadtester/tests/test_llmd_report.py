from importlib.util import find_spec

import numpy as np
import pytest
import yaml

from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.records import RecordBatch, empty_records
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.outputs.llmd_report import llmd_report
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts
from llmpilot_loadtester.outputs.stage_report import stage_report

MS = 1_000_000
STATISTICS = {"units", "mean", "mode", "stddev", "min", "max", "p0p1", "p1", "p5", "p10", "p25", "p50", "p75", "p90"}
STATISTICS |= {"p95", "p99", "p99p9"}
SCHEMA = {
    ("requests",): {"total", "failures", "incomplete", "input_length", "output_length"},
    ("latency",): {
        "time_to_first_token",
        "normalized_time_per_output_token",
        "time_per_output_token",
        "inter_token_latency",
        "request_latency",
    },
    ("throughput",): {"input_token_rate", "output_token_rate", "total_token_rate", "request_rate"},
}
"""Names of schema_v0_2.py of the package llmd-benchmark-report 0.2.1; it forbids others."""
UNITS = {
    "input_length": "count",
    "output_length": "count",
    "time_to_first_token": "s",
    "normalized_time_per_output_token": "s/token",
    "time_per_output_token": "s/token",
    "inter_token_latency": "s/token",
    "request_latency": "s",
    "input_token_rate": "tokens/s",
    "output_token_rate": "tokens/s",
    "total_token_rate": "tokens/s",
    "request_rate": "queries/s",
}


def records() -> RecordBatch:
    """One request of 3 tokens after 40, 60 and 80 ms, one that was cut off."""
    nothing = np.zeros(2, np.int64)
    return RecordBatch(
        request_index=np.arange(2),
        user_index=nothing,
        scheduled_nanos=nothing,
        send_nanos=nothing,
        first_byte_nanos=nothing,
        end_nanos=np.array([80, 90]) * MS,
        input_tokens=np.array([10, 30]),
        reasoning_tokens=nothing - 1,
        token_count_source=nothing,
        status=np.array([0, STATUSES.index("cancelled")]),
        finish_reason=nothing,
        stamp_source=nothing,
        errors=("", "cut off"),
        chunk_starts=np.array([0, 3, 3]),
        chunk_nanos=np.array([40, 60, 80]) * MS,
        chunk_tokens=np.ones(3, np.int64),
    )


def yaml_of(batch: RecordBatch, load: Load, *, is_valid: bool = True) -> str:
    stage = StageFacts(
        stage_index=2,
        stage=Stage(load=load, warm_up_seconds=0.0, measure_seconds=2.0),
        start_unix_nanos=1_763_740_000 * 10**9,
        verdict=Verdict(is_valid=is_valid, reasons=() if is_valid else ("late",)),
    )
    facts = RunFacts(protocol="tgi", served_model="m", target_url="http://h", simulated=True, requests="synthetic: x")
    return llmd_report(facts, stage_report(stage, batch, ServiceLevel(), seed=0), batch)


USERS = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=4),))
RATE = Load(kind=LoadKind.POISSON, rate_per_second=2.5)


def test_report_says_in_seconds_what_was_measured() -> None:
    report = yaml.safe_load(yaml_of(records(), USERS))
    aggregate = report["results"]["request_performance"]["aggregate"]
    means = {name: aggregate["latency"][name]["mean"] for name in SCHEMA["latency",]}
    assert means == pytest.approx(
        {
            "time_to_first_token": 0.04,
            "normalized_time_per_output_token": 0.08 / 3,
            "time_per_output_token": 0.02,
            "inter_token_latency": 0.02,
            "request_latency": 0.08,
        }
    )
    requests = aggregate["requests"]
    assert [requests[name] for name in ("total", "failures", "incomplete")] == [2, 0, 1]
    assert requests["input_length"]["mean"] == 10
    assert aggregate["throughput"]["output_token_rate"]["mean"] == 1.5
    assert report["run"]["time"] == {
        "start": "2025-11-21T15:46:40+00:00",
        "end": "2025-11-21T15:46:42+00:00",
        "duration": "PT2S",
    }


def test_names_and_units_are_those_of_the_schema() -> None:
    aggregate = yaml.safe_load(yaml_of(records(), USERS))["results"]["request_performance"]["aggregate"]
    for (part,), names in SCHEMA.items():
        assert set(aggregate[part]) <= names
        for name, statistics in aggregate[part].items():
            if isinstance(statistics, dict):
                assert set(statistics) <= STATISTICS
                assert {"units", "mean"} <= set(statistics)
                assert statistics["units"] == UNITS[name]


def test_load_is_a_rate_or_a_concurrency() -> None:
    of_users, of_rate = (
        yaml.safe_load(yaml_of(records(), load))["scenario"]["load"]["standardized"] for load in (USERS, RATE)
    )
    assert (of_users["concurrency"], of_users["stage"], of_users["source"]) == (4, 2, "random")
    assert (of_rate["rate_qps"], "concurrency" in of_rate) == (2.5, False)


def test_doubts_travel_with_the_report() -> None:
    report = yaml.safe_load(yaml_of(records(), USERS, is_valid=False))
    assert report["run"]["keywords"] == ["simulated", "not valid"]
    assert report["scenario"]["load"]["native"]["config"]["not_valid_because"] == ["late"]


@pytest.mark.skipif(find_spec("llmd_benchmark_report") is None, reason="pip install llmd-benchmark-report")
def test_the_schema_s_own_package_takes_it() -> None:
    from llmd_benchmark_report.schema_v0_2 import BenchmarkReportV02  # type: ignore[import-not-found]  # noqa: PLC0415

    for load in (USERS, RATE, Load(kind=LoadKind.TRACE)):
        for batch in (records(), empty_records(), records().take(np.array([1]))):
            BenchmarkReportV02.model_validate(yaml.safe_load(yaml_of(batch, load, is_valid=False)))
