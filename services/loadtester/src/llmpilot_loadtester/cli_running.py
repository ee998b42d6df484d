"""What `llm-pilot loadtest run` does: asks the load tester for a load test, shows how it goes, writes what it measured.

Invariant: whatever ends the command, what was measured until then is in the files; the load test is cancelled with it.
"""

import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import click
import grpc
from prometheus_client import CollectorRegistry, start_http_server
from rich.console import Console

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.loadtest.v1.loadtest_pb2_grpc import LoadTestServiceStub
from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_loadtester.domain.events import LiveMetrics, RecordsCame
from llmpilot_loadtester.domain.load_test import LoadTest, LogEvent, State
from llmpilot_loadtester.domain.spec import LoadTestSpec, WorkloadRequests
from llmpilot_loadtester.domain.spec_checks import spec_violations
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_loadtester.outputs.live_view import live_view
from llmpilot_loadtester.outputs.records_file import read_records, write_records
from llmpilot_loadtester.outputs.report_files import write_reports
from llmpilot_loadtester.outputs.run_facts import facts_of_spec
from llmpilot_loadtester.outputs.summary import remarks, stage_table
from llmpilot_loadtester.outputs.watched_run import WatchedRun
from llmpilot_loadtester.wire_events import read_event
from llmpilot_loadtester.wire_spec import write_spec
from llmpilot_servicekit.address import split_address
from llmpilot_servicekit.client import connect
from llmpilot_servicekit.file_output import make_folder
from llmpilot_servicekit.platform import Platform

_DEADLINE_SECONDS = 30.0
_WATCH_SECONDS = 7 * 24 * 3600.0
_OUTAGE_SECONDS = 60.0
_DELAY_SECONDS = 0.2
_WIDTH_OFF_TERMINAL = 160
EXIT_NOT_VALID = 3
RECORDS_NAME = "records.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where a load test's numbers go."""

    name: str
    """Of the load test; empty: made up."""
    folder: Path | None
    """None: named as the load test."""
    formats: tuple[str, ...]
    prometheus: str | None
    """Where to serve live metrics."""


def run_load_test(platform: Platform, spec: LoadTestSpec, outputs: Outputs) -> None:
    """Run a load test to its end and write its files; leaves the process with its exit status if that is not 0."""
    if violations := spec_violations(spec):
        raise InvalidInputError(violations)
    if outputs.folder is not None:
        make_folder(outputs.folder)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH_OFF_TERMINAL)
    beside = ("workload-generator",) if isinstance(spec.requests, WorkloadRequests) else ()
    watched = WatchedRun()
    with platform.address_of("loadtester", beside=beside) as address, connect(address) as channel:
        stub = LoadTestServiceStub(channel)
        request = pb.CreateLoadTestRequest(
            spec=write_spec(spec), request_id=uuid.uuid4().hex, load_test_id=outputs.name
        )
        created = stub.CreateLoadTest(request, timeout=_DEADLINE_SECONDS).load_test
        with (
            _cancelled_by_ctrl_c(stub, created.name),
            _prometheus(outputs.prometheus, created.name) as observe,
            live_view(console) as show,
        ):
            for event in _events(stub, created.name):
                watched.take(event)
                observe(event)
                show(watched)
    _write_all(console, spec, watched, folder=outputs.folder or Path(_id_of(created.name)), formats=outputs.formats)


def _id_of(name: str) -> str:
    return name.rpartition("/")[2]


def _events(stub: LoadTestServiceStub, name: str) -> Iterator[LogEvent]:
    """Yield the events of a load test until it has ended; goes on where a stream broke off."""
    index = 0
    last_answer = time.monotonic()
    while True:
        stream = stub.WatchLoadTest(pb.WatchLoadTestRequest(name=name, start_index=index), timeout=_WATCH_SECONDS)
        try:
            for response in stream:
                last_answer = time.monotonic()
                index = response.event.index + 1
                event = read_event(response.event)
                if event is not None:
                    yield event
            return
        except grpc.RpcError as error:
            is_away = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
            if not is_away or time.monotonic() - last_answer > _OUTAGE_SECONDS:
                raise
            time.sleep(_DELAY_SECONDS)
        finally:
            stream.cancel()


@contextmanager
def _cancelled_by_ctrl_c(stub: LoadTestServiceStub, name: str) -> Iterator[None]:
    """Cancel the load test at the first Ctrl-C; the second one ends the command at once."""
    interrupted, ended = threading.Event(), threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()
        click.echo("cancelling, what was measured is kept; Ctrl-C again ends at once", err=True)

    def cancel() -> None:
        interrupted.wait()
        if not ended.is_set():
            stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=_DEADLINE_SECONDS)

    before = signal.signal(signal.SIGINT, note)
    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
        interrupted.set()
        canceller.join(_DEADLINE_SECONDS)


@contextmanager
def _prometheus(address: str | None, name: str) -> Iterator[Callable[[LogEvent], None]]:
    if address is None:
        yield lambda _: None
        return
    registry = CollectorRegistry()
    try:
        host, port = split_address(address)
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (ValueError, OSError) as error:
        raise PreconditionError(f"--prometheus: cannot listen on {address}: {error}") from error
    click.echo(f"live metrics at http://{host}:{server.server_port}/metrics", err=True)
    metrics = MetricsExport(registry)
    metrics.begin(_id_of(name))

    def observe(event: LogEvent) -> None:
        if isinstance(event, RecordsCame):
            metrics.see_records(_id_of(name), event)
        elif isinstance(event, LiveMetrics):
            metrics.see_live(_id_of(name), event)

    try:
        yield observe
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _write_all(
    console: Console, spec: LoadTestSpec, watched: WatchedRun, *, folder: Path, formats: tuple[str, ...]
) -> None:
    load_test = watched.load_test
    if load_test is None:
        raise PreconditionError("the load test ended without a word: look at the log of the load tester")
    results = watched.ordered_results
    if results:
        console.print(stage_table(results))
    for note in watched.notes:
        console.print(note, highlight=False, soft_wrap=True)
    _print_verdicts(console, watched)
    facts = facts_of_spec(
        spec,
        tool_version=version("llm-pilot-loadtester"),
        created_unix_nanos=int(load_test.create_time.timestamp() * 1e9),
        name=load_test.name,
        served_model=load_test.served_model,
        simulated=load_test.simulated,
    )
    stages = list(watched.stages(llm=spec.llm_name, gpu_profile=spec.gpu_profile))
    if stages:
        make_folder(folder)
        write_records(folder / RECORDS_NAME, facts, stages)
        paths = [folder / RECORDS_NAME]
        if results:
            paths += write_reports(read_records(folder / RECORDS_NAME), folder, formats)
        console.print(f"written to {folder}: {', '.join(path.name for path in paths)}", highlight=False, soft_wrap=True)
    _exit(load_test, watched)


def _print_verdicts(console: Console, watched: WatchedRun) -> None:
    if watched.load_test is not None and watched.load_test.simulated:
        console.print("The server says of itself that it is a simulator: these are simulated numbers.")
    for remark in remarks(watched.ordered_results):
        console.print(remark, soft_wrap=True)
    if watched.ordered_results and all(result.verdict.is_valid for result in watched.ordered_results):
        console.print("numbers valid")


def _exit(load_test: LoadTest, watched: WatchedRun) -> None:
    if load_test.state is State.FAILED:
        raise PreconditionError(load_test.error)
    if load_test.state is State.CANCELLED:
        raise PreconditionError("the load test was cancelled; the files have what was measured until then")
    if not all(result.verdict.is_valid for result in watched.ordered_results):
        sys.exit(EXIT_NOT_VALID)
