"""What goes wrong in a load test: workers, server, generator, supervisor. Nothing hangs, nothing recorded is lost."""

import asyncio
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.events import LiveMetrics, RecordsCame, RunEvent, StageMeasured
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import joined
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    LoadTestSpec,
    Protocol,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
    WorkloadRequests,
)
from llmpilot_loadtester.supervision.load_run import LoadRun
from llmpilot_loadtester.supervision.request_sources import RequestSource, SourceRequest, SyntheticSource
from llmpilot_loadtester.supervision.stage_run import Limits
from llmpilot_loadtester.supervision.worker_process import WORKER_COMMAND
from llmpilot_loadtester.wire_requests import Patience, WorkloadSource
from llmpilot_servicekit.client import wait_until_serving

LIMIT_SECONDS = 60
STOP_SECONDS = 5
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "llm-pilot")
PROGRAMS = Path(__file__).parent / "programs"
LONG = Stage(
    load=Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=4),)),
    warm_up_seconds=0.0,
    measure_seconds=3600.0,
)
SHORT = replace(LONG, measure_seconds=0.5)
REQUESTS = SyntheticRequests(input_tokens=20, output_tokens=6)


@contextmanager
def running_simulator(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A simulated LLM whose replies take 70 ms, and its URL."""
    address = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    times = ("--fixed-ttft-ms", "20", "--fixed-itl-ms", "10")
    command = [PROGRAM, "simulate", "serve", "--llm", "llama-3.1-8b", *times, *address]
    path = folder / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, path.read_text()
            found = re.search(r"OpenAI and TGI at (http://\S+),", line)
        yield process, found[1]
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_simulator(tmp_path_factory.mktemp("simulator")) as (_, url):
        yield url


def kill_a_worker() -> None:
    workers_of()[0].kill()


def suspend_a_worker() -> None:
    workers_of()[0].suspend()


def workers_of(pid: int | None = None) -> list[psutil.Process]:
    """The worker processes that a process has, living or stopped."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return WORKER_COMMAND[-1] in process.cmdline()
    except psutil.NoSuchProcess:
        return False


Act = Callable[[], None]


class Trial:
    """A load test to which something happens as soon as a request has succeeded."""

    def __init__(
        self,
        url: str,
        *stages: Stage,
        source: RequestSource | None = None,
        limits: Limits | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
        worker_count: int = 1,
        target: Target | None = None,
    ) -> None:
        self.events: list[RunEvent] = []
        self.stop = asyncio.Event()
        self.happened_at = 0.0
        self._act: Act | None = None
        spec = LoadTestSpec(
            target=replace(target or Target(url=url), url=url, request_timeout_seconds=5.0),
            requests=REQUESTS,
            stages=stages,
            worker_count=worker_count,
        )
        self._run = LoadRun(
            spec,
            load_test_id="test",
            source=source or SyntheticSource(requested=REQUESTS, protocol=spec.target.protocol),
            cpu_count=2,
            limits=limits,
            worker_command=worker_command,
        )

    def go(self, act: Act | None = None, emit: Callable[[RunEvent], Awaitable[None]] | None = None) -> None:
        """Run it to its end; no worker is left."""
        self._act = act
        try:
            asyncio.run(self.run(emit))
        finally:
            assert not workers_of()

    async def run(
        self, emit: Callable[[RunEvent], Awaitable[None]] | None = None, done: Sequence[StageResult] = ()
    ) -> None:
        """Run it to its end."""
        async with asyncio.timeout(LIMIT_SECONDS):
            await self._run.run(emit or self._emit, stop=self.stop, done=done)

    async def _emit(self, event: RunEvent) -> None:
        self.events.append(event)
        if self._act and isinstance(event, LiveMetrics) and event.ok_count:
            self.happened_at = time.monotonic()
            act, self._act = self._act, None
            act()

    @property
    def results(self) -> list[StageResult]:
        """Of all stages."""
        return [event.result for event in self.events if isinstance(event, StageMeasured)]

    @property
    def record_count(self) -> int:
        """Of all frames."""
        return sum(event.request_count for event in self.events if isinstance(event, RecordsCame))

    @property
    def sent_count(self) -> int:
        """What the last live metrics say."""
        return max(event.sent_count for event in self.events if isinstance(event, LiveMetrics))


def test_a_worker_that_is_killed_spoils_its_stage_and_the_next_one_has_a_new_worker(simulator: str) -> None:
    trial = Trial(simulator, LONG, SHORT, worker_count=2)
    trial.go(kill_a_worker)
    spoilt, sound = trial.results
    assert not spoilt.verdict.is_valid
    assert re.match(r"A worker died: worker \d was killed by SIGKILL", spoilt.verdict.reasons[0])
    assert spoilt.metrics.ok_count > 0  # what was recorded is kept
    assert sound.metrics.ok_count > 0
    assert not [reason for reason in sound.verdict.reasons if "died" in reason]


def test_a_worker_that_hangs_is_killed_and_its_stage_does_not_count(simulator: str) -> None:
    trial = Trial(simulator, LONG, limits=Limits(silence_seconds=1.5), worker_count=2)
    trial.go(suspend_a_worker)
    (result,) = trial.results
    assert re.match(r"A worker died: worker \d said nothing for 1.5 s and was killed", result.verdict.reasons[0])
    assert result.metrics.ok_count > 0


def test_no_worker_is_left_when_the_supervisor_is_killed_in_the_middle(simulator: str) -> None:
    """Not even one that is stopped, which does not see that its pipe has ended."""
    command = [sys.executable, str(PROGRAMS / "doomed_load_run.py"), simulator]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "measuring\n"
        workers = workers_of(supervisor.pid)
        assert len(workers) == 2
        workers[0].suspend()
        supervisor.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=LIMIT_SECONDS)
    assert len(gone) + sum(worker.status() == psutil.STATUS_ZOMBIE for worker in alive) == 2


