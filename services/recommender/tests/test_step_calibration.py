import csv
import io
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.batching.simulation import simulate_arrivals
from llmpilot_perfmodel.steps.fitted import FittedConstants, read_fitted
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_recommender.calibration_source import load_tests, parse_load_test
from llmpilot_recommender.cli_dataset import dataset
from llmpilot_recommender.replay import FixedList, measured, withheld_first_tokens
from llmpilot_recommender.step_calibration import calibrate_raw

TRUE = StepConstants(
    decode_seconds=0.0125,
    decode_seconds_per_sequence=0.0005,
    decode_seconds_per_cached_token=2e-6,
    prefill_seconds=0.015,
    prefill_seconds_per_token=7e-5,
    prefill_seconds_per_request=0.006,
)
NAME = "results_llama-7b_gpu1_a100_u8.csv"
START_MS = 1_697_551_622_274
ACKNOWLEDGED_MS = 12
"""From the sending of a request to the message that it is queued."""


def _row(**cells: object) -> dict[str, object]:
    usual = {
        "smpnum": 7,
        "errors": "[]",
        "status": 200,
        "model": "llama-7b",
        "num_users": 8,
        "n_gpus": 1,
        "gpu_type": "A100",
        "start_timestamp": START_MS,
        "end_timestamp": START_MS + 187,
        "experiment_duration_s": 120,
        "n_input_tokens": 39,
        "n_output_tokens": 2,
        "latency_ms_per_token": [8, 160, 19],
    }
    return usual | cells


