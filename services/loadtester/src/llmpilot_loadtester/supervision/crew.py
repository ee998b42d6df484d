"""The worker processes of a load test: started, asked whether they are ready, replaced when they die.

Invariant: when the context ends, none of them is left.
"""

import asyncio
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.domain.spec import Load, Target
from llmpilot_loadtester.supervision.worker_process import WORKER_COMMAND, WorkerDiedError, WorkerProcess
from llmpilot_loadtester.worker_messages import Kind, Probed, ProbeOrder, pack_json, pack_message

USERS_PER_WORKER = 8
"""Below it another process costs more than it helps."""
START_SECONDS = 60.0
"""For a worker to start, on a machine that is busy."""


def worker_count_for(loads: Sequence[Load], *, asked: int, cpu_count: int) -> int:
    """Return how many workers the loads need at most; `asked`: what the spec says, 0: nothing."""
    return asked or max((_useful_count(load, cpu_count) for load in loads), default=1)


def worker_count_of(load: Load, *, asked: int, present: int) -> int:
    """Return how many of the workers a load is for: no more than have users."""
    if asked:
        return max(min(present, load.most_users if load.most_users is not None else present), 1)
    return _useful_count(load, present)


def _useful_count(load: Load, most: int) -> int:
    if load.most_users is None:
        return most
    return max(min(most, math.ceil(load.most_users / USERS_PER_WORKER)), 1)


class Crew:
    """Worker processes; as a context they are stopped at the end."""

    def __init__(self, count: int, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._count = count
        self._command = command
        self._workers: list[WorkerProcess] = []
        self._started_count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def ready(self, count: int) -> Sequence[WorkerProcess]:
        """Return workers that are alive and idle, starting what is missing. PreconditionError: one does not start."""
        for worker in [worker for worker in self._workers if not worker.is_alive]:
            await worker.stop()
            self._workers.remove(worker)
        new = [await self._start() for _ in range(self._count - len(self._workers))]
        try:
            async with asyncio.TaskGroup() as group:
                for worker in new:
                    group.create_task(_answer(worker))
        except ExceptionGroup as failures:
            deaths, others = failures.split(WorkerDiedError)
            if deaths is None or others is not None:
                raise
            raise PreconditionError(
                f"a worker process of the load tester does not start: {deaths.exceptions[0]}"
            ) from failures
        return self._workers[:count]

    async def probe(self, target: Target) -> Probed:
        """Have one worker look at the target. PreconditionError: it cannot be put under load."""
        worker, *_ = await self.ready(1)
        await worker.send(pack_json(Kind.PROBE, ProbeOrder(target=target)))
        limit_seconds = START_SECONDS + target.connect_timeout_seconds
        try:
            while True:
                for kind, payload in await worker.receive(limit_seconds):
                    if kind is Kind.PROBED:
                        return msgspec.json.decode(payload, type=Probed)
        except WorkerDiedError as error:
            raise PreconditionError(f"{target.url} could not be looked at: {error}") from error

    async def _start(self) -> WorkerProcess:
        self._started_count += 1
        worker = await WorkerProcess.start(f"worker {self._started_count}", self._command)
        self._workers.append(worker)
        return worker


async def _answer(worker: WorkerProcess) -> None:
    """Wait until a new worker listens: told to end a stage that it has not, it says at once that it did."""
    await worker.send(pack_message(Kind.END_STAGE))
    while all(kind is not Kind.STAGE_ENDED for kind, _ in await worker.receive(START_SECONDS)):
        pass
