"""The worker processes of a prober, one for each rank: started together, heard together, ended together.

Invariant: all have run the same batches; when one of them cannot go on, none does.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Self

import msgspec

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_tuner.domain.probing import Outcome, ProbeError, ProbeKind, ProbeTimeoutError
from llmpilot_tuner.probes.worker_messages import Answer, CaseResult, Order, Ready, Refused, Run, RunEnded
from llmpilot_tuner.probes.worker_process import WorkerDiedError, WorkerProcess, WorkerSilentError

START_SECONDS = 900.0
"""For real weights of a large LLM to be read from a slow disk."""
_PEERS_SECONDS = 3.0
"""For the other ranks, once one of them has said that it cannot go on: they may wait for it."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "4096",
    "MKL_DISABLE_FAST_MM": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "PYTHONHASHSEED": "0",
}
"""Every piece of 16 KiB and more is mapped alone, so that the limit of the process counts it as it is; and Intel's
MKL and oneDNN keep nothing, which would be counted once in the first step that needs it and in every later one of a
soak: oneDNN's code for each new shape took a third of what the soak of a tiny LLM had."""

Heard = Answer | WorkerDiedError | None
"""None: nothing in time."""


def variables_of(kind: ProbeKind) -> dict[str, str]:
    """Return the environment variables that workers of a kind are started with."""
    if kind is ProbeKind.CPU:
        return _OFFLINE | _ONE_THREAD | MALLOC_SETTINGS | {"GLOO_SOCKET_IFNAME": "lo"}
    return _OFFLINE | _ONE_THREAD if kind is ProbeKind.DRY else _OFFLINE


class WorkerCrew:
    """Workers that are ready."""

    def __init__(self, workers: Sequence[WorkerProcess], folder: str) -> None:
        self._workers = workers
        self._folder = folder
        self.ready: tuple[Ready, ...] = ()
        """What each rank said when it was."""

    @classmethod
    async def start(
        cls, order: Order, *, rank_count: int, command: Sequence[str], start_seconds: float = START_SECONDS
    ) -> Self:
        """Start a worker for each rank, and wait until all are ready.

        Raises ProbeError, or what the workers say of the order: InvalidInputError, PreconditionError.
        """
        folder = tempfile.mkdtemp(prefix="llm-pilot-ranks-") if rank_count > 1 else ""
        workers: list[WorkerProcess] = []
        crew = cls(workers, folder)
        try:
            for rank in range(rank_count):
                name = f"worker {rank + 1} of {rank_count}" if rank_count > 1 else "the worker"
                workers.append(await WorkerProcess.start(name, command, variables=variables_of(order.kind)))
            for rank, worker in enumerate(workers):
                changes = {"rank": rank, "rank_count": rank_count, "meeting_folder": folder}
                await worker.send(msgspec.structs.replace(order, **changes))
            crew.ready = _all_ready(await crew.hear(start_seconds), workers, start_seconds)
        except OSError as error:
            await crew.stop()
            raise ProbeError(f"the worker cannot be started: {error}") from error
        except BaseException:
            await crew.stop()
            raise
        return crew

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers."""
        return tuple(worker.pid for worker in self._workers)

    @property
    def log(self) -> str:
        """The last of what the workers wrote."""
        logs = {worker.name: worker.log for worker in self._workers}
        if len(logs) == 1:
            return next(iter(logs.values()))
        return "\n".join(f"{name}:\n{log}" for name, log in logs.items())

    async def send(self, run: Run) -> None:
        """Have all workers run batches."""
        for worker in self._workers:
            await worker.send(run)

    async def hear(self, limit_seconds: float) -> list[Heard]:
        """Return what each worker says next. Once one cannot go on, the others have a few seconds."""
        heard: list[Heard] = [None] * len(self._workers)
        hurry = asyncio.Event()

        async def listen(rank: int) -> None:
            with contextlib.suppress(WorkerSilentError):
                try:
                    heard[rank] = await self._workers[rank].receive(limit_seconds)
                except WorkerDiedError as error:
                    heard[rank] = error
            if not _goes_on(heard[rank]):
                hurry.set()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(listen(rank)) for rank in range(len(self._workers))]
            waiting = group.create_task(hurry.wait())
            await asyncio.wait([waiting, group.create_task(_all_done(tasks))], return_when=asyncio.FIRST_COMPLETED)
            if not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=_PEERS_SECONDS)
            for task in (*tasks, waiting):
                task.cancel()
        return heard

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.kill()

    async def stop(self) -> None:
        """End all workers."""
        try:
            await asyncio.gather(*(worker.stop() for worker in self._workers))
        finally:
            self.kill()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)


async def _all_done(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


def _goes_on(heard: Heard) -> bool:
    if isinstance(heard, CaseResult):
        return heard.outcome is Outcome.PASSED
    return isinstance(heard, Ready | RunEnded)


def _all_ready(heard: Sequence[Heard], workers: Sequence[WorkerProcess], start_seconds: float) -> tuple[Ready, ...]:
    for answer in heard:
        if isinstance(answer, Refused):
            raise _refused(answer, "\n".join(worker.log for worker in workers))
    for answer in heard:
        if isinstance(answer, WorkerDiedError):
            raise ProbeError(f"{answer} before the LLM was loaded", log=answer.log)
    ready = tuple(answer for answer in heard if isinstance(answer, Ready))
    if len(ready) < len(workers):
        raise ProbeTimeoutError(
            f"the LLM was not loaded within {start_seconds:g} s", log="\n".join(worker.log for worker in workers)
        )
    return ready


def _refused(answer: Refused, log: str) -> Exception:
    match answer.why:
        case Refused.INVALID_INPUT:
            return InvalidInputError(answer.violations)
        case Refused.PRECONDITION:
            return PreconditionError(answer.message)
        case _:
            return ProbeError(f"the LLM could not be loaded: {answer.message}", log=log)
