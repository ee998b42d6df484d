from dataclasses import replace

import numpy as np
import pytest

from llmpilot_contracts.record_schema import COLUMN_NAMES, problems
from llmpilot_perfmodel.batching.records import OK, OUT_OF_MEMORY, LatencyQuantiles, RequestRecords

TOKEN_SECONDS: tuple[list[float], ...] = ([1.0, 1.5, 2.5], [4.0], [3.0, 3.25], [])
"""Of four requests: the third fails after two tokens, the last before its first."""


def records() -> RequestRecords:
    send_seconds = np.array([0.0, 2.0, 2.5, 3.0])
    return RequestRecords(
        duration_seconds=10.0,
        request_index=np.array([3, 1, 2, 0]),
        user_index=np.array([0, 1, 0, 1]),
        scheduled_seconds=send_seconds,
        send_seconds=send_seconds,
        end_seconds=np.array([2.5, 4.0, 5.0, 5.0]),
        input_tokens=np.array([10, 4, 7, 7]),
        status=np.array([OK, OK, OUT_OF_MEMORY, OUT_OF_MEMORY]),
        token_starts=np.array([0, 3, 4, 6, 6]),
        token_seconds=np.concatenate(TOKEN_SECONDS),
    )


def test_time_to_first_token_is_from_sending_to_the_first_token_of_successful_requests() -> None:
    assert records().ttft_seconds.tolist() == [1.0, 2.0]


def test_inter_token_latency_is_between_tokens_of_one_successful_request() -> None:
    assert records().itl_seconds.tolist() == [0.5, 1.0]


def test_summary_is_as_counted_by_hand() -> None:
    """TTFT 1000 and 2000 ms over 10 and 4 tokens; ITL 500 and 1000 ms; 4 tokens in 10 seconds; 2 of 4 failed."""
    summary = records().summary()
    assert (summary.ttft.mean_ms, summary.ttft.median_ms) == (1500, 1500)
    assert (summary.ttft.p90_ms, summary.ttft.p95_ms, summary.ttft.p99_ms) == pytest.approx((1900, 1950, 1990))
    assert summary.nttft.median_ms == pytest.approx((100 + 500) / 2)
    assert (summary.itl.mean_ms, summary.itl.median_ms) == (750, 750)
    assert summary.throughput_tokens_per_second == 0.4
    assert summary.requests_per_second == 0.2
    assert (summary.request_count, summary.error_count, summary.out_of_memory_count) == (4, 2, 2)
    assert summary.error_rate == 0.5


def test_latency_that_nobody_had_is_none() -> None:
    failed = records()
    only_failed = RequestRecords(
        duration_seconds=10.0,
        request_index=failed.request_index[2:],
        user_index=failed.user_index[2:],
        scheduled_seconds=failed.scheduled_seconds[2:],
        send_seconds=failed.send_seconds[2:],
        end_seconds=failed.end_seconds[2:],
        input_tokens=failed.input_tokens[2:],
        status=failed.status[2:],
        token_starts=np.array([0, 2, 2]),
        token_seconds=failed.token_seconds[4:],
    )
    summary = only_failed.summary()
    assert summary.ttft == summary.nttft == summary.itl == LatencyQuantiles()
    assert (summary.throughput_tokens_per_second, summary.error_rate) == (0, 1)


def test_no_records_have_no_error_rate() -> None:
    nothing = np.empty(0, np.int64)
    empty = RequestRecords(
        duration_seconds=10.0,
        request_index=nothing,
        user_index=nothing,
        scheduled_seconds=np.empty(0),
        send_seconds=np.empty(0),
        end_seconds=np.empty(0),
        input_tokens=nothing,
        status=nothing,
        token_starts=np.zeros(1, np.int64),
        token_seconds=np.empty(0),
    )
    assert empty.summary().error_rate is None
    assert empty.summary().ttft == LatencyQuantiles()
    assert problems(empty.columns()) == []


def test_columns_follow_the_schema_of_the_load_tester() -> None:
    columns = records().columns()
    assert tuple(columns) == COLUMN_NAMES
    assert problems(columns) == []


def test_columns_hold_nanoseconds_and_a_token_a_chunk() -> None:
    columns = {name: list(values) for name, values in records().columns().items()}
    assert [list(times) for times in columns["chunk_time_nanos"]] == [  # type: ignore[call-overload]
        [1_000_000_000, 1_500_000_000, 2_500_000_000],
        [4_000_000_000],
        [3_000_000_000, 3_250_000_000],
        [],
    ]
    assert columns["first_byte_time_nanos"] == [1_000_000_000, 4_000_000_000, 3_000_000_000, None]
    assert columns["output_token_count"] == [3, 1, 2, 0]
    assert columns["status"] == ["ok", "ok", "out_of_memory", "out_of_memory"]
    assert columns["finish_reason"] == ["length", "length", None, None]
    assert set(columns["origin"]) == {"simulated"}


def test_user_of_a_scheduled_request_is_none() -> None:
    by_schedule = replace(records(), user_index=np.array([-1, 1, -1, 0]))
    assert by_schedule.columns()["user_index"] == [None, 1, None, 0]