def test_a_run_that_is_told_to_stop_ends_soon_with_every_request_recorded(simulator: str) -> None:
    trial = Trial(simulator, LONG, SHORT, worker_count=2)
    trial.go(trial.stop.set)
    assert time.monotonic() - trial.happened_at < STOP_SECONDS
    assert not trial.results
    assert trial.record_count >= trial.sent_count > 0
    frames = [unpack_records(event.columns) for event in trial.events if isinstance(event, RecordsCame)]
    statuses = {STATUSES[code] for code in joined(frames).status.tolist()}
    assert statuses == {"ok", "cancelled"}


def test_a_run_can_be_stopped_while_the_server_does_not_even_say_what_it_serves() -> None:
    async def main() -> float:
        async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            trial.happened_at = time.monotonic()
            trial.stop.set()
            while await reader.read(1000):
                pass
            writer.close()

        async with asyncio.timeout(LIMIT_SECONDS), await asyncio.start_server(never_answer, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            trial = Trial(f"http://{host}:{port}", LONG)
            await trial.run()
        return time.monotonic() - trial.happened_at

    assert asyncio.run(main()) < STOP_SECONDS
    assert not workers_of()


def test_what_is_measured_already_needs_no_server(simulator: str) -> None:
    """A run that was interrupted when all that was left was to say how it ended."""
    first = Trial(simulator, SHORT)
    first.go()
    again = Trial("http://127.0.0.1:1", SHORT)
    asyncio.run(again.run(done=first.results))
    assert not again.events


def test_a_run_is_stopped_while_its_last_events_wait_for_nats(simulator: str) -> None:
    trial = Trial(simulator, SHORT)

    async def emit(event: RunEvent) -> None:
        if isinstance(event, StageMeasured):
            trial.happened_at = time.monotonic()
            trial.stop.set()
            await asyncio.Event().wait()

    trial.go(emit=emit)
    assert time.monotonic() - trial.happened_at < STOP_SECONDS


def test_a_run_that_is_cancelled_ends_its_workers_soon(simulator: str) -> None:
    trial = Trial(simulator, LONG)

    def cancel() -> None:
        for task in asyncio.all_tasks():
            if task.get_name() == "stages of test":
                task.cancel()

    with pytest.raises(asyncio.CancelledError):
        trial.go(cancel)
    assert time.monotonic() - trial.happened_at < STOP_SECONDS
    assert trial.record_count > 0


def test_a_server_that_goes_down_is_told_by_its_requests(tmp_path: Path) -> None:
    with running_simulator(tmp_path) as (process, url):
        trial = Trial(url, replace(LONG, measure_seconds=1.0))
        trial.go(process.kill)
    (result,) = trial.results
    assert result.metrics.ok_count > 0
    assert [error.status for error in result.metrics.errors] == ["disconnected"]


class Telltale(http.server.BaseHTTPRequestHandler):
    """Serves a model, and refuses every request with the headers that it came with."""

    def do_GET(self) -> None:
        """List a model."""
        self._answer(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        """Refuse."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(401, json.dumps({"error": {"message": f"who are you? {self.headers}"}}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_repeats_keys_does_not_bring_them_into_the_records() -> None:
    target = Target(url="", api_key="sk-secret", headers=(("x-team", "secret-2"),))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Telltale) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        trial = Trial(f"http://127.0.0.1:{server.server_port}", SHORT, target=target)
        trial.go()
        server.shutdown()
    (error,) = trial.results[0].metrics.errors
    assert "who are you? " in error.example
    assert "secret" not in repr(trial.events)
    frames = [unpack_records(event.columns) for event in trial.events if isinstance(event, RecordsCame)]
    assert not [text for frame in frames for text in frame.errors if "secret" in text]


def test_who_takes_events_slowly_gets_all_of_them(simulator: str) -> None:
    trial = Trial(simulator, SHORT)

    async def slowly(event: RunEvent) -> None:
        await asyncio.sleep(0.02)
        trial.events.append(event)

    trial.go(emit=slowly)
    (result,) = trial.results
    assert trial.record_count >= result.metrics.request_count > 0
    assert isinstance(trial.events[-1], StageMeasured)


def test_who_cannot_take_events_ends_the_run(simulator: str) -> None:
    trial = Trial(simulator, LONG)

    async def broken(event: RunEvent) -> None:
        if isinstance(event, RecordsCame):
            raise UnavailableError("the disk is full")

    with pytest.raises(UnavailableError, match="the disk is full"):
        trial.go(emit=broken)


class NoRequests:
    """A source that has none."""

    async def requests(self, stage_index: int, served_model: str) -> AsyncIterator[SourceRequest]:  # noqa: ARG002
        """Yield nothing."""
        none: tuple[SourceRequest, ...] = ()
        for request in none:
            yield request


def test_a_source_without_requests_ends_the_run(simulator: str) -> None:
    with pytest.raises(PreconditionError, match="no requests to send"):
        Trial(simulator, SHORT, source=NoRequests()).go()


def test_a_worker_that_does_not_start_says_why(simulator: str) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no locust here')")
    with pytest.raises(
        PreconditionError, match=r"worker \d ended with code 1; the last of what it wrote:\n  \| no locust"
    ):
        Trial(simulator, SHORT, worker_command=command).go()


@contextmanager
def running_generator(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`python -m llmpilot_workload_generator` and its address."""
    address_file, path = folder / "address.json", folder / "generator.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
    environment = inherited | {
        "LLMPILOT_LISTEN": "127.0.0.1:0",
        "LLMPILOT_ADDRESS_FILE": str(address_file),
        "LLMPILOT_NATS_URL": "nats://127.0.0.1:1",
    }
    with path.open("wb") as log:
        command = [sys.executable, "-m", "llmpilot_workload_generator"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not address_file.exists():
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        address = json.loads(address_file.read_text())["grpc"]
        wait_until_serving(address, LIMIT_SECONDS)
        yield process, address
    finally:
        process.kill()
        process.wait(LIMIT_SECONDS)


def test_a_generator_that_goes_away_for_good_ends_the_run_with_what_was_recorded(
    simulator: str, tmp_path: Path
) -> None:
    """40 users use up what was fetched ahead within seconds."""
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=40),))
    with running_generator(tmp_path) as (process, address):
        source = WorkloadSource(
            requested=WorkloadRequests(workload_model="conversation", conditions=("output_tokens <= 10",)),
            address=address,
            protocol=Protocol.OPENAI_COMPLETIONS,
            keeps_arrivals=False,
            patience=Patience(away_seconds=0.5),
        )
        trial = Trial(simulator, replace(LONG, load=load), source=source)
        with pytest.raises(UnavailableError, match="workload generator has not answered"):
            trial.go(process.kill)
    assert trial.record_count >= trial.sent_count > 0
