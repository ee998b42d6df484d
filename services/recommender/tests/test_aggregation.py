import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_recommender.aggregation import aggregate, parse_lists
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.raw_records import RawFile

Record = tuple[float, float, float, str, bool]
"""Status, input tokens, output tokens, latencies, out of memory."""

A = (200, 10.0, 3.0, "[8, 100, 20, 30]", False)
B = (200, 40.0, 1.0, "[9, 200]", False)
FAILED = (408, np.nan, np.nan, "[7, 5000]", False)
OUT_OF_MEMORY = (9999, np.nan, np.nan, "[]", True)


def raw_file(*records: Record) -> RawFile:
    lists = [record[3].encode() for record in records]
    return RawFile(
        name="a.csv",
        llm="llama-7b",
        gpu_profile="1xT4-16GB",
        users_count=8,
        test_seconds=10,
        status=np.array([record[0] for record in records], float),
        input_tokens=np.array([record[1] for record in records], float),
        output_tokens=np.array([record[2] for record in records], float),
        is_out_of_memory=np.array([record[4] for record in records], bool),
        latency_text=np.frombuffer(b"".join(lists), np.uint8),
        latency_offsets=np.cumsum([0, *map(len, lists)]),
    )


def parse(lists: list[bytes]) -> list[list[int]]:
    text = np.frombuffer(b"".join(lists), np.uint8)
    values, starts = parse_lists("a.csv", text, np.cumsum([0, *map(len, lists)]))
    return [part.tolist() for part in np.split(values, starts[1:-1])]


def violations(*records: Record) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        aggregate(raw_file(*records))
    return [str(violation) for violation in caught.value.violations]


def test_measurement_of_two_good_and_two_failed_requests() -> None:
    # By hand. TTFT 100, 200; per input token 10, 5; ITL 20, 30. Quantile q of (x, y): x + q (y - x).
    measurement = aggregate(raw_file(A, FAILED, B, OUT_OF_MEMORY))
    assert measurement == Measurement(
        llm="llama-7b",
        gpu_profile="1xT4-16GB",
        users_count=8,
        origin=Origin.MEASURED,
        test_seconds=10,
        ttft=Quantiles(median_ms=150, p90_ms=190, p95_ms=195, p99_ms=199),
        nttft=Quantiles(median_ms=7.5, p90_ms=9.5, p95_ms=9.75, p99_ms=9.95),
        itl=Quantiles(median_ms=25, p90_ms=29, p95_ms=29.5, p99_ms=29.9),
        throughput_tokens_per_second=0.4,
        request_count=4,
        error_count=2,
        oom_count=1,
    )


def test_requests_of_one_token_have_no_itl() -> None:
    measurement = aggregate(raw_file(B))
    assert measurement.itl == Quantiles()
    assert measurement.ttft.median_ms == 200


def test_when_every_request_failed_the_latencies_are_unknown_and_the_throughput_is_zero() -> None:
    measurement = aggregate(raw_file(FAILED, OUT_OF_MEMORY))
    assert measurement.ttft == measurement.nttft == measurement.itl == Quantiles()
    assert measurement.throughput_tokens_per_second == 0
    assert (measurement.request_count, measurement.error_count, measurement.oom_count) == (2, 2, 1)


def test_every_malformed_list_is_named_with_its_row() -> None:
    bad = (200, 1.0, 1.0, "[1, x]", False)
    assert violations(A, bad, B, (408, np.nan, np.nan, "[" + "1, " * 30 + "]", False)) == [
        "a.csv row 2, column latency_ms_per_token: must be a list of whole numbers, is '[1, x]'",
        "a.csv row 4, column latency_ms_per_token: must be a list of whole numbers, is "
        "'[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...'",
    ]


def test_good_requests_without_latency_or_tokens_are_named() -> None:
    assert violations(
        A, (200, np.nan, np.inf, "[1, 2]", False), (200, 0.0, np.nan, "[1]", False), (np.nan, 1.0, 1.0, "[]", False)
    ) == [
        "a.csv row 4, column status: must not be empty",
        "a.csv row 3, column latency_ms_per_token: must have a time to first token, status is 200",
        "a.csv row 2, column n_input_tokens: must be > 0, status is 200",
        "a.csv row 3, column n_input_tokens: must be > 0, status is 200",
        "a.csv row 2, column n_output_tokens: must be >= 0, status is 200",
        "a.csv row 3, column n_output_tokens: must be >= 0, status is 200",
    ]


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"]", b"1", b"[1", b"1]", b"[-1]", b"[1.5]", b"[1,]", b"[,1]", b"[1 2]", b"[1][2]", b"[[1]]",
     b"[1, ,2]", b"[1]\n", b" [1]", b"[1234567890]", b"[1e3]", b"[nan]", b"[0x1]", b"__import__('os')"],
)  # fmt: skip
def test_text_that_is_no_list_of_whole_numbers_is_rejected(text: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"a\.csv row 2, column latency_ms_per_token") as caught:
        parse([b"[1, 2]", text, b"[3]"])
    assert len(caught.value.violations) == 1


def test_number_does_not_run_on_into_the_next_row() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse([b"[1, 2", b"3]"])
    assert [violation.field.split(",")[0] for violation in caught.value.violations] == ["a.csv row 1", "a.csv row 2"]


@given(st.lists(st.lists(st.integers(0, 10**9 - 1)), min_size=1))
def test_lists_are_parsed_as_json_does(lists: list[list[int]]) -> None:
    assert parse([json.dumps(numbers).encode() for numbers in lists]) == lists
    assert parse([json.dumps(numbers, separators=(",", ":")).encode() for numbers in lists]) == lists


@given(st.lists(st.text("[], 019x", max_size=8).map(str.encode) | st.just(b"[1, 22, 333]"), min_size=1, max_size=6))
def test_the_rows_rejected_are_those_that_do_not_match_the_pattern(lists: list[bytes]) -> None:
    pattern = re.compile(rb"\[(\d{1,9}(, ?\d{1,9})*)?\]")
    expected = [f"a.csv row {row}" for row, text in enumerate(lists, start=1) if not pattern.fullmatch(text)]
    if not expected:
        assert parse(lists) == [list(map(int, re.findall(rb"\d+", text))) for text in lists]
        return
    with pytest.raises(InvalidInputError) as caught:
        parse(lists)
    assert [violation.field.split(",")[0] for violation in caught.value.violations] == expected


@given(st.permutations([A, B, FAILED, OUT_OF_MEMORY, (200, 7.0, 2.0, "[1, 20, 300]", False)]))
def test_the_order_of_requests_does_not_matter(records: list[Record]) -> None:
    assert aggregate(raw_file(*records)) == aggregate(raw_file(*sorted(records, key=lambda record: record[3])))
