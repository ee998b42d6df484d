"""Tunings of one process against a real nats-server, with runs that do as the test says instead of probing."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import nats
import pytest

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.job import State
from llmpilot_contracts.subjects import STREAMS, TUNING_SPECS
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_servicekit.jobs.conduct import JobKeeping
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server
from llmpilot_servicekit.patience import patiently
from llmpilot_tuner.conduct import Surroundings, event_id_of
from llmpilot_tuner.domain.cache_key import cache_key
from llmpilot_tuner.domain.events import CaseRan, Note, ProbeEnded, ProbeStarted, RunEvent, TuningEnded, TuningStarted
from llmpilot_tuner.domain.probe_json import KeptProbe
from llmpilot_tuner.domain.probing import CaseRun, Outcome, Probe, ProbeError, ProbeFacts, ProbeKind
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.domain.tuning import Tuning
from llmpilot_tuner.outputs.report import read_report, report_json
from llmpilot_tuner.result_cache import ResultCache
from llmpilot_tuner.tuning_log import History, read_history, tuning_log
from llmpilot_tuner.tuning_states import TuningStates, tuning_states
from llmpilot_tuner.tunings import Tunings, tunings_of
from llmpilot_tuner.wire_spec import write_spec

LIMIT_SECONDS = 30
GIB = 2**30
SPEC = TuningSpec(
    config_json=bundled_config("llama-3.1-8b"),
    llm_name="meta-llama/Llama-3.1-8B",
    gpu_memory_bytes=40 * GIB,
    reserved_bytes=GIB,
    longest_sequence=1024,
    most_new_tokens=512,
    most_requests=64,
)
FACTS = ProbeFacts(kind=ProbeKind.CPU, device="cpu", capacity_bytes=39 * GIB, weight_bytes=16 * 10**9)
KEY = cache_key(SPEC, FACTS)
BATCH = Batch(case="decode", decode=(Rows(request_count=1, input_tokens=10, output_tokens=1),), pool_tokens=11)
WEIGHTS = (4096, 8192, 6144)
Hold = Callable[[int], Awaitable[None]]
StartNats = Callable[..., NatsServer]


def probe_of(weight: int) -> Probe:
    """6,144 is the largest weight that passes."""
    outcome = Outcome.PASSED if weight <= 6144 else Outcome.OUT_OF_MEMORY
    return Probe(weight=weight, runs=(CaseRun(batch=BATCH, outcome=outcome, peak_bytes=weight),))


def result_of(probes: Sequence[Probe]) -> TuningResult:
    return TuningResult(
        max_batch_weight=6144,
        limit="memory",
        facts=FACTS,
        probes=tuple(probes),
        plain_probe_count=14,
        headroom=(),
        soak=None,
        margin_weight=0,
        curve=(),
        half_sequence_weight=None,
        predicted_weight=6000,
        elapsed_seconds=1.0,
    )


async def at_once(_weight: int) -> None:
    """Wait for nothing."""


@dataclass(slots=True, kw_only=True)
class Scripted:
    """A run that probes three weights, but for those that are kept; `hold` is awaited before each probe ends."""

    kept: Sequence[Probe]
    hold: Hold
    facts: ProbeFacts
    closed: list[bool]

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        """Probe."""
        probes = list(self.kept)
        try:
            yield TuningStarted(facts=self.facts, lowest_weight=1024, highest_weight=65536, predicted_weight=6000)
            for weight in WEIGHTS:
                if weight in {probe.weight for probe in self.kept}:
                    continue
                yield ProbeStarted(weight=weight, case_count=1, why="bisection")
                await self.hold(weight)
                probe = probe_of(weight)
                yield CaseRan(weight=weight, run=probe.runs[0])
                yield ProbeEnded(probe=probe)
                probes.append(probe)
            yield TuningEnded(result=result_of(probes))
        finally:
            self.closed.append(True)


@dataclass(slots=True, kw_only=True)
class Installation:
    """Tunings of this process, and where they are kept."""

    nats: NatsConnection
    states: TuningStates
    specs: NatsObjects
    cache: ResultCache
    hold: Hold = at_once
    broken: bool = False
    facts: ProbeFacts = FACTS
    started: list[tuple[int, ...]] = field(default_factory=list)
    """The weights of the probes that each run was started with."""
    closed: list[bool] = field(default_factory=list)

    def tunings(self) -> Tunings:
        """Return what runs them."""
        keeping = JobKeeping(nats=self.nats, states=self.states, specs=self.specs, renew_seconds=0.2)
        around = Surroundings(keeping=keeping, cache=self.cache, start_run=self._start_run)
        return tunings_of(around, max_count=1, take_over_seconds=60)

    def _start_run(self, spec: TuningSpec, kept: Sequence[Probe]) -> Scripted:
        assert spec == SPEC
        self.started.append(tuple(probe.weight for probe in kept))
        if self.broken:
            raise ZeroDivisionError
        return Scripted(kept=kept, hold=self.hold, facts=self.facts, closed=self.closed)

    async def create(self, tunings: Tunings, tuning_id: str) -> None:
        """Have a tuning made."""
        await tunings.create(tuning(tuning_id), write_spec(SPEC).SerializeToString())

    async def ended(self, tuning_id: str) -> Tuning:
        """Wait until a tuning has ended."""
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                found = (await patiently(partial(self.states.get, tuning_id))).job
                if found.state.is_end:
                    return found
                await asyncio.sleep(0.01)

    async def until_kept(self, tuning_id: str, *weights: int) -> History:
        """Wait until the log has these probes."""
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                history = await read_history(self.nats, tuning_id)
                if tuple(kept.probe.weight for kept in history.probes) == weights:
                    return history
                await asyncio.sleep(0.01)


def tuning(tuning_id: str) -> Tuning:
    return Tuning(id=tuning_id, spec=SPEC, request_id=tuning_id, create_time=datetime.now(UTC))


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[StartNats]:
    """Starts real nats-servers on one store."""
    started: list[NatsServer] = []

    def start(port: int | None = None) -> NatsServer:
        started.append(start_nats_server(tmp_path / "nats", port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@asynccontextmanager
async def installation(url: str) -> AsyncIterator[Installation]:
    connection = NatsConnection(url, streams=STREAMS)
    async with asyncio.timeout(LIMIT_SECONDS), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(connection.run())
        try:
            await connection.wait_connected(20)
            yield Installation(
                nats=connection,
                states=tuning_states(connection),
                specs=NatsObjects(connection, TUNING_SPECS),
                cache=ResultCache(connection),
            )
        finally:
            running.cancel()


@asynccontextmanager
async def running(tunings: Tunings) -> AsyncIterator[Tunings]:
    async with asyncio.TaskGroup() as tasks:
        working = [tasks.create_task(tunings.follow()), tasks.create_task(tunings.run())]
        try:
            yield tunings
        finally:
            for task in working:
                task.cancel()


def holding(weight: int, begun: asyncio.Event, go_on: asyncio.Event | None = None) -> Hold:
    """Return what lets a run wait within the probe of a weight, for ever where nothing lets it go on."""

    async def hold(probed: int) -> None:
        if probed == weight:
            begun.set()
            await (go_on or asyncio.Event()).wait()

    return hold


async def published(url: str) -> list[pb.TuningCompleted]:
    client = await nats.connect(url)
    info = await client.jetstream().stream_info("TUNING_RESULTS")
    subscription = await client.jetstream().subscribe("llmpilot.tuning.v1.completed", ordered_consumer=True)
    events = [
        pb.TuningCompleted.FromString((await subscription.next_msg(timeout=10)).data)
        for _ in range(info.state.messages)
    ]
    await client.close()
    return events


def test_a_tuning_that_is_interrupted_goes_on_from_its_probes(start_nats: StartNats) -> None:
    """The run is closed before the tuning is left, so that the next process has the GPU to itself."""

    async def check() -> None:
        begun = asyncio.Event()
        async with installation(start_nats().url) as here:
            here.hold = holding(8192, begun)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "left")
                await begun.wait()
                await tunings.finish()
            left = (await here.states.get("left")).job
            assert (left.state, left.owner, left.probe_count) == (State.RUNNING, "", 1)
            assert here.closed == [True]
            here.hold = at_once
            async with running(here.tunings()):
                ended = await here.ended("left")
        assert here.started == [(), (4096,)]
        assert (ended.state, ended.max_batch_weight, ended.probe_count) == (State.SUCCEEDED, 6144, 3)
        assert [probe.weight for probe in read_report(ended.report_json).probes] == [4096, 8192, 6144]

    asyncio.run(check())


def test_probes_of_another_machine_do_not_count(start_nats: StartNats) -> None:
    """Whoever takes over with another GPU probes the same weights again."""

    async def check() -> None:
        begun = asyncio.Event()
        async with installation(start_nats().url) as here:
            here.hold = holding(8192, begun)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "moved")
                await begun.wait()
                await tunings.finish()
            here.hold, here.facts = at_once, replace(FACTS, device="another")
            async with running(here.tunings()):
                ended = await here.ended("moved")
            history = await read_history(here.nats, "moved")
        assert here.started == [(), (4096,), ()]
        assert here.closed == [True, True, True]
        assert (ended.state, ended.probe_count) == (State.SUCCEEDED, 3)
        assert [kept.probe.weight for kept in history.probes] == [4096, 4096, 8192, 6144]

    asyncio.run(check())


def test_a_tuning_that_is_cancelled_closes_its_run_and_keeps_its_probes(start_nats: StartNats) -> None:
    async def check() -> None:
        begun = asyncio.Event()
        async with installation(start_nats().url) as here:
            here.hold = holding(6144, begun)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "unwanted")
                await begun.wait()
                await tunings.cancel("unwanted")
                ended = await here.ended("unwanted")
            history = await read_history(here.nats, "unwanted")
        assert here.closed == [True]
        assert (ended.state, ended.probe_count, ended.max_batch_weight) == (State.CANCELLED, 2, None)
        assert [kept.probe.weight for kept in history.probes] == [4096, 8192]

    asyncio.run(check())


def test_a_weight_found_while_nats_is_away_is_told_when_it_is_back(start_nats: StartNats) -> None:
    async def check() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        server = start_nats()
        port = int(server.url.rpartition(":")[2])
        async with installation(server.url) as here:
            here.hold = holding(4096, begun, go_on)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "found")
                await begun.wait()
                server.kill()
                go_on.set()
                while not here.closed:  # noqa: ASYNC110 the run ends without NATS
                    await asyncio.sleep(0.01)
                server = await asyncio.to_thread(start_nats, port)
                await here.nats.wait_connected(20)
                ended = await here.ended("found")
        assert (ended.state, ended.max_batch_weight) == (State.SUCCEEDED, 6144)
        events = await published(server.url)
        assert [(event.event_id, event.tuning.max_batch_weight) for event in events] == [(event_id_of("found"), 6144)]
        assert here.started == [()]

    asyncio.run(check())


def test_a_writer_that_loses_its_log_lets_go_and_publishes_nothing_of_its_own(start_nats: StartNats) -> None:
    """Another process wrote the next event; who goes on has that probe too, and one event tells the weight."""

    async def check() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        server = start_nats()
        async with installation(server.url) as here:
            here.hold = holding(8192, begun, go_on)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "lost")
                await begun.wait()
                history = await here.until_kept("lost", 4096)
                log = tuning_log(here.nats, "lost", history)
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(log.run())
                    await log.append(KeptProbe(key=cache_key(SPEC, FACTS), probe=probe_of(8192)))
                    await log.flush()
                    writing.cancel()
                go_on.set()
                ended = await here.ended("lost")
        assert (ended.state, ended.max_batch_weight) == (State.SUCCEEDED, 6144)
        assert here.started == [(), (4096, 8192)]
        assert len(await published(server.url)) == 1

    asyncio.run(check())


def test_a_probe_that_fails_ends_the_tuning_with_its_log_and_not_those_after_it(start_nats: StartNats) -> None:
    async def fail(_weight: int) -> None:
        raise ProbeError("the worker ended with signal 9", log="CUDA error: device-side assert triggered")

    async def check() -> None:
        async with installation(start_nats().url) as here:
            here.hold = fail
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "failed")
                failed = await here.ended("failed")
                here.hold = at_once
                await here.create(tunings, "later")
                assert (await here.ended("later")).state is State.SUCCEEDED
        assert failed.state is State.FAILED
        assert "signal 9" in failed.error
        assert "device-side assert" in failed.error
        assert failed.max_batch_weight is None

    asyncio.run(check())


def test_a_tuning_that_meets_a_bug_fails_alone(start_nats: StartNats) -> None:
    async def check() -> None:
        async with installation(start_nats().url) as here:
            here.broken = True
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "broken")
                failed = await here.ended("broken")
                here.broken = False
                await here.create(tunings, "sound")
                assert (await here.ended("sound")).state is State.SUCCEEDED
        assert failed.state is State.FAILED
        assert "a bug" in failed.error

    asyncio.run(check())


def test_an_end_that_its_owner_could_not_tell_any_more_is_told_with_its_weight(start_nats: StartNats) -> None:
    """The log says it; the process died before the snapshot did."""

    async def check() -> None:
        async with installation(start_nats().url) as here:
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "told")
                ended = await here.ended("told")
            stored = await here.states.get("told")
            before = replace(
                ended, state=State.RUNNING, end_time=None, max_batch_weight=None, report_json="", measured=False
            )
            await here.states.put(before, after_sequence=stored.sequence)
            async with running(here.tunings()):
                assert await here.ended("told") == ended
        assert here.started == [()]

    asyncio.run(check())


def test_a_result_is_kept_under_the_names_of_who_asks(start_nats: StartNats) -> None:
    async def check() -> None:
        async with installation(start_nats().url) as here:
            cache = here.cache
            text = report_json(result_of([probe_of(4096)]), SPEC)
            assert await cache.find(KEY, SPEC) is None
            await cache.keep(KEY, text)
            named = replace(SPEC, llm_name="mine", gpu_name="A100-40GB")
            found = await cache.find(KEY, named)
            assert found == replace(read_report(text), llm_name="mine", gpu_name="A100-40GB")
            assert await cache.find(cache_key(SPEC, replace(FACTS, device="cuda")), SPEC) is None

    asyncio.run(check())


def test_a_result_that_cannot_be_read_is_none_and_is_replaced(start_nats: StartNats) -> None:
    async def check() -> None:
        async with installation(start_nats().url) as here:
            await here.cache.keep(KEY, '{"format": "of another version"}')
            assert await here.cache.find(KEY, SPEC) is None
            await here.cache.keep(KEY, report_json(result_of([]), SPEC))
            found = await here.cache.find(KEY, SPEC)
            assert found is not None
            assert found.max_batch_weight == 6144

    asyncio.run(check())


def test_a_second_tuning_of_the_same_makes_no_probe(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with installation(server.url) as here:
            async with running(here.tunings()) as tunings:
                for tuning_id in ("first", "second"):
                    await here.create(tunings, tuning_id)
                first, second = await here.ended("first"), await here.ended("second")
            history = await read_history(here.nats, "second")
        assert (first.from_cache, first.probe_count) == (False, 3)
        assert (second.from_cache, second.probe_count, second.max_batch_weight) == (True, 0, 6144)
        assert second.report_json == first.report_json
        assert second.measured
        assert history.probes == ()
        assert here.closed == [True, True]
        assert [event.tuning.from_cache for event in await published(server.url)] == [False, True]

    asyncio.run(check())


def test_notes_of_a_run_are_in_its_log(start_nats: StartNats) -> None:
    async def check() -> None:
        async with installation(start_nats().url) as here:
            log = tuning_log(here.nats, "noted", History(next_index=1))
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(log.run())
                await log.append(Note(text="one"))
                await log.flush()
                writing.cancel()
            assert (await read_history(here.nats, "noted")).next_index == 2
            assert (await read_history(here.nats, "nothing")).next_index == 1

    asyncio.run(check())


def test_a_cancel_that_comes_after_the_weight_was_found_changes_nothing(start_nats: StartNats) -> None:
    """NATS was away meanwhile: the weight is told when it is back, and whoever cancelled has it."""

    async def check() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        server = start_nats()
        port = int(server.url.rpartition(":")[2])
        async with installation(server.url) as here:
            here.hold = holding(4096, begun, go_on)
            async with running(here.tunings()) as tunings:
                await here.create(tunings, "late")
                await begun.wait()
                stored = await here.states.get("late")
                server.kill()
                go_on.set()
                while not here.closed:  # noqa: ASYNC110 the run ends without NATS
                    await asyncio.sleep(0.01)
                run = tunings._runs["late"]  # as the snapshot would, but at a moment that is known
                run.see(replace(stored, job=replace(stored.job, cancel_requested=True)))
                server = await asyncio.to_thread(start_nats, port)
                await here.nats.wait_connected(20)
                ended = await here.ended("late")
        assert (ended.state, ended.max_batch_weight) == (State.SUCCEEDED, 6144)
        assert len(await published(server.url)) == 1

    asyncio.run(check())
