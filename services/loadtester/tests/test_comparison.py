from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, Stage, UserStep
from llmpilot_loadtester.outputs.comparison import Difference, compare, names_of
from llmpilot_loadtester.outputs.records_file import RecordsFile, read_records, write_records
from llmpilot_loadtester.outputs.resampling import grouped_quantile_replicates, quantile_replicates
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts

MS = 1_000_000
SECONDS = 20.0


def requests(count: int, *, seed: int, ttft_factor: float = 1.0, failing_share: float = 0.0) -> RecordBatch:
    """Requests at random moments: TTFT log-normal around 50 ms, then nine tokens, gaps exponential around 10 ms."""
    generator = np.random.default_rng(seed)
    send = np.sort(generator.uniform(0, SECONDS - 1, count))
    ttft = 0.05 * ttft_factor * generator.lognormal(0, 0.3, count)
    gaps = generator.exponential(0.01, (count, 9))
    chunks = send[:, None] + ttft[:, None] + np.cumsum(np.column_stack([np.zeros(count), gaps]), axis=1)
    chunk_nanos = (chunks * 1e9).astype(np.int64)
    send_nanos = (send * 1e9).astype(np.int64)
    nothing = np.zeros(count, np.int64)
    is_bad = generator.random(count) < failing_share
    return RecordBatch(
        request_index=np.arange(count),
        user_index=nothing,
        scheduled_nanos=send_nanos,
        send_nanos=send_nanos,
        first_byte_nanos=chunk_nanos[:, 0],
        end_nanos=chunk_nanos[:, -1],
        input_tokens=nothing + 10,
        reasoning_tokens=nothing - 1,
        token_count_source=nothing,
        status=np.where(is_bad, STATUSES.index("timeout"), 0),
        finish_reason=nothing,
        stamp_source=nothing,
        errors=tuple("late" if bad else "" for bad in is_bad),
        chunk_starts=np.arange(count + 1) * 10,
        chunk_nanos=chunk_nanos.ravel(),
        chunk_tokens=np.ones(10 * count, np.int64),
    )


def stage_of(users_count: int, *, is_valid: bool = True) -> StageFacts:
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=users_count),))
    return StageFacts(
        stage_index=users_count,
        stage=Stage(load=load, warm_up_seconds=0.0, measure_seconds=SECONDS),
        start_unix_nanos=0,
        verdict=Verdict(is_valid=is_valid, reasons=() if is_valid else ("the client was late",)),
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., RecordsFile]:
    """Writes a file of records, a stage per number of users."""

    def of(name: str, *stages: tuple[StageFacts, RecordBatch]) -> RecordsFile:
        write_records(tmp_path / name, RunFacts(), stages)
        return read_records(tmp_path / name)

    return of


def by_metric(differences: tuple[Difference, ...]) -> dict[str, Difference]:
    return {difference.metric: difference for difference in differences}


def test_same_records_show_no_difference(write: Callable[..., RecordsFile]) -> None:
    file = write("a", (stage_of(8), requests(300, seed=1, failing_share=0.1)))
    (stage,) = compare([file, file]).stages
    found = by_metric(stage.differences[0])
    assert set(found) == {
        "TTFT median", "TTFT p95", "end to end median", "ITL median", "ITL p95", "output tokens/s", "requests/s",
        "error rate",
    }  # fmt: skip
    assert {(one.change, one.is_seen, one.is_better) for one in found.values()} == {(0.0, False, None)}
    assert all(one.sentence().startswith("no difference seen [") for one in found.values())


def test_difference_is_seen_with_the_truth_in_its_interval(write: Callable[..., RecordsFile]) -> None:
    first = write("a", (stage_of(8), requests(800, seed=1)))
    other = write("b", (stage_of(8), requests(800, seed=2, ttft_factor=1.3)))
    found = by_metric(compare([first, other]).stages[0].differences[0])
    slower = found["TTFT median"]
    assert slower.low is not None
    assert slower.high is not None
    assert 0 < slower.low < 0.3 < slower.high < 0.5
    assert slower.is_better is False
    assert "% higher [+" in slower.sentence()
    assert not found["ITL median"].is_seen
    faster = by_metric(compare([other, first]).stages[0].differences[0])["TTFT median"]
    assert (faster.is_better, "% lower [-" in faster.sentence()) == (True, True)


def test_less_throughput_is_worse(write: Callable[..., RecordsFile]) -> None:
    first = write("a", (stage_of(8), requests(2000, seed=1)))
    other = write("b", (stage_of(8), requests(1000, seed=2)))
    found = by_metric(compare([first, other]).stages[0].differences[0])
    assert [found[name].is_better for name in ("output tokens/s", "requests/s")] == [False, False]
    assert found["requests/s"].change == pytest.approx(-0.5)


