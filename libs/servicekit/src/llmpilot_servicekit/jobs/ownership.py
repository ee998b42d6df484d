"""The snapshot of a job that this process runs: changed here, written in the background, renewed while it runs.

Invariant: once another process owns the job, this one writes nothing more of it and `is_lost` says so.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic

from llmpilot_servicekit.jobs.job_states import JobStates, StoredJob
from llmpilot_servicekit.jobs.job_wire import J
from llmpilot_servicekit.nats_connection import StaleSequenceError
from llmpilot_servicekit.patience import patiently


class Ownership(Generic[J]):
    """One job of this process; `run` writes its snapshots."""

    def __init__(
        self,
        states: JobStates[J],
        stored: StoredJob[J],
        *,
        renew_seconds: float,
        on_stop: Callable[[], None],
    ) -> None:
        self.job = stored.job
        self._owner = stored.job.owner
        self.is_lost = False
        self._states = states
        self._sequence = stored.sequence
        self._renew_seconds = renew_seconds
        self._on_stop = on_stop
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()

    def change(self, **changes: Any) -> J:
        """Change the job, to be written soon."""
        self.job = self.changed(**changes)
        self._written.clear()
        self._changed.set()
        return self.job

    def changed(self, **changes: Any) -> J:
        """Return the job as it would be."""
        return replace(self.job, **changes)

    def lose(self) -> None:
        """Write nothing more: another process owns the job."""
        self.is_lost = True
        self._written.set()
        self._changed.set()
        self._on_stop()

    def see(self, stored: StoredJob[J]) -> None:
        """Learn what a snapshot says: a client wants it cancelled, or another process owns it."""
        self._heed(stored.job)
        is_left = not self.job.owner  # to whoever takes it
        if not is_left and stored.job.owner != self._owner and stored.sequence > self._sequence:
            self.lose()

    async def run(self) -> None:
        """Write what changed, and the same again where nothing did, so that others see that this process lives."""
        while not self.is_lost:
            try:
                async with asyncio.timeout(self._renew_seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass  # nothing changed for so long
            self._changed.clear()
            await patiently(self._write)
            if not self._changed.is_set():
                self._written.set()

    async def flush(self) -> None:
        """Wait until what changed is written, or the job is another process's."""
        await self._written.wait()

    async def _write(self) -> None:
        while not self.is_lost:
            try:
                stored = await self._states.put(self.job, after_sequence=self._sequence)
            except StaleSequenceError:
                await self._look_again()
            else:
                self._sequence = stored.sequence
                return

    async def _look_again(self) -> None:
        found = await self._states.find(self.job.id)
        if found is None:
            self.lose()
            return
        seen, wanted = found.job, self.job
        is_written = (seen.owner, seen.state) == (wanted.owner, wanted.state)  # and the acknowledgement was lost
        if not is_written and (seen.owner != self._owner or seen.state.is_end):
            self.lose()
            return
        self._sequence = found.sequence
        self._heed(seen)

    def _heed(self, seen: J) -> None:
        if seen.cancel_requested and not self.job.cancel_requested:
            self.job = self.changed(cancel_requested=True)
            self._on_stop()
