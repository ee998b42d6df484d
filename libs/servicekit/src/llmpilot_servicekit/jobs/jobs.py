"""The jobs of this installation: created, found, cancelled; taken by this process as it has room, and run.

Invariant: a job is run by one process at a time: who takes it changes its snapshot, and of two only one can.
"""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Generic, Protocol

from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_contracts.job import State
from llmpilot_servicekit.jobs.conduct import JobKeeping, forget_spec
from llmpilot_servicekit.jobs.job_states import StoredJob
from llmpilot_servicekit.jobs.job_wire import J
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import StaleSequenceError

log = get_logger(__name__)

_LOOK_SECONDS = 0.5
_END_SECONDS = 7.0
"""For what runs when the service stops; who stops it waits 10 s before it kills."""
_REQUEST_ID, _SPEC = "request_id", "spec"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen(Generic[J]):
    stored: StoredJob[J]
    at_seconds: float
    """By this process's clock, when it was written or later."""


class Run(Protocol[J]):
    """What runs a job of this process."""

    def see(self, stored: StoredJob[J]) -> None:
        """Learn what a snapshot of the job says."""

    def interrupt(self) -> None:
        """End soon, so that another process, or the next start, goes on."""

    async def run(self) -> None:
        """Run the job to its end, its loss or its interruption."""


