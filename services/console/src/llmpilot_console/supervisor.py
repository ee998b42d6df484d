"""Runs a platform on this machine: the same processes as in a cluster, nats-server first, then every service.

Invariant: when `Supervisor.run` ends, however it ends, none of its processes is left.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import NoReturn

from llmpilot_console.child import Child
from llmpilot_console.members import ANY_PORT, Member, NatsMember, ServiceMember
from llmpilot_console.state_directory import RunningPlatform, StateDirectory
from llmpilot_contracts.errors import PilotError, PreconditionError, UnavailableError
from llmpilot_servicekit.process_exit import describe_exit

_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the supervisor waits for what."""

    start_seconds: float = 60
    """For a process to become ready."""
    stop_seconds: float = 10
    """For a process to end after SIGTERM."""
    first_restart_seconds: float = 0.2
    """Before the first restart; doubles from one to the next."""
    last_restart_seconds: float = 30
    """Longest wait before a restart."""
    healthy_seconds: float = 60
    """A process that lived this long starts again at the first wait."""


class Supervisor:
    """A platform of nats-server and services.

    `services` maps a name to the module that `python -m` runs, `listen` a name to the host:port where the service must
    listen (others: any free loopback port), `report` takes lines for a person.
    """

    def __init__(
        self,
        state_dir: Path,
        services: Mapping[str, str],
        *,
        listen: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self.state = StateDirectory(state_dir)
        self._services = services
        self._listen = listen or {}
        self._report = report
        self._patience = patience or Patience()
        self._children: dict[Member, Child] = {}

    async def run(self, started: Callable[[RunningPlatform], None]) -> NoReturn:
        """Start everything, call `started`, restart what dies; on cancellation stop everything.

        Raises a PilotError if the platform cannot start. A second cancellation kills instead of waiting.
        """
        with self.state.lock():
            try:
                platform = await self._start()
                self.state.announce(platform)
                started(platform)
                async with asyncio.TaskGroup() as group:
                    for member in self._children:
                        group.create_task(self._keep_alive(member))
                raise AssertionError("unreachable: processes are kept alive for ever")
            finally:
                self.state.withdraw()
                await self._stop()

    async def _start(self) -> RunningPlatform:
        environment = dict(os.environ)
        nats = NatsMember(self.state.nats_store, environment=environment)
        await self._bring_up(nats)
        services = [
            ServiceMember(
                name,
                module,
                folder=self.state.path,
                listen=self._listen.get(name, ANY_PORT),
                nats_url=nats.url,
                environment=environment,
            )
            for name, module in self._services.items()
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for service in services:
                    group.create_task(self._bring_up(service))
        except ExceptionGroup as failures:
            raise _as_one(failures) from failures
        return RunningPlatform(
            pid=os.getpid(), nats_url=nats.url, services={service.name: service.addresses for service in services}
        )

    async def _bring_up(self, member: Member) -> None:
        child = self._children[member] = Child(member.name, self.state.logs / f"{member.name}.log")
        await child.start(member.prepare())
        try:
            async with asyncio.timeout(self._patience.start_seconds):
                while not await member.is_ready():
                    if child.exit_code is not None:
                        raise PreconditionError(_with_log(f"{child.name} {describe_exit(child.exit_code)}", child))
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            waited = f"{child.name} is not ready after {self._patience.start_seconds:g} s"
            raise UnavailableError(_with_log(waited, child)) from error

    async def _keep_alive(self, member: Member) -> NoReturn:
        child, patience, clock = self._children[member], self._patience, asyncio.get_running_loop().time
        wait_seconds, start_seconds = patience.first_restart_seconds, clock()
        while True:
            exit_code = await child.wait()
            if clock() - start_seconds >= patience.healthy_seconds:
                wait_seconds = patience.first_restart_seconds
            what = f"{child.name} {describe_exit(exit_code)}"
            self._report(f"{what}; starting it again in {wait_seconds:g} s (log: {child.log_path})")
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, patience.last_restart_seconds)
            start_seconds = clock()
            await child.start(member.prepare())

    async def _stop(self) -> None:
        """Stop the services together, then nats-server, so that the last facts still find it."""
        children = list(self._children.values())
        try:
            for stage in (children[1:], children[:1]):
                async with asyncio.TaskGroup() as group:
                    for child in stage:
                        group.create_task(child.stop(self._patience.stop_seconds))
        finally:
            for child in children:
                child.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundRun:
    """A platform that runs on a thread of its own."""

    platform: RunningPlatform
    ended: Future[NoReturn]
    """Fails with what ended the run."""


@contextmanager
def running_in_background(supervisor: Supervisor) -> Iterator[BackgroundRun]:
    """Run a platform while the context is open; Ctrl-C in the context, or while it opens, stops the platform.

    The thread also keeps the promise of `tether`: children live only as long as the thread that started them.
    """
    started: Future[RunningPlatform] = Future()
    ended: Future[NoReturn] = Future()
    stopped = Event()  # an interrupted Thread.join returns at once the next time, this does not
    loop = asyncio.new_event_loop()
    run = loop.create_task(supervisor.run(started.set_result))

    def finish(run: asyncio.Task[NoReturn]) -> None:
        if not run.cancelled() and (error := run.exception()):
            for waiting in (started, ended):
                if not waiting.done():
                    waiting.set_exception(error)
        loop.stop()

    def drive() -> None:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        stopped.set()

    run.add_done_callback(finish)
    Thread(target=drive, name="supervisor", daemon=True).start()
    try:
        yield BackgroundRun(platform=started.result(), ended=ended)
    finally:
        _cancel(loop, run)
        try:
            stopped.wait()
        except KeyboardInterrupt:  # the second one: no more patience
            _cancel(loop, run)
            stopped.wait()
            raise


def _cancel(loop: asyncio.AbstractEventLoop, run: asyncio.Task[NoReturn]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the run has ended
        loop.call_soon_threadsafe(run.cancel)


def _with_log(what: str, child: Child) -> str:
    tail = "\n".join(f"  | {line}" for line in child.log_tail().splitlines())
    return f"{what}; the end of its log, {child.log_path}:\n{tail or '  | (empty)'}"


def _as_one(failures: ExceptionGroup[Exception]) -> Exception:
    """Merge what several services failed with; anything but a PilotError is a bug and is not hidden."""
    refusals, bugs = failures.split(PilotError)
    if bugs or refusals is None:
        return failures
    first, *others = refusals.exceptions
    return first if not others else PreconditionError("\n".join(map(str, refusals.exceptions)))