def _content(*rows: dict[str, object]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(_row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _rows_of(records: RequestRecords) -> list[dict[str, object]]:
    rows = []
    for index in range(len(records)):
        tokens = records.token_seconds[records.token_starts[index] : records.token_starts[index + 1]]
        queued_ms = round(records.send_seconds[index] * 1e3)
        times_ms = [queued_ms - ACKNOWLEDGED_MS, queued_ms, *np.round(tokens * 1e3).astype(int).tolist()]
        rows.append(
            _row(
                smpnum=index,
                start_timestamp=START_MS + times_ms[0],
                end_timestamp=START_MS + times_ms[-1],
                n_input_tokens=records.input_tokens[index],
                n_output_tokens=len(tokens),
                latency_ms_per_token=np.diff(times_ms).tolist(),
            )
        )
    return rows


@pytest.fixture(scope="module")
def raw_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw records of a simulated load test, in whole milliseconds like the public ones."""
    generator = np.random.default_rng(3)
    records = simulate_arrivals(
        policy=TgisPolicy(max_batch_weight=20_000),
        tables=TRUE.tables(),
        arrival_seconds=0.02 + np.cumsum(generator.exponential(0.1, 500)),
        input_tokens=generator.integers(6, 800, 500),
        output_tokens=generator.geometric(1 / 20, 500),
    )
    folder = tmp_path_factory.mktemp("raw")
    (folder / NAME).write_bytes(_content(*_rows_of(records)))
    return folder


def test_the_times_of_a_request_add_up_from_its_start() -> None:
    later = _row(start_timestamp=START_MS + 1000, end_timestamp=START_MS + 1187, smpnum=9)
    test = parse_load_test(NAME, _content(_row(), later))
    assert (test.llm, test.gpu_profile, test.users_count, test.test_seconds) == ("llama-7b", "1xA100-40GB", 8, 120)
    assert test.request_number.tolist() == [7, 9]
    assert test.send_seconds == pytest.approx([0, 1])
    assert test.timeline.arrival_seconds == pytest.approx([0.008, 1.008])
    assert test.timeline.token_seconds == pytest.approx([0.168, 0.187, 1.168, 1.187])
    assert test.timeline.end_seconds == pytest.approx([0.187, 1.187])
    assert test.turnaround_seconds == pytest.approx(0.008)


def test_a_failed_request_keeps_the_tokens_that_it_got() -> None:
    failed = _row(status=408, n_input_tokens="", n_output_tokens="", end_timestamp="", latency_ms_per_token=[8, 160])
    never_queued = _row(status=408, n_input_tokens="", n_output_tokens="", end_timestamp="", latency_ms_per_token=[])
    test = parse_load_test(NAME, _content(_row(), failed, never_queued))
    assert test.timeline.is_ok.tolist() == [True, False, False]
    assert test.timeline.token_starts.tolist() == [0, 2, 3, 3]
    assert test.timeline.arrival_seconds == pytest.approx([0.008, 0.008, 0])
    assert test.error_rate == pytest.approx(2 / 3)


def test_a_request_without_a_start_is_named() -> None:
    with pytest.raises(InvalidInputError, match=f"{NAME} row 2, column start_timestamp: must not be empty"):
        parse_load_test(NAME, _content(_row(), _row(start_timestamp="")))


def test_a_file_without_the_numbers_of_requests_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="column smpnum: must appear once"):
        parse_load_test(NAME, _content(_row()).replace(b"smpnum", b"number"))


def test_what_a_test_showed_is_read_off_by_hand() -> None:
    """Three tokens at 160, 19 and 21 ms, and one at 100: medians 130 ms and 20 ms, 4 tokens in 120 s."""
    long = _row(n_output_tokens=3, latency_ms_per_token=[8, 160, 19, 21])
    short = _row(smpnum=8, n_output_tokens=1, n_input_tokens=10, latency_ms_per_token=[8, 100])
    shown = measured(parse_load_test(NAME, _content(long, short)))
    assert shown.ttft_ms == pytest.approx(130)
    assert shown.nttft_ms == pytest.approx((160 / 39 + 100 / 10) / 2)
    assert shown.itl_ms == pytest.approx(20)
    assert shown.throughput_tokens_per_second == pytest.approx(4 / 120)


def test_one_message_fewer_than_tokens_is_a_withheld_first_token() -> None:
    withheld = _row(smpnum=1, latency_ms_per_token=[8, 180])
    test = parse_load_test(NAME, _content(_row(smpnum=0), withheld, _row(smpnum=3, n_output_tokens=1)))
    requests = FixedList.of([test])
    assert requests.output_tokens.tolist() == [2, 2, 1, 1]
    assert withheld_first_tokens([test], requests).tolist() == [False, True, False, False]


def test_calibration_finds_the_constants_behind_whole_milliseconds(raw_folder: Path) -> None:
    (fitted,) = calibrate_raw(raw_folder)
    assert (fitted.llm, fitted.gpu_profile, fitted.users) == ("llama-7b", "1xA100-40GB", (8,))
    assert fitted.constants.decode_seconds == pytest.approx(TRUE.decode_seconds, rel=0.1)
    assert fitted.constants.prefill_seconds_per_token == pytest.approx(TRUE.prefill_seconds_per_token, rel=0.05)
    assert fitted.decode_error < 0.04


def test_the_command_writes_a_table_that_says_where_it_is_from(raw_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "constants.csv"
    result = CliRunner().invoke(dataset, ["calibrate", str(raw_folder), "--out", str(out), "--users", "8"])
    assert result.exit_code == 0, result.output
    assert "1 pairs of an LLM and a GPU profile" in result.output
    text = out.read_text()
    assert "# licence: CDLA-Permissive-2.0\n# command: llm-pilot dataset calibrate PATH --out FILE --users 8\n" in text
    fitted: tuple[FittedConstants, ...] = read_fitted(text, label="constants.csv")
    assert fitted[0].users == (8,)


def test_a_level_that_nobody_measured_cannot_be_fitted_on(raw_folder: Path) -> None:
    with pytest.raises(
        InvalidInputError, match="llama-7b on 1xA100-40GB: steps: must have at least 20 decodes, have 0"
    ):
        calibrate_raw(raw_folder, users=[64])


def test_an_llm_of_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_bytes(_content(_row(model="nobody/knows")))
    with pytest.raises(InvalidInputError, match="'nobody/knows' is not among the measured LLMs"):
        calibrate_raw(tmp_path)


def test_the_list_of_requests_counts_equal_lengths(tmp_path: Path) -> None:
    rows = [
        _row(smpnum=0),
        _row(smpnum=1),
        _row(smpnum=1),
        _row(smpnum=2, n_output_tokens=1, latency_ms_per_token=[8, 9]),
    ]
    (tmp_path / NAME).write_bytes(_content(*rows))
    out = tmp_path / "requests.txt"
    result = CliRunner().invoke(dataset, ["requests", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text().endswith("input_tokens,output_tokens,count\n39,1,1\n39,2,2\n")


def test_load_tests_of_a_folder_come_one_by_one(raw_folder: Path) -> None:
    assert [test.users_count for test in load_tests(raw_folder)] == [8]