def test_error_rates_are_compared_by_points_as_they_may_be_zero(write: Callable[..., RecordsFile]) -> None:
    first = write("a", (stage_of(8), requests(400, seed=1)))
    other = write("b", (stage_of(8), requests(400, seed=2, failing_share=0.2)))
    rate = by_metric(compare([first, other]).stages[0].differences[0])["error rate"]
    assert (rate.first, rate.is_seen, rate.is_better) == (0.0, True, False)
    assert rate.change == pytest.approx(0.2, abs=0.06)  # 3 standard errors of 400
    assert "points higher" in rate.sentence()


def test_too_few_requests_tell_nothing(write: Callable[..., RecordsFile]) -> None:
    first, other = (write(name, (stage_of(8), requests(9, seed=seed))) for seed, name in enumerate("ab"))
    (stage,) = compare([first, other]).stages
    assert {one.sentence() for one in stage.differences[0]} == {"too few requests to tell"}


def test_stages_belong_together_by_load_and_the_others_are_named(write: Callable[..., RecordsFile]) -> None:
    batch = requests(30, seed=1)
    first = write("a", (stage_of(1), batch), (stage_of(8), batch), (stage_of(2), batch))
    second = write("b", (stage_of(2), batch), (stage_of(1), batch), (stage_of(16), batch))
    third = write("c", (stage_of(1), batch), (stage_of(2), batch))
    compared = compare([first, second, third])
    assert [stage.load for stage in compared.stages] == ["1 user", "2 users"]
    assert [len(stage.differences) for stage in compared.stages] == [2, 2]
    assert compared.unmatched == ("a: 8 users", "b: 16 users")


def test_numbers_that_do_not_count_are_doubted(write: Callable[..., RecordsFile]) -> None:
    batch = requests(30, seed=1)
    files = [write("a", (stage_of(1), batch)), write("b", (stage_of(1, is_valid=False), batch))]
    assert compare(files).stages[0].doubts == ("b is not valid: the client was late",)


def test_records_outside_the_window_do_not_count(write: Callable[..., RecordsFile]) -> None:
    batch = requests(400, seed=1)
    facts = stage_of(1)
    late = replace(facts, stage=replace(facts.stage, warm_up_seconds=10.0, measure_seconds=10.0))
    slow_start = replace(
        batch, send_nanos=np.where(batch.send_nanos < 10 * 1000 * MS, 0, batch.send_nanos)
    )  # those of the first half waited for ever
    found = by_metric(compare([write("a", (late, batch)), write("b", (late, slow_start))]).stages[0].differences[0])
    assert found["TTFT median"].change == 0.0


def test_a_difference_where_there_is_none_is_seen_about_once_in_twenty() -> None:
    """Of 100 equal pairs, 5 % are expected; 13 or more have a chance of .1 %, and so has 0 of .6 %."""
    generator = np.random.default_rng(0)
    seen = 0
    for _ in range(100):
        first, other = (quantile_replicates(generator.lognormal(0, 0.3, 150), 0.5, generator) for _ in range(2))
        low, high = np.quantile(other / first - 1, [0.025, 0.975])
        seen += not low <= 0 <= high
    assert 0 < seen < 13


def test_tokens_of_a_request_are_drawn_together() -> None:
    """All tokens of a request are alike, so the interval is that of 50 requests, not of 5,000 tokens."""
    generator = np.random.default_rng(1)
    of_request = generator.normal(10, 1, 50)
    values, owners = np.repeat(of_request, 100), np.repeat(np.arange(50), 100)
    clustered = grouped_quantile_replicates(values, owners, [0.5], generator)[:, 0].std()
    of_requests = quantile_replicates(of_request, 0.5, generator).std()
    assert clustered == pytest.approx(of_requests, rel=0.25)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/one.parquet", "b/two.parquet"], ["one", "two"]),
        (["x/a/records.parquet", "y/b/records.parquet"], ["a", "b"]),
        (["x/a/records.parquet", "y/a/records.parquet"], ["x/a/records.parquet", "y/a/records.parquet"]),
    ],
)
def test_files_are_named_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert names_of([Path(path) for path in paths]) == names


def test_throughput_is_that_of_the_report(write: Callable[..., RecordsFile]) -> None:
    """A reply that began in the warm-up and was cut off at the end was served in the window: 3 tokens in 20 s."""
    long = requests(1, seed=1)
    long = replace(
        long,
        send_nanos=np.array([0]),
        status=np.array([STATUSES.index("cancelled")]),
        errors=("cut off",),
        chunk_starts=np.array([0, 4]),
        chunk_nanos=np.array([1, 6, 7, 8]) * 1_000 * MS,
        chunk_tokens=np.ones(4, np.int64),
    )
    facts = stage_of(8)
    facts = replace(facts, stage=replace(facts.stage, warm_up_seconds=5.0))
    file = write("a", (facts, long))
    found = by_metric(compare([file, file]).stages[0].differences[0])
    assert found["output tokens/s"].first == 3 / SECONDS
