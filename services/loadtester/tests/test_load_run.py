"""Whole load tests: real workers, a real simulator, what is emitted and what is measured."""

import asyncio
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.domain.events import (
    LiveMetrics,
    Noted,
    RecordsCame,
    RunEvent,
    StageBegan,
    StageMeasured,
    TargetFound,
)
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import RecordBatch, joined
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    LoadSearch,
    LoadTestSpec,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
)
from llmpilot_loadtester.supervision.crew import worker_count_for, worker_count_of
from llmpilot_loadtester.supervision.load_run import LoadRun, RunOutcome
from llmpilot_loadtester.supervision.request_sources import SyntheticSource

LIMIT_SECONDS = 60
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "llm-pilot")
MODEL = "meta-llama/Llama-3.1-8B-simulated"
TTFT_MS, ITL_MS, OUTPUT_TOKENS = 20.0, 10.0, 6
REQUEST_MS = TTFT_MS + (OUTPUT_TOKENS - 1) * ITL_MS
MILLISECOND = 10**6


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a simulated LLM whose tokens leave at known times."""
    times = ("--fixed-ttft-ms", str(TTFT_MS), "--fixed-itl-ms", str(ITL_MS))
    address = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    command = [PROGRAM, "simulate", "serve", "--llm", "llama-3.1-8b", *times, *address]
    path = tmp_path_factory.mktemp("simulator") / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, path.read_text()
            found = re.search(r"OpenAI and TGI at (http://\S+),", line)
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)


def stage(load: Load, *, warm_up_seconds: float = 0.2, measure_seconds: float = 0.5) -> Stage:
    return Stage(load=load, warm_up_seconds=warm_up_seconds, measure_seconds=measure_seconds)


def users(count: int, *, request_count: int = 0) -> Load:
    steps = (UserStep(at_seconds=0.0, users_count=count),)
    return Load(kind=LoadKind.USERS, user_steps=steps, request_count=request_count)


def spec_of(url: str, *stages: Stage, worker_count: int = 0) -> LoadTestSpec:
    return LoadTestSpec(
        target=Target(url=url, request_timeout_seconds=10.0),
        requests=SyntheticRequests(input_tokens=20, output_tokens=OUTPUT_TOKENS),
        stages=stages,
        worker_count=worker_count,
    )


class Run:
    """A load test and what it emitted."""

    def __init__(
        self, spec: LoadTestSpec, *, done: tuple[StageResult, ...] = (), attempts: dict[int, int] | None = None
    ) -> None:
        self.events: list[RunEvent] = []
        self.outcome: RunOutcome | None = None
        asyncio.run(self._run(spec, done, attempts or {}))
        children = psutil.Process().children(recursive=True)
        assert not [child for child in children if "llmpilot_loadtester.engine.worker" in child.cmdline()]

    async def _run(self, spec: LoadTestSpec, done: tuple[StageResult, ...], attempts: dict[int, int]) -> None:
        requested = spec.requests
        assert isinstance(requested, SyntheticRequests)
        source = SyntheticSource(requested=requested, protocol=spec.target.protocol)
        run = LoadRun(spec, load_test_id="test", source=source, cpu_count=2)
        async with asyncio.timeout(LIMIT_SECONDS):
            self.outcome = await run.run(self._emit, stop=asyncio.Event(), done=done, attempts=attempts)

    async def _emit(self, event: RunEvent) -> None:
        self.events.append(event)

    @property
    def results(self) -> list[StageResult]:
        """Of all stages."""
        return [event.result for event in self.events if isinstance(event, StageMeasured)]

    def records(self, stage_index: int = 0) -> RecordBatch:
        """Of a stage, from its frames; times since its start."""
        began = next(
            event for event in self.events if isinstance(event, StageBegan) and event.stage_index == stage_index
        )
        frames = [event for event in self.events if isinstance(event, RecordsCame) and event.stage_index == stage_index]
        batches = [unpack_records(frame.columns) for frame in frames]
        assert [len(batch) for batch in batches] == [frame.request_count for frame in frames]
        return joined(batches).since(began.start_unix_nanos)


@pytest.fixture(scope="module")
def ladder(simulator: str) -> Run:
    """One user, then four users on two workers."""
    return Run(spec_of(simulator, stage(users(1)), stage(users(4)), worker_count=2))


def test_a_run_tells_what_it_found_then_stage_by_stage_what_came_and_what_it_makes(ladder: Run) -> None:
    order = [type(event) for event in ladder.events if not isinstance(event, LiveMetrics | RecordsCame)]
    assert order == [TargetFound, StageBegan, StageMeasured, StageBegan, StageMeasured]
    assert ladder.events[0] == TargetFound(served_model=MODEL, simulated=True)
    began = [event for event in ladder.events if isinstance(event, StageBegan)]
    assert [(event.stage_index, event.attempt, event.stage_count) for event in began] == [(0, 1, 2), (1, 1, 2)]
    position = 0
    for event in ladder.events:
        position += isinstance(event, StageBegan)
        if isinstance(event, RecordsCame | LiveMetrics):
            assert event.stage_index == position - 1


def test_the_records_of_all_workers_come_together_and_every_request_once(ladder: Run) -> None:
    records = ladder.records(1)
    assert len(set(records.request_index.tolist())) == len(records)
    assert set(records.user_index.tolist()) == {0, 1, 2, 3}
    assert set(records.output_tokens[records.is_ok].tolist()) == {OUTPUT_TOKENS}


def test_results_count_what_was_sent_in_the_window(ladder: Run) -> None:
    """Recounted from the frames; what was sent in the window has ended, what was sent later was cut off."""
    for result in ladder.results:
        records = ladder.records(result.stage_index)
        sent = (records.send_nanos >= 200 * MILLISECOND) & (records.send_nanos < 700 * MILLISECOND)
        assert result.metrics.request_count == int(sent.sum())
        assert result.metrics.ok_count == int((sent & records.is_ok).sum()) == int(sent.sum())
        assert np.all(records.send_nanos[~records.is_ok] >= 700 * MILLISECOND)


def test_latencies_are_those_of_the_server(ladder: Run) -> None:
    """The simulator writes at known times; a busy machine makes it late."""
    for result in ladder.results:
        ttft_ms, itl_ms = result.metrics.ttft.median_ms, result.metrics.itl.median_ms
        assert ttft_ms is not None
        assert itl_ms is not None
        assert TTFT_MS - 0.5 < ttft_ms < TTFT_MS + 5
        assert ITL_MS - 0.5 < itl_ms < ITL_MS + 2


def test_live_metrics_count_what_was_sent_and_ended(ladder: Run) -> None:
    live = [event for event in ladder.events if isinstance(event, LiveMetrics) and event.stage_index == 1]
    assert [event.phase for event in live] == sorted((event.phase for event in live), key=PHASES.index)
    assert live[0].elapsed_seconds >= 0
    assert max(event.users_count for event in live) == 4
    assert max(event.in_flight_count for event in live) <= 4
    sent = [event.sent_count for event in live]
    assert sent == sorted(sent)
    last = live[-1]
    assert 0 < last.ok_count <= last.sent_count
    assert last.error_count == 0
    assert last.tokens_per_second > 0
    assert last.itl_median_ms == pytest.approx(ITL_MS, abs=2)


PHASES = ["warm-up", "measuring", "cool-down"]


def test_a_run_goes_on_after_what_is_done(simulator: str, ladder: Run) -> None:
    """The first stage was measured by another run, the second was begun twice."""
    spec = spec_of(simulator, stage(users(1)), stage(users(2)))
    run = Run(spec, done=(ladder.results[0],), attempts={0: 1, 1: 2})
    began = [event for event in run.events if isinstance(event, StageBegan)]
    assert [(event.stage_index, event.attempt) for event in began] == [(1, 3)]
    assert [(result.stage_index, result.attempt) for result in run.results] == [(1, 3)]


def test_scheduled_requests_are_sent_when_they_are_due(simulator: str) -> None:
    """20 requests at 50/s: one every 20 ms from 0 on, from two workers; the stage ends with the last reply."""
    load = Load(kind=LoadKind.CONSTANT, rate_per_second=50, request_count=20)
    run = Run(spec_of(simulator, stage(load, warm_up_seconds=0, measure_seconds=30), worker_count=2))
    records = run.records()
    assert records.request_index.tolist() == list(range(20))
    assert records.scheduled_nanos.tolist() == [20 * MILLISECOND * index for index in range(20)]
    assert np.all(records.send_nanos >= records.scheduled_nanos)
    (result,) = run.results
    assert result.metrics.window_seconds == pytest.approx(int(records.end_nanos.max()) / 1e9, abs=1e-6)
    assert result.metrics.window_seconds == pytest.approx(0.38 + REQUEST_MS / 1e3, abs=0.2)


def test_all_at_once_ends_when_all_are_done(simulator: str) -> None:
    load = Load(kind=LoadKind.ALL_AT_ONCE, request_count=10)
    run = Run(spec_of(simulator, stage(load, warm_up_seconds=0, measure_seconds=30)))
    (result,) = run.results
    assert (result.metrics.request_count, result.metrics.ok_count) == (10, 10)
    assert result.metrics.window_seconds < 5


def test_users_stop_after_as_many_requests_as_asked(simulator: str) -> None:
    run = Run(spec_of(simulator, stage(users(3, request_count=7), warm_up_seconds=0, measure_seconds=30)))
    assert sorted(run.records().request_index.tolist()) == list(range(7))
    assert run.results[0].metrics.ok_count == 7


def test_a_search_gives_the_load_it_found(simulator: str) -> None:
    """Requests take 70 ms, which is within a second."""
    search = LoadSearch(kind=LoadKind.USERS, low=4, high=4, warm_up_seconds=0.1, measure_seconds=1.0, confidence=0.6)
    spec = replace(spec_of(simulator), search=search, service_level=ServiceLevel(end_to_end_ms=1000, share=0.5))
    run = Run(spec)
    assert run.outcome is not None
    assert run.outcome.found_load == 4
    assert "4 users" in run.outcome.sentence


def test_a_model_that_is_not_listed_is_noted(simulator: str) -> None:
    spec = spec_of(simulator, stage(users(1), warm_up_seconds=0))
    run = Run(replace(spec, target=replace(spec.target, served_model="other")))
    (note,) = [event for event in run.events if isinstance(event, Noted)]
    assert note.text == f"the server does not list 'other' among what it serves: {MODEL}"
    assert not run.results[0].verdict.is_valid


def test_a_server_that_is_down_is_told_before_anything_is_sent() -> None:
    with pytest.raises(PreconditionError, match=r"127\.0\.0\.1:9"):
        Run(spec_of("http://127.0.0.1:9", stage(users(1))))


@pytest.mark.parametrize(
    ("users_counts", "asked", "expected"), [([1], 0, 1), ([8], 0, 1), ([9], 0, 2), ([1, 128], 0, 4), ([1, 128], 7, 7)]
)
def test_there_are_as_many_workers_as_the_users_need_and_cpus_allow(
    users_counts: list[int], asked: int, expected: int
) -> None:
    assert worker_count_for([users(count) for count in users_counts], asked=asked, cpu_count=4) == expected


def test_a_schedule_takes_every_cpu() -> None:
    assert worker_count_for([Load(kind=LoadKind.POISSON, rate_per_second=1)], asked=0, cpu_count=4) == 4


def test_a_stage_with_few_users_leaves_workers_idle() -> None:
    assert worker_count_of(users(1), asked=0, present=4) == 1
    assert worker_count_of(users(17), asked=0, present=4) == 3
    assert worker_count_of(users(2), asked=4, present=4) == 2
    assert worker_count_of(Load(kind=LoadKind.CONSTANT, rate_per_second=1), asked=4, present=4) == 4