class Jobs(Generic[J]):
    """Takes at most `max_count` jobs at a time; those whose owner is silent for `take_over_seconds` too."""

    def __init__(
        self,
        keeping: JobKeeping[J],
        run_of: Callable[[StoredJob[J]], Run[J]],
        *,
        max_count: int,
        take_over_seconds: float,
        id_field: str,
    ) -> None:
        """run_of: makes what runs a job that this process has taken; id_field: how clients choose an id."""
        self._keeping = keeping
        self._states = keeping.states
        self._run_of = run_of
        self._max_count = max_count
        self._take_over_seconds = take_over_seconds
        self._id_field = id_field
        self._owner = uuid.uuid4().hex
        self._open: dict[str, _Seen[J]] = {}
        """Jobs that have not ended."""
        self._runs: dict[str, Run[J]] = {}
        self._given_up: set[str] = set()
        """Jobs that this process cannot run, by a bug or as another version wrote them; another process may."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._look = asyncio.Event()

    async def create(self, job: J, spec: bytes) -> J:
        """Accept a job, or return the one that the same request has made.

        Raises PreconditionError where another request made one of that id, UnavailableError while NATS is away.
        """
        found = await self._states.find(job.id)
        if found is not None:
            return self._same(found.job, job)
        labels = {_REQUEST_ID: job.request_id, _SPEC: job.spec_digest}
        if not await self._keeping.specs.create(job.id, spec, labels=labels):
            kept = await self._keeping.specs.find(job.id)
            if kept is not None and dict(kept.labels) != labels:
                raise self._taken(job)
        try:
            await self._states.put(job, after_sequence=0)
        except StaleSequenceError:
            return self._same((await self._states.get(job.id)).job, job)
        return job

    async def cancel(self, job_id: str) -> J:
        """Have a job cancelled, whoever runs it; raises NotFoundError and UnavailableError."""
        while True:
            stored = await self._states.get(job_id)
            if stored.job.state.is_end or stored.job.cancel_requested:
                return stored.job
            wanted = replace(stored.job, cancel_requested=True)
            try:
                return (await self._states.put(wanted, after_sequence=stored.sequence)).job
            except StaleSequenceError:
                continue  # it was changed meanwhile

    async def follow(self) -> None:
        """For ever, learn of every job."""
        await self._states.follow(self._see)

    async def run(self) -> None:
        """For ever, take jobs and run them."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._take_some(tasks)
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._look.wait()
                except TimeoutError:
                    pass  # an owner may have become silent
                self._look.clear()

    async def finish(self) -> None:
        """Take no more, and interrupt what runs: it stays RUNNING, for others and for the next start."""
        self._is_stopping = True
        for run in self._runs.values():
            run.interrupt()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS)

    async def remove_leftovers(self, every: timedelta = timedelta(minutes=10)) -> None:
        """For ever, delete the specifications, which have keys, of jobs that have ended or never began.

        Also what is left of those that were not written to their end.
        """
        suspects: set[str] = set()
        while True:
            with suppress(UnavailableError):  # the next time, then
                suspects = await self._remove_leftovers(suspects)
                await self._keeping.specs.remove_unnamed(idle=every)
            await asyncio.sleep(every.total_seconds())

    async def _remove_leftovers(self, suspects: set[str]) -> set[str]:
        """Delete those that are suspect again; returns the new suspects."""
        new: set[str] = set()
        for job_id in await self._keeping.specs.names():
            found = await self._states.find(job_id)
            if found is not None and not found.job.state.is_end:
                continue
            if found is None and job_id not in suspects:
                new.add(job_id)  # it may be created at this moment
            else:
                await forget_spec(self._keeping.specs, job_id)
        return new

    def _see(self, stored: StoredJob[J]) -> None:
        job = stored.job
        if job.state.is_end:
            self._open.pop(job.id, None)
        else:
            self._open[job.id] = _Seen(stored=stored, at_seconds=asyncio.get_running_loop().time())
        if run := self._runs.get(job.id):
            run.see(stored)
        self._look.set()

    async def _take_some(self, tasks: asyncio.TaskGroup) -> None:
        now_seconds = asyncio.get_running_loop().time()
        if not self._keeping.nats.connected:  # nobody can be heard: silence says nothing
            self._open = {key: replace(seen, at_seconds=now_seconds) for key, seen in self._open.items()}
            return
        for seen in sorted(self._open.values(), key=lambda seen: seen.stored.job.create_time):
            if self._is_stopping:
                return
            if self._may_take(seen, now_seconds):
                await self._take(seen.stored, tasks)

    def _may_take(self, seen: _Seen[J], now_seconds: float) -> bool:
        job = seen.stored.job
        if job.id in self._runs or job.id in self._given_up:
            return False
        if len(self._runs) >= self._max_count and not job.cancel_requested:
            return False
        is_silent = now_seconds - seen.at_seconds >= self._take_over_seconds
        return job.owner in {"", self._owner} or is_silent

    async def _take(self, stored: StoredJob[J], tasks: asyncio.TaskGroup) -> None:
        job = stored.job
        if job.owner:
            log.warning("taking over a job whose owner is silent", job=job.name)
        wanted = replace(job, owner=self._owner, state=State.RUNNING)
        try:
            taken = await self._states.put(wanted, after_sequence=stored.sequence)
        except (StaleSequenceError, UnavailableError):
            return  # another was faster, or NATS is away: its snapshot, when it comes, tells
        if self._is_stopping:  # meanwhile: it is this process's, and silent, until another takes it
            return
        run = self._runs[job.id] = self._run_of(taken)
        task = tasks.create_task(self._conduct(job.id, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _conduct(self, job_id: str, run: Run[J]) -> None:
        try:
            await run.run()
        except Exception as error:
            self._given_up.add(job_id)
            log.error("job given up", job=job_id, exc_info=error)
        finally:
            del self._runs[job_id]
            self._look.set()

    def _same(self, found: J, wanted: J) -> J:
        """Return the job that was found if the same request made it."""
        if found.request_id != wanted.request_id:
            raise self._taken(wanted)
        if found.spec_digest != wanted.spec_digest:
            raise PreconditionError(
                f"request_id {wanted.request_id!r} made {wanted.name} with another specification: "
                "choose another request_id"
            )
        return found

    def _taken(self, wanted: J) -> PreconditionError:
        return PreconditionError(f"{wanted.name} already exists: choose another {self._id_field}")
