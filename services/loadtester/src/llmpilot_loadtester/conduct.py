"""One load test, run by this process from where its log ends to its end.

Invariant: the log says that a load test has ended before its snapshot does; what was recorded is in the
log however a run ends, unless another process has taken it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from google.protobuf.message import Message

from llmpilot_contracts.errors import PilotError, PreconditionError
from llmpilot_loadtester.domain.events import LiveMetrics, Noted, RecordsCame, RunEvent, StageMeasured, TargetFound
from llmpilot_loadtester.domain.load_test import Changed, State
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.load_test_log import History, LoadTestLog, read_history
from llmpilot_loadtester.load_test_states import LoadTestStates, StoredLoadTest
from llmpilot_loadtester.measuring import Measuring, is_measurement
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_loadtester.ownership import Ownership
from llmpilot_loadtester.patience import patiently
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.status import sole_cause

log = get_logger(__name__)

Emit = Callable[[RunEvent], Awaitable[None]]


class Outcome(Protocol):
    """What a whole run found."""

    @property
    def found_load(self) -> float | None:
        """Of a search: the largest load that meets the service level."""

    @property
    def sentence(self) -> str:
        """What to know, in a sentence; empty: nothing."""


class Run(Protocol):
    """The stages of a load test, sent."""

    async def run(
        self,
        emit: Emit,
        *,
        done: Sequence[StageResult],
        attempts: Mapping[int, int],
        stop: asyncio.Event,
    ) -> Outcome:
        """Run the stages that are not done; PilotError: it cannot go on. Ends soon after `stop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A specification, ready to be run."""

    run: Run
    write_measurement: Callable[[StageResult, str, bool], Message] | None
    """Makes the event of a result, an event id and whether the server is a simulator; None: none are published."""


ReadOrder = Callable[[str, bytes], Order]
"""Reads the kept specification of a load test, in a thread, as it may be large; raises PilotError."""

_LONGEST_ERROR = 4_000
"""Characters: it is in every snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every load test of this process is run with."""

    nats: NatsConnection
    states: LoadTestStates
    specs: NatsObjects
    read_order: ReadOrder
    metrics: MetricsExport
    renew_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a load test ends."""

    state: State
    error: str = ""
    found_load: float | None = None
    end_time: datetime | None = None
    """None: now."""


class Conduct:
    """Runs a load test that this process owns."""

    def __init__(self, around: Surroundings, stored: StoredLoadTest) -> None:
        self._around = around
        self._id = stored.load_test.id
        self._stop = asyncio.Event()
        self._is_interrupted = False
        self._ownership = Ownership(around.states, stored, renew_seconds=around.renew_seconds, on_stop=self._stop.set)

    def see(self, stored: StoredLoadTest) -> None:
        """Learn what a snapshot of this load test says."""
        self._ownership.see(stored)

    def interrupt(self) -> None:
        """End soon, so that another process, or the next start, goes on."""
        self._is_interrupted = True
        self._stop.set()

    async def run(self) -> None:
        """Run the load test to its end, its loss or its interruption."""
        try:
            await self._run_owned()
        except* StaleSequenceError:
            self._ownership.lose()
        if self._ownership.is_lost:
            log.warning("another process has taken the load test over", load_test=self._id)
        elif self._ownership.load_test.state.is_end:
            await patiently(partial(forget_spec, self._around.specs, self._id))

    async def _run_owned(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            writing = [tasks.create_task(self._ownership.run())]
            try:
                history = await patiently(partial(read_history, self._around.nats, self._id))
                events = LoadTestLog(
                    self._around.nats, self._id, next_index=history.next_index, last_sequence=history.last_sequence
                )
                writing.append(tasks.create_task(events.run()))
                ending = self._ending_before(history) or await self._send(events, history)
                await self._leave(events, ending, is_in_log=history.ended is not None)
            finally:
                for task in writing:
                    task.cancel()

    def _ending_before(self, history: History) -> Ending | None:
        """Return how it ended where there is nothing to send any more."""
        ended = history.ended
        self._ownership.change(results=history.results)
        if ended is not None:  # and the process that ran it died before it could tell
            return Ending(state=ended.state, error=ended.error, found_load=ended.found_load, end_time=ended.end_time)
        return Ending(state=State.CANCELLED) if self._ownership.load_test.cancel_requested else None

    async def _leave(self, events: LoadTestLog, ending: Ending | None, *, is_in_log: bool) -> None:
        """Tell how it ended, the log first; None: it is left as it is to whoever goes on."""
        if self._ownership.is_lost:
            return
        changes: dict[str, object] = {"owner": ""}
        if ending is not None:
            changes |= {"state": ending.state, "error": ending.error, "found_load": ending.found_load}
            changes["end_time"] = ending.end_time or datetime.now(UTC)
            if not is_in_log:
                await events.append(Changed(load_test=self._ownership.changed(**changes)))
        await events.flush()
        load_test = self._ownership.change(**changes)
        await self._ownership.flush()
        log.info("load test left", load_test=self._id, state=load_test.state.value, error=load_test.error)

    async def _send(self, events: LoadTestLog, history: History) -> Ending | None:
        """Send what is not done; returns how the load test ends, None: it was interrupted."""
        log.info("load test begins", load_test=self._id, stages_done=len(history.results))
        await events.append(Changed(load_test=self._ownership.load_test))
        try:
            order = await self._read_order()
        except PilotError as error:
            return _failed(str(error))
        measuring = self._measuring(order, events)
        for result in history.results:
            is_owed = result.verdict.is_valid and is_measurement(result) and result.stage_index not in history.published
            if measuring and is_owed:
                await measuring.take(result)
        self._around.metrics.begin(self._id)
        try:
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(measuring.run()) if measuring else None
                ending = await self._run(order.run, partial(self._take, events, measuring), history)
                if publishing and measuring:
                    if ending is not None and not self._ownership.is_lost:
                        await measuring.flush()
                    publishing.cancel()
        finally:
            self._around.metrics.end(self._id)
        return ending

    async def _run(self, run: Run, emit: Emit, history: History) -> Ending | None:
        found_load: float | None = None
        try:
            outcome = await run.run(emit, done=history.results, attempts=history.attempts, stop=self._stop)
            found_load = outcome.found_load
            if not self._stop.is_set():
                if outcome.sentence:
                    await emit(Noted(text=outcome.sentence))
                return Ending(state=State.SUCCEEDED, found_load=found_load)
        except Exception as error:  # noqa: BLE001 a load test that fails must not end the others
            if not self._stop.is_set():
                return self._failure(sole_cause(error))
        is_cancelled = self._ownership.load_test.cancel_requested
        return Ending(state=State.CANCELLED, found_load=found_load) if is_cancelled else None

    def _failure(self, error: BaseException) -> Ending:
        if isinstance(error, StaleSequenceError):
            self._ownership.lose()
        if isinstance(error, PilotError):
            return _failed(str(error))
        log.error("load test failed by a bug", load_test=self._id, exc_info=error)
        return _failed(f"{type(error).__name__}: {error}; a bug, see the service's log")

    async def _read_order(self) -> Order:
        content = await patiently(partial(read_spec, self._around.specs, self._id))
        if content is None:
            raise PreconditionError("what it should do is not kept any more: create the load test again")
        return await asyncio.to_thread(self._around.read_order, self._id, content)

    def _measuring(self, order: Order, events: LoadTestLog) -> Measuring | None:
        write = order.write_measurement
        if write is None:
            return None

        def written(result: StageResult, event_id: str) -> Message:
            return write(result, event_id, self._ownership.load_test.simulated)

        return Measuring(self._around.nats, self._id, written, events.append)

    async def _take(self, events: LoadTestLog, measuring: Measuring | None, event: RunEvent) -> None:
        match event:
            case TargetFound():
                changes = {"served_model": event.served_model, "simulated": event.simulated}
                await events.append(Changed(load_test=self._ownership.change(**changes)))
                return
            case RecordsCame():
                self._around.metrics.see_records(self._id, event)
            case LiveMetrics():
                self._around.metrics.see_live(self._id, event)
        await events.append(event)
        if isinstance(event, StageMeasured):
            self._ownership.change(results=(*self._ownership.load_test.results, event.result))
            if measuring:
                await measuring.take(event.result)


def _failed(error: str) -> Ending:
    return Ending(state=State.FAILED, error=error if len(error) <= _LONGEST_ERROR else f"{error[:_LONGEST_ERROR]}...")


async def read_spec(specs: NatsObjects, load_test_id: str) -> bytes | None:
    """Return what a load test does, as it was kept; None: it is not kept any more."""
    stored = await specs.find(load_test_id)
    return await specs.read(stored) if stored else None


async def forget_spec(specs: NatsObjects, load_test_id: str) -> None:
    """Delete what a load test did, with its keys."""
    stored = await specs.find(load_test_id)
    if stored:
        await specs.delete(stored)
