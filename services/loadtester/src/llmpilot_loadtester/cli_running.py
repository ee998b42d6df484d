"""What `llm-pilot loadtest run` does: asks the load tester for a load test, shows how it goes, writes what it measured.

Invariant: whatever ends the command, what was measured until then is in the files; the load test is cancelled with it.
"""

import secrets
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_contracts.job import State
from llmpilot_loadtester.cli_request import error_in_options, in_options, requested_spec
from llmpilot_loadtester.domain.events import LiveMetrics, RecordsCame
from llmpilot_loadtester.domain.load_test import COLLECTION, LogEvent
from llmpilot_loadtester.domain.spec import LoadTestSpec
from llmpilot_loadtester.domain.spec_checks import spec_violations
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_loadtester.outputs.live_view import live_view
from llmpilot_loadtester.outputs.records_file import read_records, write_records
from llmpilot_loadtester.outputs.report_files import write_reports
from llmpilot_loadtester.outputs.run_facts import facts_of_spec
from llmpilot_loadtester.outputs.summary import remarks, stage_table
from llmpilot_loadtester.outputs.watched_run import WatchedRun
from llmpilot_loadtester.wire_events import read_event
from llmpilot_servicekit.address import split_address
from llmpilot_servicekit.client import connect
from llmpilot_servicekit.file_output import make_folder
from llmpilot_servicekit.jobs.job_requests import JOB_ID
from llmpilot_servicekit.platform import Platform

_DEADLINE_SECONDS = 30.0
_CANCEL_SECONDS = 5.0
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


def run_load_test(platform: Platform, spec: LoadTestSpec, outputs: Outputs, *, llm_config_json: str) -> None:
    """Run a load test to its end and write its files; leaves the process with its exit status if that is not 0."""
    violations = spec_violations(spec)
    if outputs.name and not JOB_ID.fullmatch(outputs.name):
        violations.append(Violation("--name", "must be 1 to 63 lower-case letters, digits, dashes between them"))
    if violations:
        raise error_in_options(InvalidInputError(violations))
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH_OFF_TERMINAL)
    load_test_id = outputs.name or f"lt-{secrets.token_hex(8)}"
    request = pb.CreateLoadTestRequest(
        spec=requested_spec(spec, llm_config_json=llm_config_json),
        request_id=uuid.uuid4().hex,
        load_test_id=load_test_id,
    )
    watched = WatchedRun()
    with _folder(outputs.folder or Path(load_test_id)) as folder:
        try:
            with _prometheus(outputs.prometheus, load_test_id) as observe:
                _watch(platform, request, watched, console, observe)
        except InvalidInputError as error:
            raise error_in_options(error) from error
        except BaseException:
            if path := _write_records(folder, spec, watched):
                click.echo(f"what was measured is in {path}", err=True)
            raise
        records = _write_records(folder, spec, watched)
        _tell(console, watched)
        if records:
            reports = write_reports(read_records(records), folder, outputs.formats) if watched.results else []
            names = ", ".join(path.name for path in (records, *reports))
            console.print(f"written to {folder}: {names}", highlight=False, markup=False, soft_wrap=True)
    _exit(watched)


def _watch(
    platform: Platform,
    request: pb.CreateLoadTestRequest,
    watched: WatchedRun,
    console: Console,
    observe: Callable[[LogEvent], None],
) -> None:
    """Begin a load test, and take and show its events until it has ended."""
    beside = ("workload-generator",) if request.spec.HasField("workload") else ()
    with platform.address_of("loadtester", beside=beside) as address, connect(address) as channel:
        stub = LoadTestServiceStub(channel)
        name = f"{COLLECTION}{request.load_test_id}"
        _create(stub, request)
        with _cancelled_with_the_command(stub, name), live_view(console) as show:
            for event in _events(stub, name):
                watched.take(event)
                observe(event)
                show(watched)


def _create(stub: LoadTestServiceStub, request: pb.CreateLoadTestRequest) -> None:
    try:
        stub.CreateLoadTest(request, timeout=_DEADLINE_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            raise PreconditionError(in_options(error.details() or "")) from error
        raise


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Give a folder, made before anything is measured; one that nothing came into does not stay."""
    is_new = not path.exists()
    make_folder(path)
    try:
        yield path
    finally:
        if is_new:
            with suppress(OSError):  # something is in it
                path.rmdir()


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
def _cancelled_with_the_command(stub: LoadTestServiceStub, name: str) -> Iterator[None]:
    """Cancel the load test at the first Ctrl-C or SIGTERM; the second one ends the command at once, as errors do."""
    interrupted, ended = threading.Event(), threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()
        click.echo("cancelling, what was measured is kept; Ctrl-C again ends at once", err=True)

    def cancel() -> None:
        with suppress(grpc.RpcError):  # who watches hears of it
            stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=_CANCEL_SECONDS)

    def wait() -> None:
        interrupted.wait()
        if not ended.is_set():
            cancel()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    canceller = threading.Thread(target=wait, daemon=True)
    canceller.start()
    try:
        yield
    except BaseException:
        cancel()
        raise
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        interrupted.set()
        canceller.join()


@contextmanager
def _prometheus(address: str | None, load_test_id: str) -> Iterator[Callable[[LogEvent], None]]:
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
    metrics.begin(load_test_id)

    def observe(event: LogEvent) -> None:
        if isinstance(event, RecordsCame):
            metrics.see_records(load_test_id, event)
        elif isinstance(event, LiveMetrics):
            metrics.see_live(load_test_id, event)

    try:
        yield observe
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _write_records(folder: Path, spec: LoadTestSpec, watched: WatchedRun) -> Path | None:
    """Write what came, and return where it is; None: nothing came. Where it cannot be there, it is elsewhere."""
    load_test = watched.load_test
    stages = list(watched.stages(llm=spec.llm_name, gpu_profile=spec.gpu_profile))
    if load_test is None or not stages:
        return None
    facts = facts_of_spec(
        spec,
        tool_version=version("llm-pilot-loadtester"),
        created_unix_nanos=int(load_test.create_time.timestamp() * 1e9),
        name=load_test.name,
        served_model=load_test.served_model,
        simulated=load_test.simulated,
    )
    path = folder / RECORDS_NAME
    try:
        write_records(path, facts, stages)
    except PreconditionError as error:
        rescued = Path(tempfile.mkdtemp(prefix="llm-pilot-")) / RECORDS_NAME
        write_records(rescued, facts, stages)
        message = f"{error}; the records are in {rescued}: `llm-pilot loadtest report` makes every file of them"
        raise PreconditionError(message) from error
    return path


def _tell(console: Console, watched: WatchedRun) -> None:
    results = watched.ordered_results
    if results:
        console.print(stage_table(results))
    for note in watched.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if watched.load_test is not None and watched.load_test.simulated:
        console.print("The server says of itself that it is a simulator: these are simulated numbers.")
    for remark in remarks(results):
        console.print(remark, soft_wrap=True)
    if results and all(result.verdict.is_valid for result in results):
        console.print("numbers valid")


def _exit(watched: WatchedRun) -> None:
    load_test = watched.load_test
    if load_test is None:
        raise PreconditionError("the load test ended without a word: look at the log of the load tester")
    if load_test.state is State.FAILED:
        raise PreconditionError(in_options(load_test.error))
    if load_test.state is State.CANCELLED:
        raise PreconditionError("the load test was cancelled; the files have what was measured until then")
    if not all(result.verdict.is_valid for result in watched.ordered_results):
        sys.exit(EXIT_NOT_VALID)
