"""Load tests of one process against a real nats-server, with runs that do as the test says instead of sending."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nats
import pytest
from prometheus_client import CollectorRegistry

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot_contracts.job import State
from llmpilot_contracts.subjects import LOAD_TEST_SPECS, STREAMS
from llmpilot_loadtester.conduct import Emit, Order, Surroundings
from llmpilot_loadtester.domain.events import Noted, StageMeasured
from llmpilot_loadtester.domain.load_test import LoadTest
from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import empty_records
from llmpilot_loadtester.domain.results import StageResult, Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, LoadTestSpec, Stage, SyntheticRequests, Target, UserStep
from llmpilot_loadtester.domain.stage_plan import plan_of
from llmpilot_loadtester.domain.window import window_of
from llmpilot_loadtester.load_test_log import load_test_log, read_history
from llmpilot_loadtester.load_test_states import LoadTestStates, load_test_states
from llmpilot_loadtester.load_tests import LoadTests, load_tests_of
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_loadtester.supervision.load_run import RunOutcome
from llmpilot_loadtester.wire import LARGEST_SHOWN_SPEC_BYTES, write_load_test
from llmpilot_loadtester.wire_spec import write_spec
from llmpilot_servicekit.jobs.conduct import JobKeeping
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.nats_server import start_nats_server

LIMIT_SECONDS = 30
GRPC_MESSAGE_BYTES = 4 * 1024 * 1024
"""What a client of gRPC takes unless it is told otherwise."""
STAGE = Stage(
    load=Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=1),)),
    warm_up_seconds=0.0,
    measure_seconds=1.0,
)
SPEC = LoadTestSpec(
    target=Target(url="http://host:1"),
    requests=SyntheticRequests(input_tokens=1, output_tokens=1),
    stages=(STAGE, STAGE),
)
Then = Callable[[Emit, asyncio.Event], Awaitable[None]]
METRICS = stage_metrics(empty_records(), window_of(STAGE), SPEC.service_level, seed=0)


@pytest.fixture
def nats_server_url(tmp_path: Path) -> Iterator[str]:
    """A nats-server that no other test uses."""
    with start_nats_server(tmp_path / "nats") as server:
        yield server.url


def load_test(load_test_id: str, spec: LoadTestSpec = SPEC) -> LoadTest:
    return LoadTest(id=load_test_id, spec=spec, request_id=load_test_id, create_time=datetime.now(UTC))


def measured(index: int) -> StageMeasured:
    result = StageResult(
        stage_index=index,
        attempt=1,
        stage=STAGE,
        start_unix_nanos=1,
        metrics=METRICS,
        verdict=Verdict(is_valid=True),
    )
    return StageMeasured(result=result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripted:
    """A run that emits the results of the stages that are not done, and then does as it is told."""

    then: Then

    async def run(
        self, emit: Emit, *, done: Sequence[StageResult], attempts: Mapping[int, int], stop: asyncio.Event
    ) -> RunOutcome:
        """Emit."""
        assert not attempts
        for index in range(len(done), len(SPEC.stages)):
            await emit(measured(index))
        await self.then(emit, stop)
        return RunOutcome()


async def at_once(_emit: Emit, _stop: asyncio.Event) -> None:
    """End."""


@dataclass(slots=True, kw_only=True)
class Installation:
    """Load tests of this process, and where they are kept."""

    nats: NatsConnection
    states: LoadTestStates
    specs: NatsObjects
    then: Then = at_once
    measures: bool = False
    broken: set[str] = field(default_factory=set)
    """Load tests that end with a bug of the program."""

    def load_tests(self) -> LoadTests:
        """Return what runs them."""
        around = Surroundings(
            keeping=JobKeeping(nats=self.nats, states=self.states, specs=self.specs, renew_seconds=0.2),
            read_order=self._read_order,
            metrics=MetricsExport(CollectorRegistry()),
        )
        return load_tests_of(around, max_count=4, take_over_seconds=60)

    def _read_order(self, load_test_id: str, content: bytes) -> Order:
        assert content == b"spec"
        if load_test_id in self.broken:
            raise ZeroDivisionError
        return Order(run=Scripted(then=self.then), write_measurement=_measurement if self.measures else None)

    async def ended(self, load_test_id: str) -> LoadTest:
        """Wait until a load test has ended."""
        await self.states.wait_ended(load_test_id)
        found = (await self.states.get(load_test_id)).job
        assert found.state.is_end
        return found

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(LIMIT_SECONDS):
            while not await condition():  # noqa: ASYNC110 NATS tells nobody
                await asyncio.sleep(0.01)


def _measurement(_result: StageResult, event_id: str, _simulated: bool) -> MeasurementRecorded:
    return MeasurementRecorded(event_id=event_id)


@asynccontextmanager
async def installation(url: str) -> AsyncIterator[Installation]:
    connection = NatsConnection(url, streams=STREAMS)
    async with asyncio.timeout(LIMIT_SECONDS), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(connection.run())
        try:
            await connection.wait_connected(20)
            yield Installation(
                nats=connection, states=load_test_states(connection), specs=NatsObjects(connection, LOAD_TEST_SPECS)
            )
        finally:
            running.cancel()


@asynccontextmanager
async def running(load_tests: LoadTests) -> AsyncIterator[LoadTests]:
    async with asyncio.TaskGroup() as tasks:
        working = [tasks.create_task(load_tests.follow()), tasks.create_task(load_tests.run())]
        try:
            yield load_tests
        finally:
            for task in working:
                task.cancel()


def test_a_load_test_that_meets_a_bug_does_not_end_the_others(nats_server_url: str) -> None:
    async def check() -> None:
        async with installation(nats_server_url) as here:
            here.broken = {"broken"}
            async with running(here.load_tests()) as load_tests:
                for load_test_id in ("broken", "sound"):
                    await load_tests.create(load_test(load_test_id), b"spec")
                assert (await here.ended("sound")).state is State.SUCCEEDED
                await load_tests.create(load_test("later"), b"spec")
                assert (await here.ended("later")).state is State.SUCCEEDED
            assert not (await here.states.get("broken")).job.state.is_end  # another process may be able to

    asyncio.run(check())


def test_a_writer_that_loses_its_log_while_it_publishes_measurements_lets_go_alone(nats_server_url: str) -> None:
    """Measurements are told to the log beside the run; who loses it reads it again and goes on after what it has."""
    begun, is_taken = asyncio.Event(), asyncio.Event()

    async def measure_on(emit: Emit, stop: asyncio.Event) -> None:
        begun.set()
        await is_taken.wait()
        for index in range(2, 12):
            await emit(measured(index))
        await stop.wait()

    async def check() -> None:
        async with installation(nats_server_url) as here:
            here.then, here.measures = measure_on, True
            async with running(here.load_tests()) as load_tests:
                await load_tests.create(load_test("lost"), b"spec")
                await begun.wait()
                await here.until(lambda: _has_published(here, "lost", {0, 1}))
                await _write_too(here, "lost")
                here.then = at_once
                is_taken.set()
                ended = await here.ended("lost")
            assert (ended.state, [result.stage_index for result in ended.results]) == (State.SUCCEEDED, [0, 1])

    asyncio.run(check())


async def _has_published(here: Installation, load_test_id: str, stages: set[int]) -> bool:
    return (await read_history(here.nats, load_test_id)).published == stages


async def _write_too(here: Installation, load_test_id: str) -> None:
    """Write the next event as another process would."""
    history = await read_history(here.nats, load_test_id)
    log = load_test_log(here.nats, load_test_id, next_index=history.next_index, last_sequence=history.last_sequence)
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(log.run())
        await log.append(Noted(text="mine"))
        await log.flush()
        writing.cancel()


def test_measured_stages_that_only_lack_their_end_are_not_measured_again(nats_server_url: str) -> None:
    """Interrupted when everything was measured: whoever goes on runs no stage."""
    begun = asyncio.Event()

    async def wait_for_the_stop(_emit: Emit, stop: asyncio.Event) -> None:
        begun.set()
        await stop.wait()

    async def check() -> None:
        async with installation(nats_server_url) as here:
            here.then = wait_for_the_stop
            async with running(here.load_tests()) as load_tests:
                await load_tests.create(load_test("late"), b"spec")
                await begun.wait()
                await load_tests.finish()
            left = (await here.states.get("late")).job
            assert (left.state, left.owner, len(left.results)) == (State.RUNNING, "", 2)
            assert plan_of(SPEC).next_stage(left.results) is None
            here.then = at_once
            async with running(here.load_tests()):
                ended = await here.ended("late")
            assert ended.results == left.results
            assert ended.state is State.SUCCEEDED

    asyncio.run(check())


def test_an_end_that_its_owner_could_not_tell_any_more_is_told_with_its_time(nats_server_url: str) -> None:
    """The log says it; the process died before the snapshot did."""

    async def check() -> None:
        async with installation(nats_server_url) as here:
            async with running(here.load_tests()) as load_tests:
                await load_tests.create(load_test("told"), b"spec")
                ended = await here.ended("told")
            stored = await here.states.get("told")
            before = replace(ended, state=State.RUNNING, owner="dead", end_time=None)
            await here.states.put(replace(before, owner=""), after_sequence=stored.sequence)
            async with running(here.load_tests()):
                assert await here.ended("told") == ended

    asyncio.run(check())


def test_what_is_left_of_a_specification_that_was_not_written_to_its_end_is_removed(nats_server_url: str) -> None:
    """It has keys: part of it was written, and then the process was killed."""

    async def check() -> None:
        async with installation(nats_server_url) as here:
            assert await here.specs.create("whole", b"spec")
            client = await nats.connect(nats_server_url)
            await client.jetstream().publish("$O.LOAD_TEST_SPECS.C.part", b"sk-secret")

            async def is_removed() -> bool:
                info = await client.jetstream().stream_info("OBJ_LOAD_TEST_SPECS", subjects_filter="$O.*.C.part")
                return not info.state.subjects

            assert not await is_removed()
            async with asyncio.TaskGroup() as tasks:
                removing = tasks.create_task(here.load_tests().remove_leftovers(every=timedelta(milliseconds=10)))
                await here.until(is_removed)
                removing.cancel()
            await client.close()

    asyncio.run(check())


def test_a_page_of_large_load_tests_fits_into_a_message(nats_server_url: str) -> None:
    steps = tuple(UserStep(at_seconds=float(second), users_count=1 + second % 2) for second in range(2_000))
    spec = replace(SPEC, stages=(replace(STAGE, load=replace(STAGE.load, user_steps=steps)),))
    assert LARGEST_SHOWN_SPEC_BYTES // 2 < write_spec(spec).ByteSize() < LARGEST_SHOWN_SPEC_BYTES
    ids = [f"large-{number:03}" for number in range(200)]

    async def check() -> None:
        async with installation(nats_server_url) as here:
            await asyncio.gather(*(here.states.put(load_test(each, spec), after_sequence=0) for each in ids))
            found: list[str] = []
            after = ""
            while len(found) < len(ids):
                page = await here.states.page(after=after, count=1_000)
                answer = pb.ListLoadTestsResponse(load_tests=map(write_load_test, page.jobs))
                assert answer.ByteSize() < GRPC_MESSAGE_BYTES
                found += [each.id for each in page.jobs]
                after = page.next_after
            assert (found, after) == (ids, "")

    asyncio.run(check())
