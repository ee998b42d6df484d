import json

import numpy as np

from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts
from llmpilot_loadtester.outputs.stage_report import stage_report
from llmpilot_loadtester.outputs.vllm_json import Json, vllm_result

# fmt: off
ALWAYS_WRITTEN = [
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "input_lens",
    "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts", "errors",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx",
]
# fmt: on
"""Names of vllm/benchmarks/serve.py at 009e6d4: `result_json` and `result` of benchmark() for generated text."""
BY_METRIC = [
    f"{statistic}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
    for statistic in ("mean", "median", "std", "p99")
]

MS = 1_000_000
WARM_UP_MS = 1000


def three_requests() -> RecordBatch:
    """In the window: one with chunks of 1, 2 and 1 tokens, one that failed after a chunk; before it: one more."""
    send = np.array([0, WARM_UP_MS, WARM_UP_MS + 100]) * MS
    chunks = np.array([50, WARM_UP_MS + 40, WARM_UP_MS + 60, WARM_UP_MS + 70, WARM_UP_MS + 130]) * MS
    nothing = np.zeros(3, np.int64)
    return RecordBatch(
        request_index=np.arange(3),
        user_index=nothing,
        scheduled_nanos=send - np.array([0, 5, 0]) * MS,
        send_nanos=send,
        first_byte_nanos=send,
        end_nanos=np.array([51, WARM_UP_MS + 75, WARM_UP_MS + 900]) * MS,
        input_tokens=np.array([10, 20, -1]),
        reasoning_tokens=nothing - 1,
        token_count_source=nothing,
        status=np.array([0, 0, STATUSES.index("disconnected")]),
        finish_reason=nothing,
        stamp_source=nothing,
        errors=("", "", "reset by peer"),
        chunk_starts=np.array([0, 1, 4, 5]),
        chunk_nanos=chunks,
        chunk_tokens=np.array([1, 1, 2, 1, 1]),
    )


def result_of(records: RecordBatch, load: Load, level: ServiceLevel | None = None) -> dict[str, Json]:
    stage = StageFacts(
        stage_index=0,
        stage=Stage(load=load, warm_up_seconds=WARM_UP_MS / 1000, measure_seconds=2.0),
        start_unix_nanos=1_763_740_000 * 10**9,
        verdict=Verdict(is_valid=True),
    )
    facts = RunFacts(protocol="openai-completions", served_model="m")
    report = stage_report(stage, records, level or ServiceLevel(), seed=0)
    written = vllm_result(facts, report, records)
    read_again: dict[str, Json] = json.loads(json.dumps(written, allow_nan=False))
    return read_again


FOUR_USERS = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=4),))


def test_every_name_that_vllm_writes_is_there() -> None:
    assert set(ALWAYS_WRITTEN + BY_METRIC) - set(result_of(three_requests(), FOUR_USERS)) == set()


def test_details_are_of_the_window_in_seconds_with_a_gap_per_chunk() -> None:
    result = result_of(three_requests(), FOUR_USERS)
    expected = {
        "num_prompts": 2,
        "completed": 1,
        "failed": 1,
        "input_lens": [20, 0],
        "output_lens": [4, 0],
        "ttfts": [0.04, 0.0],
        "itls": [[0.02, 0.01], []],
        "latencies": [0.075, 0.0],
        "start_times": [1.0, 1.1],
        "queue_times": [0.005, 0.0],
        "errors": ["", "reset by peer"],
        "total_input_tokens": 20,
        "total_output_tokens": 4,
        "max_concurrent_requests": 1,
        "max_output_tokens_per_s": 4.0,
    }
    assert {name: result[name] for name in expected} == expected


def test_figures_are_those_of_the_details() -> None:
    result = result_of(three_requests(), FOUR_USERS, ServiceLevel(ttft_ms=40.0))
    expected = {
        "duration": 2.0,
        "mean_ttft_ms": 40.0,
        "median_itl_ms": 15.0,
        "std_itl_ms": 5.0,
        "mean_tpot_ms": 35 / 3,
        "p99_e2el_ms": 75.0,
        "mean_e2el_including_client_queue_ms": 80.0,
        "median_client_queue_time_ms": 2.5,
        "output_throughput": 2.0,
        "request_throughput": 0.5,
        "request_goodput": 0.5,
        "total_token_throughput": 12.0,
    }
    actual = np.array([result[name] for name in expected], dtype=np.float64)
    np.testing.assert_allclose(actual, list(expected.values()), rtol=1e-12)


def test_load_is_told_as_vllm_does() -> None:
    rated = Load(kind=LoadKind.GAMMA, rate_per_second=12.5, burstiness=0.5)
    for load, expected in (
        (FOUR_USERS, ("inf", 1.0, 4)),
        (rated, (12.5, 0.5, None)),
        (Load(kind=LoadKind.ALL_AT_ONCE, request_count=3), ("inf", 1.0, None)),
    ):
        result = result_of(three_requests(), load)
        assert (result["request_rate"], result["burstiness"], result["max_concurrency"]) == expected


def test_what_nobody_reported_is_null_and_not_zero() -> None:
    records = three_requests()
    nothing_ok = records.take(np.array([2]))
    result = result_of(nothing_ok, FOUR_USERS)
    assert result["completed"] == 0
    assert {result[name] for name in ("mean_ttft_ms", "p99_itl_ms", "median_e2el_ms", "request_goodput")} == {None}


def test_peaks_are_of_the_window_whenever_requests_were_sent() -> None:
    """A reply from the warm-up is still under way when the window starts, and most of its tokens come in it."""
    records = three_requests()
    records.end_nanos[0] = (WARM_UP_MS + 60) * MS
    records.chunk_nanos[0] = (WARM_UP_MS + 55) * MS
    result = result_of(records, FOUR_USERS)
    assert (result["max_concurrent_requests"], result["max_output_tokens_per_s"]) == (2, 5.0)
