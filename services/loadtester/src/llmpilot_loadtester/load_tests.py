"""The load tests of this installation: created, found, cancelled; taken by this process as it has room, and run.

Invariant: a load test is run by one process at a time: who takes it changes its snapshot, and of two only one can.
"""

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_loadtester.conduct import Conduct, Surroundings, forget_spec
from llmpilot_loadtester.domain.load_test import LoadTest, State
from llmpilot_loadtester.load_test_states import StoredLoadTest
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import StaleSequenceError

log = get_logger(__name__)

_LOOK_SECONDS = 0.5
_END_SECONDS = 7.0
"""For what runs when the service stops; who stops it waits 10 s before it kills."""
_REQUEST_ID, _SPEC = "request_id", "spec"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    stored: StoredLoadTest
    at_seconds: float
    """By this process's clock, when it was written or later."""


class LoadTests:
    """Takes at most `max_count` load tests at a time; those whose owner is silent for `take_over_seconds` too."""

    def __init__(self, around: Surroundings, *, max_count: int, take_over_seconds: float) -> None:
        self._around = around
        self._states = around.states
        self._max_count = max_count
        self._take_over_seconds = take_over_seconds
        self._owner = uuid.uuid4().hex
        self._open: dict[str, _Seen] = {}
        """Load tests that have not ended."""
        self._conducts: dict[str, Conduct] = {}
        self._given_up: set[str] = set()
        """Load tests that this process cannot run, by a bug or as another version wrote them; another process may."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._look = asyncio.Event()

    async def create(self, load_test: LoadTest, spec: bytes) -> LoadTest:
        """Accept a load test, or return the one that the same request has made.

        Raises PreconditionError where another request made one of that id, UnavailableError while NATS is away.
        """
        found = await self._states.find(load_test.id)
        if found is not None:
            return _same(found.load_test, load_test)
        labels = {_REQUEST_ID: load_test.request_id, _SPEC: load_test.spec_digest}
        if not await self._around.specs.create(load_test.id, spec, labels=labels):
            kept = await self._around.specs.find(load_test.id)
            if kept is not None and dict(kept.labels) != labels:
                raise _taken(load_test)
        try:
            await self._states.put(load_test, after_sequence=0)
        except StaleSequenceError:
            return _same((await self._states.get(load_test.id)).load_test, load_test)
        return load_test

    async def cancel(self, load_test_id: str) -> LoadTest:
        """Have a load test cancelled, whoever runs it; raises NotFoundError and UnavailableError."""
        while True:
            stored = await self._states.get(load_test_id)
            if stored.load_test.state.is_end or stored.load_test.cancel_requested:
                return stored.load_test
            wanted = replace(stored.load_test, cancel_requested=True)
            try:
                return (await self._states.put(wanted, after_sequence=stored.sequence)).load_test
            except StaleSequenceError:
                continue  # it was changed meanwhile

    async def follow(self) -> None:
        """For ever, learn of every load test."""
        await self._states.follow(self._see)

    async def run(self) -> None:
        """For ever, take load tests and run them."""
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
        for conduct in self._conducts.values():
            conduct.interrupt()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS)

    async def remove_leftovers(self, every: timedelta = timedelta(minutes=10)) -> None:
        """For ever, delete the specifications, which have keys, of load tests that have ended or never began.

        Also what is left of those that were not written to their end.
        """
        suspects: set[str] = set()
        while True:
            with suppress(UnavailableError):  # the next time, then
                suspects = await self._remove_leftovers(suspects)
                await self._around.specs.remove_unnamed(idle=every)
            await asyncio.sleep(every.total_seconds())

    async def _remove_leftovers(self, suspects: set[str]) -> set[str]:
        """Delete those that are suspect again; returns the new suspects."""
        new: set[str] = set()
        for load_test_id in await self._around.specs.names():
            found = await self._states.find(load_test_id)
            if found is not None and not found.load_test.state.is_end:
                continue
            if found is None and load_test_id not in suspects:
                new.add(load_test_id)  # it may be created at this moment
            else:
                await forget_spec(self._around.specs, load_test_id)
        return new

    def _see(self, stored: StoredLoadTest) -> None:
        load_test = stored.load_test
        if load_test.state.is_end:
            self._open.pop(load_test.id, None)
        else:
            self._open[load_test.id] = _Seen(stored=stored, at_seconds=asyncio.get_running_loop().time())
        if conduct := self._conducts.get(load_test.id):
            conduct.see(stored)
        self._look.set()

    async def _take_some(self, tasks: asyncio.TaskGroup) -> None:
        now_seconds = asyncio.get_running_loop().time()
        if not self._around.nats.connected:  # nobody can be heard: silence says nothing
            self._open = {key: replace(seen, at_seconds=now_seconds) for key, seen in self._open.items()}
            return
        for seen in sorted(self._open.values(), key=lambda seen: seen.stored.load_test.create_time):
            if self._is_stopping:
                return
            if self._may_take(seen, now_seconds):
                await self._take(seen.stored, tasks)

    def _may_take(self, seen: _Seen, now_seconds: float) -> bool:
        load_test = seen.stored.load_test
        if load_test.id in self._conducts or load_test.id in self._given_up:
            return False
        if len(self._conducts) >= self._max_count and not load_test.cancel_requested:
            return False
        is_silent = now_seconds - seen.at_seconds >= self._take_over_seconds
        return load_test.owner in {"", self._owner} or is_silent

    async def _take(self, stored: StoredLoadTest, tasks: asyncio.TaskGroup) -> None:
        load_test = stored.load_test
        if load_test.owner:
            log.warning("taking over a load test whose owner is silent", load_test=load_test.id)
        wanted = replace(load_test, owner=self._owner, state=State.RUNNING)
        try:
            taken = await self._states.put(wanted, after_sequence=stored.sequence)
        except (StaleSequenceError, UnavailableError):
            return  # another was faster, or NATS is away: its snapshot, when it comes, tells
        if self._is_stopping:  # meanwhile: it is this process's, and silent, until another takes it
            return
        conduct = self._conducts[load_test.id] = Conduct(self._around, taken)
        task = tasks.create_task(self._conduct(load_test.id, conduct))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _conduct(self, load_test_id: str, conduct: Conduct) -> None:
        try:
            await conduct.run()
        except Exception as error:
            self._given_up.add(load_test_id)
            log.error("load test given up", load_test=load_test_id, exc_info=error)
        finally:
            del self._conducts[load_test_id]
            self._look.set()


def _same(found: LoadTest, wanted: LoadTest) -> LoadTest:
    """Return the load test that was found if the same request made it."""
    if found.request_id != wanted.request_id:
        raise _taken(wanted)
    if found.spec_digest != wanted.spec_digest:
        raise PreconditionError(
            f"request_id {wanted.request_id!r} made {wanted.name} with another specification: choose another request_id"
        )
    return found


def _taken(wanted: LoadTest) -> PreconditionError:
    return PreconditionError(f"{wanted.name} already exists: choose another load_test_id")
