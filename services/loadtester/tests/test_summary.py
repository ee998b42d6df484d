import io
from dataclasses import replace

from rich.console import Console

from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import empty_records
from llmpilot_loadtester.domain.results import ErrorCount, LatencySummary, StageResult, Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.domain.window import window_of
from llmpilot_loadtester.outputs.summary import remarks, stage_table

WIDTH = 80


def result_of(users_count: int, *, reasons: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> StageResult:
    """A stage in which nothing was sent."""
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=users_count),))
    stage = Stage(load=load, warm_up_seconds=0.0, measure_seconds=1.0)
    return StageResult(
        stage_index=0,
        attempt=1,
        stage=stage,
        start_unix_nanos=0,
        metrics=stage_metrics(empty_records(), window_of(stage), ServiceLevel(), seed=0),
        verdict=Verdict(is_valid=not reasons, reasons=reasons, notes=notes),
    )


def lines_of(*results: StageResult) -> list[str]:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(stage_table(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_loaded_stage_fits_into_80_columns() -> None:
    idle = result_of(128, reasons=("late",))
    latency = LatencySummary(count=9, median_ms=9_883.0, p99_ms=18_203.0)
    metrics = replace(
        idle.metrics,
        request_count=12_345,
        ok_count=9_999,
        errors=(ErrorCount(status="timeout", count=2_346, example=""),),
        ttft=latency,
        itl=LatencySummary(count=9, median_ms=24.3, p99_ms=186.0),
        output_tokens_per_second=12_345.0,
        goodput_requests_per_second=1_234.0,
    )
    *_, row = lines_of(replace(idle, metrics=metrics))
    assert row.split() == [
        "128", "users", "12,345", "19", "%", "9,883", "18,203", "24.3", "186", "12,345", "1,234", "not", "valid"
    ]  # fmt: skip


def test_what_nobody_measured_is_a_dash() -> None:
    *_, row = lines_of(result_of(1))
    assert row.split() == ["1", "user", "0", "–", "–", "–", "–", "–", "0", "–", "valid"]


def test_what_is_true_of_several_stages_is_said_once() -> None:
    results = [result_of(1, notes=("n",)), result_of(2, notes=("n", "m")), result_of(4, reasons=("Late.",))]
    assert [remark.plain for remark in remarks(results)] == [
        "1 user, 2 users: n",
        "2 users: m",
        "4 users: not valid because late.",
    ]


def test_an_error_is_no_markup() -> None:
    """What a server says may look like the codes of the terminal library."""
    idle = result_of(1)
    metrics = replace(idle.metrics, errors=(ErrorCount(status="server_error", count=3, example="[red]x[/]"),))
    (told,) = remarks([replace(idle, metrics=metrics)])
    assert told.plain == "1 user: 3 x server_error: [red]x[/]"
