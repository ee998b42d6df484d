import numpy as np

from llmpilot_contracts.dataset_schema import COLUMN_NAMES
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles, from_cells, to_cells

MEASURED = Measurement(
    llm="llama-13b",
    gpu_profile="1xA100-40GB",
    users_count=64,
    origin=Origin.MEASURED,
    test_seconds=120,
    ttft=Quantiles(median_ms=1, p90_ms=2, p95_ms=3, p99_ms=4),
    nttft=Quantiles(median_ms=0.1, p90_ms=0.2, p95_ms=0.3, p99_ms=0.4),
    itl=Quantiles(median_ms=5, p90_ms=6, p95_ms=7, p99_ms=8),
    throughput_tokens_per_second=9.5,
    request_count=8,
    error_count=2,
    oom_count=1,
)
UNKNOWN = Measurement(llm="a", gpu_profile="b", users_count=1, origin=Origin.PUBLISHED_MEDIAN)


def test_each_number_lands_in_its_own_column() -> None:
    row = "llama-13b,1xA100-40GB,64,measured,120.0,1.0,2.0,3.0,4.0,0.1,0.2,0.3,0.4,5.0,6.0,7.0,8.0,9.5,8,2,0.25,1"
    expected = row.split(",")
    assert dict(zip(COLUMN_NAMES, to_cells(MEASURED), strict=True)) == dict(zip(COLUMN_NAMES, expected, strict=True))


def test_cells_turn_back_into_the_measurement() -> None:
    assert from_cells(to_cells(MEASURED)) == MEASURED
    assert from_cells(to_cells(UNKNOWN)) == UNKNOWN


def test_error_rate_is_failed_over_sent() -> None:
    assert MEASURED.error_rate == 0.25


def test_error_rate_is_unknown_without_counts() -> None:
    assert UNKNOWN.error_rate is None


def test_error_rate_of_no_requests_is_unknown() -> None:
    none_sent = Measurement(
        llm="a", gpu_profile="b", users_count=1, origin=Origin.MEASURED, request_count=0, error_count=0
    )
    assert none_sent.error_rate is None


def test_unknown_is_written_empty_and_zero_as_zero() -> None:
    assert to_cells(UNKNOWN)[4:] == ("",) * 18
    assert (
        to_cells(Measurement(llm="a", gpu_profile="b", users_count=1, origin=Origin.MEASURED, oom_count=0))[-1] == "0"
    )


def test_numpy_numbers_are_written_as_plain_numbers() -> None:
    row = to_cells(
        Measurement(
            llm="a",
            gpu_profile="b",
            users_count=1,
            origin=Origin.MEASURED,
            test_seconds=float(np.float64(0.1)),
            itl=Quantiles(median_ms=np.float64(0.1)),
        )
    )
    assert row[COLUMN_NAMES.index("itl_ms_median")] == "0.1"
