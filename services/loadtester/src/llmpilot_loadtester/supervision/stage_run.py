"""One stage: the same load test's workers told when to begin, fed, listened to, and told to end.

Invariant: a stage ends within its limits whatever workers, server and generator do, and every record that a worker has
said by then is emitted and counted.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np

from llmpilot_contracts.errors import PilotError, UnavailableError
from llmpilot_loadtester.domain.arrivals import arrival_offsets, shares
from llmpilot_loadtester.domain.events import Noted, RecordsCame, StageBegan
from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import RecordBatch, joined
from llmpilot_loadtester.domain.spec import RATED, Load, LoadKind, LoadTestSpec, Stage
from llmpilot_loadtester.domain.window import Window, window_of
from llmpilot_loadtester.frame_file import FrameFile
from llmpilot_loadtester.supervision.event_outbox import EventOutbox
from llmpilot_loadtester.supervision.live_window import LiveWindow
from llmpilot_loadtester.supervision.request_feed import RequestFeed
from llmpilot_loadtester.supervision.request_sources import RequestSource, stage_seed
from llmpilot_loadtester.supervision.worker_process import WorkerDiedError, WorkerProcess
from llmpilot_loadtester.worker_messages import Kind, Pulse, StageOrder, pack_json, pack_message

NANOS = 10**9
_TICK_SECONDS = 0.05
_LIVE_TICKS = 2
_LEAD_SECONDS = 0.5
"""From the order to the start, so that every worker is ready."""
_PIPE_BYTES_PER_SECOND = 50e6
_SPAWN_PER_SECOND = 100.0
_PULSES = 2
"""Of a worker after the measured window, before what it says of it counts: the first may be from before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long what is waited for."""

    silence_seconds: float = 10.0
    """For a worker to say anything."""
    prime_seconds: float = 180.0
    """For the first requests."""
    slack_seconds: float = 5.0
    """For requests under way, beyond their own timeout."""
    end_seconds: float = 30.0
    """For workers to record what is left of a stage."""
    stop_seconds: float = 3.0
    """The same of a run that was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """A stage to run."""

    stage: Stage
    index: int
    attempt: int
    stage_count: int
    load_test_id: str


class _End(StrEnum):
    """Why a stage ends."""

    MEASURED = "measured"
    EXHAUSTED = "exhausted"
    """Every request was sent and has ended before the measured window did."""
    WORKER_DIED = "worker died"
    TOO_LONG = "too long"
    STOPPED = "stopped"
    NO_REQUESTS = "no requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecords:
    """What a stage left behind."""

    start_nanos: int
    window: Window
    records: RecordBatch
    """Times relative to the start."""
    health: tuple[WorkerHealth, ...]
    """By worker."""
    deaths: tuple[str, ...]
    """What became of workers that died."""


