"""One job, run by this process from where its log ends to its end.

Invariant: the log says that a job has ended before its snapshot does; what happened is in the log however a
run ends, unless another process has taken it.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Generic, TypeVar

from llmpilot_contracts.errors import PilotError, PreconditionError
from llmpilot_contracts.job import State
from llmpilot_servicekit.jobs.job_log import E, JobHistory, JobLog
from llmpilot_servicekit.jobs.job_states import JobStates, StoredJob
from llmpilot_servicekit.jobs.job_wire import J
from llmpilot_servicekit.jobs.ownership import Ownership
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.patience import patiently
from llmpilot_servicekit.status import sole_cause

log = get_logger(__name__)

RENEWALS = 4
"""How often the owner of a job is heard before others take it for silent."""
_LONGEST_ERROR = 4_000
"""Characters: it is in every snapshot."""
H = TypeVar("H", bound=JobHistory[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKeeping(Generic[J]):
    """Where the jobs of a process are kept."""

    nats: NatsConnection
    states: JobStates[J]
    specs: NatsObjects
    renew_seconds: float
    """How often the owner of a job is heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job ends."""

    state: State
    error: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Of the job, by the names of its fields."""
    end_time: datetime | None = None
    """None: now."""


class Conduct(ABC, Generic[J, E, H]):
    """Runs a job that this process owns; a service says what there is to do."""

    def __init__(self, keeping: JobKeeping[J], stored: StoredJob[J]) -> None:
        self._keeping = keeping
        self._id = stored.job.id
        self._name = stored.job.name
        self._stop = asyncio.Event()
        self._ownership = Ownership(keeping.states, stored, renew_seconds=keeping.renew_seconds, on_stop=self._stop.set)

    @abstractmethod
    async def _read_history(self) -> H:
        """Return what the log says. UnavailableError: NATS is away."""

    @abstractmethod
    def _open_log(self, history: H) -> JobLog[E]:
        """Return the log, to be continued."""

    @abstractmethod
    def _changed(self, job: J) -> E:
        """Return the event that says that the job changed."""

    @abstractmethod
    def _known(self, history: H) -> Mapping[str, Any]:
        """Return what the log says of the job, by the names of its fields."""

    @abstractmethod
    def _found(self, ended: J) -> Mapping[str, Any]:
        """Return what the last event of a job says of it beside how and when it ended."""

    @abstractmethod
    async def _perform(self, events: JobLog[E], history: H) -> Ending | None:
        """Do what is not done; returns how the job ends, None: it was interrupted."""

    def see(self, stored: StoredJob[J]) -> None:
        """Learn what a snapshot of this job says."""
        self._ownership.see(stored)

    def interrupt(self) -> None:
        """End soon, so that another process, or the next start, goes on."""
        self._stop.set()

    async def run(self) -> None:
        """Run the job to its end, its loss or its interruption."""
        try:
            await self._run_owned()
        except* StaleSequenceError:
            self._ownership.lose()
        if self._ownership.is_lost:
            log.warning("another process has taken the job over", job=self._name)
        elif self._ownership.job.state.is_end:
            await patiently(partial(forget_spec, self._keeping.specs, self._id))

    async def _run_owned(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            writing = [tasks.create_task(self._ownership.run())]
            try:
                history = await patiently(self._read_history)
                events = self._open_log(history)
                writing.append(tasks.create_task(events.run()))
                self._ownership.change(**self._known(history))
                ending = self._ending_before(history) or await self._begin(events, history)
                await self._leave(events, ending, is_in_log=history.ended is not None)
            finally:
                for task in writing:
                    task.cancel()

    def _ending_before(self, history: H) -> Ending | None:
        """Return how it ended where there is nothing to do any more."""
        ended = history.ended
        if ended is not None:  # and the process that ran it died before it could tell
            found = self._found(ended)
            return Ending(state=ended.state, error=ended.error, found=found, end_time=ended.end_time)
        return Ending(state=State.CANCELLED) if self._ownership.job.cancel_requested else None

    async def _begin(self, events: JobLog[E], history: H) -> Ending | None:
        log.info("job begins", job=self._name)
        await events.append(self._changed(self._ownership.job))
        return await self._perform(events, history)

    def _ending_of(self, error: Exception, found: Mapping[str, Any] | None = None) -> Ending | None:
        """Return how a job ends whose work raised; what a stop breaks, is no failure."""
        if not self._stop.is_set():
            return self._failure(sole_cause(error))
        return self._stopped(found)

    def _stopped(self, found: Mapping[str, Any] | None = None) -> Ending | None:
        """Return how a job ends that was told to stop: cancelled, or left to whoever goes on."""
        return Ending(state=State.CANCELLED, found=found or {}) if self._ownership.job.cancel_requested else None

    def _failure(self, error: BaseException) -> Ending:
        if isinstance(error, StaleSequenceError):
            self._ownership.lose()
        if isinstance(error, PilotError):
            return failed(str(error))
        log.error("job failed by a bug", job=self._name, exc_info=error)
        return failed(f"{type(error).__name__}: {error}; a bug, see the service's log")

    async def _leave(self, events: JobLog[E], ending: Ending | None, *, is_in_log: bool) -> None:
        """Tell how it ended, the log first; None: it is left as it is to whoever goes on."""
        if self._ownership.is_lost:
            return
        changes: dict[str, Any] = {"owner": ""}
        if ending is not None:
            changes |= {"state": ending.state, "error": ending.error, **ending.found}
            changes["end_time"] = ending.end_time or datetime.now(UTC)
            if not is_in_log:
                await events.append(self._changed(self._ownership.changed(**changes)))
        await events.flush()
        job = self._ownership.change(**changes)
        await self._ownership.flush()
        log.info("job left", job=self._name, state=job.state.value, error=job.error)

    async def _read_spec(self) -> bytes:
        """Return what the job does, as it was kept; raises PreconditionError."""
        content = await patiently(partial(_read, self._keeping.specs, self._id))
        if content is None:
            raise PreconditionError(
                f"what it should do is not kept any more: create the {self._ownership.job.kind} again"
            )
        return content


def failed(error: str) -> Ending:
    """Return how a job ends that cannot go on."""
    return Ending(state=State.FAILED, error=error if len(error) <= _LONGEST_ERROR else f"{error[:_LONGEST_ERROR]}...")


async def _read(specs: NatsObjects, job_id: str) -> bytes | None:
    stored = await specs.find(job_id)
    return await specs.read(stored) if stored else None


async def forget_spec(specs: NatsObjects, job_id: str) -> None:
    """Delete what a job did; there may be keys in it."""
    stored = await specs.find(job_id)
    if stored:
        await specs.delete(stored)
