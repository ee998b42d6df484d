"""One load test, run by this process from where its log ends to its end.

Invariant: what was recorded is in the log however a run ends, unless another process has taken it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from google.protobuf.message import Message

from llmpilot_contracts.errors import PilotError
from llmpilot_contracts.job import State
from llmpilot_loadtester.domain.events import LiveMetrics, Noted, RecordsCame, RunEvent, StageMeasured, TargetFound
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.load_test_log import History, LoadTestLog, load_test_log, read_history
from llmpilot_loadtester.measuring import Measuring, is_measurement
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_servicekit.jobs.conduct import Conduct, Ending, JobKeeping, failed
from llmpilot_servicekit.jobs.job_states import StoredJob

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every load test of this process is run with."""

    keeping: JobKeeping[LoadTest]
    read_order: ReadOrder
    metrics: MetricsExport


class LoadTestConduct(Conduct[LoadTest, LogEvent, History]):
    """Runs a load test that this process owns."""

    def __init__(self, around: Surroundings, stored: StoredJob[LoadTest]) -> None:
        super().__init__(around.keeping, stored)
        self._around = around
        self._nats = around.keeping.nats

    async def _read_history(self) -> History:
        return await read_history(self._nats, self._id)

    def _open_log(self, history: History) -> LoadTestLog:
        return load_test_log(self._nats, self._id, next_index=history.next_index, last_sequence=history.last_sequence)

    def _changed(self, job: LoadTest) -> LogEvent:
        return Changed(load_test=job)

    def _known(self, history: History) -> Mapping[str, Any]:
        return {"results": history.results}

    def _found(self, ended: LoadTest) -> Mapping[str, Any]:
        return {"found_load": ended.found_load}

    async def _perform(self, events: LoadTestLog, history: History) -> Ending | None:
        try:
            content = await self._read_spec()
            order = await asyncio.to_thread(self._around.read_order, self._id, content)
        except PilotError as error:
            return failed(str(error))
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
                return Ending(state=State.SUCCEEDED, found={"found_load": found_load})
        except Exception as error:  # noqa: BLE001 a load test that fails must not end the others
            return self._ending_of(error, {"found_load": found_load})
        return self._stopped({"found_load": found_load})

    def _measuring(self, order: Order, events: LoadTestLog) -> Measuring | None:
        write = order.write_measurement
        if write is None:
            return None

        def written(result: StageResult, event_id: str) -> Message:
            return write(result, event_id, self._ownership.job.simulated)

        return Measuring(self._nats, self._id, written, events.append)

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
            self._ownership.change(results=(*self._ownership.job.results, event.result))
            if measuring:
                await measuring.take(event.result)