class _Worker:
    """A worker in this stage."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.pulse: Pulse | None = None
        self.late_pulse_count = 0
        """After the measured window."""
        self.health: WorkerHealth | None = None
        """Of its end; None: it has not ended."""


class StageRun:
    """Runs one stage on workers that are ready."""

    def __init__(
        self,
        job: StageJob,
        spec: LoadTestSpec,
        *,
        processes: Sequence[WorkerProcess],
        source: RequestSource,
        outbox: EventOutbox,
        limits: Limits,
    ) -> None:
        """spec: its target has the served model filled in."""
        self._job, self._spec, self._limits, self._outbox = job, spec, limits, outbox
        self._load = job.stage.load
        self._workers = [_Worker(process) for process in processes]
        self._loads = shares(self._load, len(processes))
        self._feed = RequestFeed(
            source.requests(job.index, spec.target.served_model),
            self._load,
            users_counts=[load.most_users or 0 for load in self._loads],
            offsets=_offsets(self._load, stage_seed(spec.seed, job.index)),
        )
        self._live = LiveWindow(len(processes))
        self._frames = FrameFile()
        self._deaths: list[str] = []
        self._failure: PilotError | None = None
        """Why there are no more requests."""
        self._start_nanos = 0
        self._window = window_of(job.stage)

    async def run(self, stop: asyncio.Event) -> StageRecords | None:
        """Run the stage; None: it was stopped. Raises a PilotError if requests cannot be had."""
        async with asyncio.TaskGroup() as group:
            filling = group.create_task(self._fill())
            await self._primed(stop)
            is_ready = self._failure is None and not stop.is_set()
            end = await self._sent(group, stop) if is_ready else _End.STOPPED
            filling.cancel()
        if self._failure:
            raise self._failure
        if end is _End.STOPPED:
            return None
        if end is _End.TOO_LONG:
            await self._outbox.put(Noted(text=f"{self._load.label}: requests that did not end in time were cut off"))
        return await asyncio.to_thread(self._collected, end)

    async def _sent(self, group: asyncio.TaskGroup, stop: asyncio.Event) -> _End:
        """Have the workers send, from their order to their end."""
        await self._begin()
        listening = [group.create_task(self._listen(number)) for number in range(len(self._workers))]
        serving = [group.create_task(self._order_and_serve(*order)) for order in enumerate(self._orders())]
        end = await self._conduct(stop)
        for task in serving:
            task.cancel()
        await self._end_workers(listening, is_stopped=end is _End.STOPPED)
        return end

    async def _fill(self) -> None:
        try:
            await self._feed.fill()
        except PilotError as error:  # raised when what was measured by then is safe
            self._failure = error

    async def _primed(self, stop: asyncio.Event) -> None:
        """Wait for the first requests, for what keeps them from coming, or for the stop."""
        waits = [asyncio.ensure_future(self._feed.primed()), asyncio.ensure_future(stop.wait())]
        limit_seconds = self._limits.prime_seconds
        try:
            for _ in range(round(limit_seconds / _TICK_SECONDS)):
                done, _ = await asyncio.wait(waits, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if done or self._failure:
                    return
            self._failure = UnavailableError(f"no requests came within {limit_seconds:g} s: look at their source")
        finally:
            for wait in waits:
                wait.cancel()

    async def _begin(self) -> None:
        """Choose when time 0 is."""
        lead_seconds = _LEAD_SECONDS + self._feed.buffered_bytes / _PIPE_BYTES_PER_SECOND
        self._start_nanos = time.time_ns() + round(lead_seconds * NANOS)
        self._feed.begin(self._start_nanos)
        job = self._job
        await self._outbox.put(
            StageBegan(
                stage_index=job.index,
                attempt=job.attempt,
                stage=job.stage,
                start_unix_nanos=self._start_nanos,
                stage_count=job.stage_count,
            )
        )

    def _orders(self) -> Iterator[StageOrder]:
        job = self._job
        users_count = self._load.most_users or 0
        # All users have begun by the middle of the warm-up, at the latest.
        spawn_per_second = max(_SPAWN_PER_SECOND, 2 * users_count / max(job.stage.warm_up_seconds, 0.1))
        first_user_index = 0
        for load in self._loads:
            yield StageOrder(
                target=self._spec.target,
                load=load,
                first_user_index=first_user_index,
                start_nanos=self._start_nanos,
                measure_from_nanos=self._start_nanos + self._window.from_nanos,
                measure_until_nanos=self._start_nanos + self._window.until_nanos,
                request_id_prefix=f"{job.load_test_id}-{job.index}-{job.attempt}-",
                reply_tokenizer_json=self._spec.reply_tokenizer_json.decode(),
                spawn_per_second=spawn_per_second / len(self._loads),
            )
            first_user_index += load.most_users or 0

    async def _order_and_serve(self, number: int, order: StageOrder) -> None:
        process = self._workers[number].process
        await process.send(pack_json(Kind.STAGE, order))
        await self._feed.serve(number, process.send)

    async def _listen(self, number: int) -> None:
        """Take what a worker says, until it has ended its stage or its life."""
        worker = self._workers[number]
        try:
            while worker.health is None:
                for kind, payload in await worker.process.receive(self._limits.silence_seconds):
                    await self._take(number, kind, payload)
        except WorkerDiedError as error:
            self._deaths.append(str(error))
        except (ValueError, msgspec.MsgspecError) as error:
            worker.process.kill()
            self._deaths.append(f"{worker.process.name} said what cannot be read: {error}")
        if worker.health is None:
            worker.health = worker.pulse.health if worker.pulse else WorkerHealth()

    async def _take(self, number: int, kind: Kind, payload: bytes) -> None:
        worker = self._workers[number]
        if kind is Kind.RECORDS:
            batch = unpack_records(payload)
            self._live.add(batch, time.monotonic())
            self._frames.append(payload)
            await self._outbox.put(
                RecordsCame(
                    stage_index=self._job.index,
                    attempt=self._job.attempt,
                    request_count=len(batch),
                    columns=payload,
                )
            )
        elif kind is Kind.PULSE:
            worker.pulse = self._live.pulses[number] = msgspec.json.decode(payload, type=Pulse)
            worker.late_pulse_count += self._elapsed_nanos() > self._window.until_nanos
            self._feed.note_sent(number, worker.pulse.sent_count)
        elif kind is Kind.STAGE_ENDED:
            worker.health = msgspec.json.decode(payload, type=WorkerHealth)

    async def _conduct(self, stop: asyncio.Event) -> _End:
        """Say how it goes until the stage is over."""
        job, tick_count = self._job, 0
        while (end := self._end_now(stop)) is None:
            if tick_count % _LIVE_TICKS == 0 and self._elapsed_nanos() >= 0:
                await self._outbox.put(
                    self._live.metrics(
                        stage_index=job.index,
                        elapsed_seconds=self._elapsed_nanos() / NANOS,
                        phase=self._phase(),
                        at_seconds=time.monotonic(),
                    )
                )
            tick_count += 1
            await asyncio.sleep(_TICK_SECONDS)
        return end

    def _phase(self) -> str:
        elapsed_nanos = self._elapsed_nanos()
        if elapsed_nanos < self._window.from_nanos:
            return "warm-up"
        return "measuring" if elapsed_nanos < self._window.until_nanos else "cool-down"

    def _end_now(self, stop: asyncio.Event) -> _End | None:
        """Return why the stage is over; None: it is not."""
        if stop.is_set():
            return _End.STOPPED
        if self._failure:
            return _End.NO_REQUESTS
        if self._deaths:
            return _End.WORKER_DIED  # what the others still measured would be of another load
        pulses = [worker.pulse for worker in self._workers]
        if all(
            pulse is not None and not pulse.in_flight_count and self._feed.has_sent_all(number, pulse.sent_count)
            for number, pulse in enumerate(pulses)
        ):
            return _End.EXHAUSTED
        return self._end_of_cool_down()

    def _end_of_cool_down(self) -> _End | None:
        late_nanos = self._elapsed_nanos() - self._window.until_nanos
        if late_nanos < 0:
            return None
        if all(
            worker.pulse is not None
            and worker.late_pulse_count >= _PULSES
            and not worker.pulse.measured_in_flight_count
            for worker in self._workers
        ):
            return _End.MEASURED
        target = self._spec.target
        limit_seconds = target.request_timeout_seconds + target.connect_timeout_seconds + self._limits.slack_seconds
        return _End.TOO_LONG if late_nanos > limit_seconds * NANOS else None

    async def _end_workers(self, listening: Sequence[asyncio.Task[None]], *, is_stopped: bool) -> None:
        """Have what is under way cut off and recorded; a worker that takes too long is killed."""
        limit_seconds = self._limits.stop_seconds if is_stopped else self._limits.end_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds), asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(worker.process.send(pack_message(Kind.END_STAGE)))
                await asyncio.wait(listening)
        for worker in self._workers:
            if worker.health is None:
                worker.process.kill(f"did not end its stage within {limit_seconds:g} s and was killed")
        await asyncio.wait(listening)

    def _elapsed_nanos(self) -> int:
        return time.time_ns() - self._start_nanos

    def _collected(self, end: _End) -> StageRecords:
        records = joined([unpack_records(frame) for frame in self._frames]).since(self._start_nanos)
        self._frames.close()
        return StageRecords(
            start_nanos=self._start_nanos,
            window=self._measured_window(end, records),
            records=records,
            health=tuple(worker.health or WorkerHealth() for worker in self._workers),
            deaths=tuple(self._deaths),
        )

    def _measured_window(self, end: _End, records: RecordBatch) -> Window:
        """Return the window that was measured: one that was cut short ends with the last reply."""
        window = self._window
        last_nanos = int(np.max(records.end_nanos, initial=window.from_nanos)) + 1
        if end is _End.WORKER_DIED:
            return Window(from_nanos=window.from_nanos, until_nanos=min(last_nanos, window.until_nanos))
        sent_all = end is _End.EXHAUSTED and np.all(records.send_nanos < window.until_nanos)
        return Window(from_nanos=window.from_nanos, until_nanos=last_nanos) if sent_all else window


def _offsets(load: Load, seed: int) -> Iterator[int] | None:
    """Yield when requests are due; None: users are waited for, or requests have their own times."""
    if load.kind not in (*RATED, LoadKind.ALL_AT_ONCE):
        return None
    blocks = arrival_offsets(load, seed=seed, until_seconds=None)
    return (offset for block in blocks for offset in block.tolist())
