"""The snapshot of a load test that this process runs: changed here, written in the background, renewed while it runs.

Invariant: once another process owns the load test, this one writes nothing more of it and `is_lost` says so.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmpilot_loadtester.domain.load_test import LoadTest
from llmpilot_loadtester.load_test_states import LoadTestStates, StoredLoadTest
from llmpilot_loadtester.patience import patiently
from llmpilot_servicekit.nats_connection import StaleSequenceError


class Ownership:
    """One load test of this process; `run` writes its snapshots."""

    def __init__(
        self,
        states: LoadTestStates,
        stored: StoredLoadTest,
        *,
        renew_seconds: float,
        on_stop: Callable[[], None],
    ) -> None:
        self.load_test = stored.load_test
        self._owner = stored.load_test.owner
        self.is_lost = False
        self._states = states
        self._sequence = stored.sequence
        self._renew_seconds = renew_seconds
        self._on_stop = on_stop
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()

    def change(self, **changes: Any) -> LoadTest:
        """Change the load test, to be written soon."""
        self.load_test = self.changed(**changes)
        self._written.clear()
        self._changed.set()
        return self.load_test

    def changed(self, **changes: Any) -> LoadTest:
        """Return the load test as it would be."""
        return replace(self.load_test, **changes)

    def lose(self) -> None:
        """Write nothing more: another process owns the load test."""
        self.is_lost = True
        self._written.set()
        self._changed.set()
        self._on_stop()

    def see(self, stored: StoredLoadTest) -> None:
        """Learn what a snapshot says: a client wants it cancelled, or another process owns it."""
        self._heed(stored.load_test)
        is_left = not self.load_test.owner  # to whoever takes it
        if not is_left and stored.load_test.owner != self._owner and stored.sequence > self._sequence:
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
        """Wait until what changed is written, or the load test is another process's."""
        await self._written.wait()

    async def _write(self) -> None:
        while not self.is_lost:
            try:
                stored = await self._states.put(self.load_test, after_sequence=self._sequence)
            except StaleSequenceError:
                await self._look_again()
            else:
                self._sequence = stored.sequence
                return

    async def _look_again(self) -> None:
        found = await self._states.find(self.load_test.id)
        if found is None:
            self.lose()
            return
        seen, wanted = found.load_test, self.load_test
        is_written = (seen.owner, seen.state) == (wanted.owner, wanted.state)  # and the acknowledgement was lost
        if not is_written and (seen.owner != self._owner or seen.state.is_end):
            self.lose()
            return
        self._sequence = found.sequence
        self._heed(seen)

    def _heed(self, seen: LoadTest) -> None:
        if seen.cancel_requested and not self.load_test.cancel_requested:
            self.load_test = self.changed(cancel_requested=True)
            self._on_stop()
