import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_loadtester.cli_compare import compare
from llmpilot_loadtester.cli_import import import_
from llmpilot_loadtester.cli_report import report
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.outputs.records_file import write_records
from llmpilot_loadtester.outputs.report_files import FORMATS
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts

MS = 1_000_000


def call(command: object, *arguments: object) -> Result:
    """Run a subcommand; what it raises is for the test."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)  # type: ignore[arg-type]


def requests(count: int, ttft_ms: int) -> RecordBatch:
    """Requests 100 ms apart, each a first token after `ttft_ms` and two more 10 ms apart."""
    send = np.arange(count) * 100 * MS
    nothing = np.zeros(count, np.int64)
    return RecordBatch(
        request_index=np.arange(count),
        user_index=nothing,
        scheduled_nanos=send,
        send_nanos=send,
        first_byte_nanos=send + MS,
        end_nanos=send + (ttft_ms + 20) * MS,
        input_tokens=nothing + 10,
        reasoning_tokens=nothing - 1,
        token_count_source=nothing,
        status=nothing,
        finish_reason=nothing,
        stamp_source=nothing,
        errors=("",) * count,
        chunk_starts=np.arange(count + 1) * 3,
        chunk_nanos=(send[:, None] + np.array([ttft_ms, ttft_ms + 10, ttft_ms + 20]) * MS).ravel(),
        chunk_tokens=np.ones(3 * count, np.int64),
    )


def stage_of(users_count: int, *, attempt: int = 1, reason: str = "") -> StageFacts:
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=users_count),))
    return StageFacts(
        stage_index=users_count.bit_length() - 1,
        attempt=attempt,
        stage=Stage(load=load, warm_up_seconds=0.0, measure_seconds=5.0),
        start_unix_nanos=1_763_740_000 * 10**9,
        verdict=Verdict(is_valid=not reason, reasons=(reason,) * bool(reason)),
    )


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two stages, the first of which was interrupted once."""
    path = tmp_path / "first.parquet"
    facts = RunFacts(served_model="m", simulated=True, service_level=ServiceLevel(ttft_ms=30.0))
    stages = [
        (stage_of(1, reason="interrupted"), requests(3, 20)),
        (stage_of(1, attempt=2), requests(50, 20)),
        (stage_of(2, reason="the client was late"), requests(50, 40)),
    ]
    write_records(path, facts, stages)
    return path


def test_report_writes_every_format_and_shows_a_row_a_stage(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "reports"
    done = call(report, records, "--out", out)
    assert {path.name for path in out.iterdir()} == {
        "stage-00.vllm.json", "stage-00.llm-d.yaml", "stage-01.vllm.json", "stage-01.llm-d.yaml", "stages.csv",
        "report.html",
    }  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "simulated: the server says of itself that it is a simulator"
    assert lines[3].split()[:10] == ["1", "user", "50", "0", "%", "20", "20", "10", "10", "30"]
    assert lines[4].rstrip().endswith("not valid")
    assert "not valid because the client was late" in lines[5]
    assert set(lines[6:]) == {str(path) for path in out.iterdir()}


def test_report_follows_from_the_records_alone(records: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        call(report, records, "--out", tmp_path / name)
        texts.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert texts[0] == texts[1]


def test_limits_of_the_command_line_take_the_place_of_the_file_s(records: Path, tmp_path: Path) -> None:
    def goodputs(*options: str) -> list[float]:
        call(report, records, "--out", tmp_path, "--format", "json", *options)
        return [json.loads((tmp_path / f"stage-0{n}.vllm.json").read_text())["request_goodput"] for n in (0, 1)]

    assert goodputs() == [10.0, 0.0]
    assert goodputs("--end-to-end-ms", "60", "--itl-ms", "10") == [10.0, 10.0]
    assert goodputs("--itl-ms", "9") == [0.0, 0.0]


def test_report_writes_the_chosen_formats_beside_nothing_else(records: Path, tmp_path: Path) -> None:
    call(report, records, "--out", tmp_path / "o", "--format", "csv, html")
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"stages.csv", "report.html"}


def test_everything_that_is_wrong_with_the_options_is_told_at_once(records: Path) -> None:
    with pytest.raises(InvalidInputError) as raised:
        call(report, records, "--format", "pdf", "--ttft-ms", "0", "--share", "1.5", "--itl-ms", "nan")
    assert [str(violation) for violation in raised.value.violations] == [
        f"--format: must be some of {', '.join(FORMATS)}, has 'pdf'",
        "--ttft-ms: must be > 0, is 0",
        "--itl-ms: must be > 0, is nan",
        "--share: must be > 0 and at most 1, is 1.5",
    ]


def test_share_without_a_limit_is_refused(records: Path) -> None:
    with pytest.raises(InvalidInputError, match="goes with a limit"):
        call(report, records, "--share", "0.9")


def test_compare_says_what_differs_and_what_does_not(records: Path, tmp_path: Path) -> None:
    other = tmp_path / "second.parquet"
    write_records(other, RunFacts(served_model="m"), [(stage_of(1), requests(50, 22)), (stage_of(4), requests(50, 20))])
    done = call(compare, records, other)
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "10.0 % higher [+10, +10] %" in rows["TTFT median"]
    assert "no difference seen [+0, +0] %" in rows["ITL median"]
    assert "not in all of them: first: 2 users" in done.stdout
    assert "not in all of them: second: 4 users" in done.stdout
    assert "first: simulated, m" in done.stdout
    assert "noise within each run" in done.stdout


def test_compare_as_json_has_the_same_numbers(records: Path) -> None:
    told = json.loads(call(compare, records, records, "--json").stdout)
    assert [stage["load"] for stage in told["stages"]] == ["1 user", "2 users"]
    assert told["stages"][1]["doubts"] == [f"{records} is not valid: the client was late"] * 2
    (differences,) = told["stages"][0]["against_first"].values()
    assert {(one["change"], one["is_seen"]) for one in differences} == {(0.0, False)}


def test_import_says_what_it_wrote_and_refuses_what_it_has_not(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    header = "reqnum,errors,status,start_timestamp,end_timestamp,experiment_duration_s,n_input_tokens,n_output_tokens"
    row = '0,[],200,1000,1400,120,4,2,"[1100, 1200, 1400]"'
    (raw / "results_a__b_gpu1_t4_u2.csv").write_text(f"{header},timestamps_per_token\n{row}\n")
    done = call(import_, raw, "--out", tmp_path / "out", "--users", "1,2")
    assert done.stdout == f"{tmp_path}/out/a__b_1xT4-16GB.parquet: 1 load tests\n"
    for options, problem in (
        (("--users", "4"), "no load test that was asked for"),
        (("--llm", "c"), "no load test that was asked for"),
        (("--users", "x"), "must be whole numbers"),
    ):
        with pytest.raises(InvalidInputError, match=problem):
            call(import_, raw, "--out", tmp_path / "out", *options)
