"""Brings a server into a corner case and says how it went.

Invariant: memory that ran out is an answer; everything else that goes wrong is a `ProbeError` with the server's log.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeError, ProbeTimeoutError
from llmpilot_tuner.server_probe.batch_requests import RequestGroup, batch_requests
from llmpilot_tuner.server_probe.client import RequestFailedError, ServerClient
from llmpilot_tuner.server_probe.live_tokens import LiveTokens
from llmpilot_tuner.server_probe.server_log import is_out_of_memory, memory_line
from llmpilot_tuner.server_probe.server_process import LogFile, ServerProcess

_POLL_SECONDS = 0.2
_LAST_WORDS_SECONDS = 10.0
"""How long a server that broke a connection may take to end, or to log why."""
_LOG_SECONDS = 1.0
"""How long a server that answered with an error may take to log why."""
_WELL_REACHED = 0.97
_PATIENCE = (4, 16)
"""How many times as long requests stay for each other where they missed each other."""
_IDLE_SHARE = 0.01


class CaseRunner:
    """Sends corner cases to one server."""

    def __init__(
        self,
        client: ServerClient,
        *,
        limits: Limits,
        log: LogFile,
        process: ServerProcess | None,
        step_seconds: float,
        longest_input: int | None = None,
    ) -> None:
        self._client = client
        self._limits = limits
        self._log = log
        self._process = process
        self._step_seconds = step_seconds
        self._longest_input = longest_input
        self._serial = 0
        self.early_count = 0
        """Replies that ended before their length."""
        self.most_held = 0
        """Tokens that decode steps had at once, of the case that had most."""
        self.reached: dict[str, float] = {}
        """How much of each case was there at once, by its name; cases that are only prefills are not among them."""

    async def run(self, batch: Batch) -> CaseRun:
        """Send the requests of a case and read every reply; raises ProbeError.

        Where the first of them ended before the last was there, they are sent once more with longer replies.
        """
        run, share = await self._run(batch, patience=1)
        for patience in _PATIENCE:
            if share is None or share >= _WELL_REACHED or run.outcome is not Outcome.PASSED:
                break
            again, again_share = await self._run(batch, patience=patience)
            seconds = run.seconds + again.seconds
            is_better = again.outcome is not Outcome.PASSED or (again_share or 0.0) > share
            run = replace(again if is_better else run, seconds=seconds)
            share = again_share if is_better else share
        if share is not None and run.outcome is Outcome.PASSED:
            self.reached[batch.case] = min(share, self.reached.get(batch.case, 1.0))
        return run

    def forget(self) -> None:
        """Begin to count anew."""
        self.reached.clear()
        self.early_count = 0
        self.most_held = 0

    async def _run(self, batch: Batch, *, patience: int) -> tuple[CaseRun, float | None]:
        """Return how it went, and how much of what had to be there at once was; None: nothing had to."""
        requests = batch_requests(batch, self._limits, longest_input=self._longest_input, patience=patience)
        live = LiveTokens()
        self._log.mark()
        started = time.monotonic()
        failure: RequestFailedError | ProbeError | None = None
        most_used = [0.0]
        try:
            async with asyncio.TaskGroup() as tasks:
                gauge = tasks.create_task(self._watch_gauge(most_used))
                try:
                    await self._send(requests.first, requests.then, live)
                finally:
                    gauge.cancel()
        except* (RequestFailedError, ProbeError) as group:
            failure = most_telling(group)
        seconds = time.monotonic() - started
        if isinstance(failure, ProbeError):
            raise failure
        if failure is not None:
            return await self._failed(batch, failure, live, seconds), None
        if is_out_of_memory(said := self._log.since_mark()):
            return _out_of_memory(batch, f"answered, but logged: {memory_line(said)}", live, seconds), None
        self.early_count += live.early_count
        # prefills end with their first token, so nobody sees them at once
        wanted = sum(group.token_count for group in requests.first) if batch.decode or batch.residents else 0
        seen = live.held_when_watched if requests.then else live.most_held
        if batch.decode and not batch.prefill:
            self.most_held = max(self.most_held, live.most_held)
        words = [f"{seen or 0:,} of {wanted:,} tokens at once"] if wanted else []
        words += [f"the server's own gauge {most_used[0]:.0%}"] if most_used[0] else []
        run = CaseRun(batch=batch, outcome=Outcome.PASSED, seconds=seconds, message=", ".join(words))
        if not wanted:
            return run, None
        is_full = most_used[0] >= _WELL_REACHED and not requests.then  # the server knows better than its replies show
        staying = sum(
            group.token_count for group in requests.first if group.output_tokens > 1
        )  # one token: gone at once
        return run, 1.0 if is_full else min(1.0, (seen or 0) / max(1, staying))

    async def _send(self, first: Sequence[RequestGroup], then: Sequence[RequestGroup], live: LiveTokens) -> None:
        standing = sum(group.request_count for group in first)
        async with asyncio.TaskGroup() as tasks:
            sent = [tasks.create_task(each) for each in self._groups(first, live)]
            if then:
                while live.started_count < standing and _open(sent):
                    await self._some_progress(sent, live)
                live.watched_serial = self._serial
                sent += [tasks.create_task(each) for each in self._groups(then, live)]
            while _open(sent):
                await self._some_progress(sent, live)

    def _groups(self, groups: Sequence[RequestGroup], live: LiveTokens) -> list[Coroutine[None, None, None]]:
        sent = []
        for group in groups:
            serials = range(self._serial, self._serial + group.request_count)
            self._serial += group.request_count
            sent.append(self._client.send(group, serials, live))
        return sent

    async def _some_progress(self, sent: "Sequence[asyncio.Task[None]]", live: LiveTokens) -> None:
        """Wait a moment; raises ProbeTimeoutError where no token has come for too long."""
        await asyncio.wait(_open(sent), timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        silent_seconds = time.monotonic() - live.progress_seconds
        if silent_seconds > self._step_seconds and _open(sent):
            raise ProbeTimeoutError(
                f"no token came from the server for {silent_seconds:.0f} s: is it stuck? If it is only slow, allow "
                "more with step_seconds",
                log=self._log.tail(),
            )

    async def _watch_gauge(self, most_used: list[float]) -> None:
        while True:
            share = await self._client.used_share()
            if share is None:
                return
            most_used[0] = max(most_used[0], share)
            await asyncio.sleep(_POLL_SECONDS)

    async def _failed(self, batch: Batch, failure: RequestFailedError, live: LiveTokens, seconds: float) -> CaseRun:
        if is_out_of_memory(failure.text):
            await self._settle()
            return _out_of_memory(batch, failure.text, live, seconds)
        said = await self._last_words(failure)
        if is_out_of_memory(said):
            return _out_of_memory(batch, memory_line(said), live, seconds)
        ending = self._process.ending if self._process else None
        what = f"the server {ending}" if ending else f"the server failed: {failure.text}"
        if failure.is_turned_away and not ending:
            what = (
                f"the server turns requests away ({failure.text}): let it take {self._limits.most_requests} requests "
                "at once, and send it no others meanwhile"
            )
        raise ProbeError(f"case {batch.case}: {what}; that is no limit of memory", log=self._log.tail())

    async def _last_words(self, failure: RequestFailedError) -> str:
        """Return what the server logged about a failure; one that dies takes a moment to say why."""
        deadline = time.monotonic() + (_LAST_WORDS_SECONDS if failure.is_gone else _LOG_SECONDS)
        while time.monotonic() < deadline:
            if is_out_of_memory(self._log.since_mark()) or await self._has_said_all(failure):
                break
            await asyncio.sleep(_POLL_SECONDS)
        return self._log.since_mark()

    async def _has_said_all(self, failure: RequestFailedError) -> bool:
        if failure.is_turned_away or (self._process is not None and self._process.ending is not None):
            return True
        return failure.is_gone and await self._client.is_healthy()

    async def _settle(self) -> None:
        """Wait until the server has forgotten the requests that were given up, if it says so."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            if (await self._client.used_share() or 0.0) <= _IDLE_SHARE:
                break
            await asyncio.sleep(_POLL_SECONDS)


def _open(tasks: "Sequence[asyncio.Task[None]]") -> "list[asyncio.Task[None]]":
    return [task for task in tasks if not task.done()]


def _out_of_memory(batch: Batch, message: str, live: LiveTokens, seconds: float) -> CaseRun:
    held = f" ({live.most_held:,} tokens had been held at once)" if live.most_held else ""
    return CaseRun(batch=batch, outcome=Outcome.OUT_OF_MEMORY, seconds=seconds, message=message + held)


def most_telling(
    group: BaseExceptionGroup[RequestFailedError | ProbeError],
) -> RequestFailedError | ProbeError:
    """Return the failure that says most: one of memory, else one that is no broken connection."""
    leaves: list[RequestFailedError | ProbeError] = []
    todo: list[BaseException] = [group]
    while todo:
        each = todo.pop(0)
        if isinstance(each, BaseExceptionGroup):
            todo += each.exceptions
        elif isinstance(each, RequestFailedError | ProbeError):
            leaves.append(each)
    memory = (each for each in leaves if is_out_of_memory(str(each)))
    telling = (each for each in leaves if isinstance(each, ProbeError) or not each.is_gone)
    return next(memory, None) or next(telling, None) or leaves[0]
