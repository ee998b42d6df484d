"""One worker process: started, spoken to over two pipes, watched, and never left behind.

Invariant: whatever a worker does, every wait for it has a limit, and a worker that is no longer of use is a
`WorkerDiedError` that says what it said last. A worker whose supervisor is killed reads the end of its pipe.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from llmpilot_loadtester.worker_messages import Failed, Kind, MessageReader
from llmpilot_servicekit.process_exit import describe_exit

WORKER_COMMAND = (sys.executable, "-P", "-m", "llmpilot_loadtester.engine.worker")

_READ_BYTES = 1 << 18
_UNREAD_BYTES = 1 << 20
"""What a worker may have said and nobody read: then its pipe fills, and it keeps the rest."""
_UNSENT_BYTES = 1 << 18
"""What may wait to be written to a worker that does not read."""
_TAIL_BYTES = 16_384
_TAIL_LINES = 20
_SECOND_LOOK_SECONDS = 0.2
_LAST_WORDS_SECONDS = 1.0


class WorkerDiedError(Exception):
    """A worker ended, said that it cannot go on, said nothing for too long or spoke garbage; the message says which."""


class WorkerProcess:
    """A worker; as a context it is stopped at the end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        assert process.stdin is not None  # noqa: S101 as it was started
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        self._down, self._up = process.stdin, process.stdout
        self._down.transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        self._messages = MessageReader()
        self._cause = ""
        """Why it is of no use any more; empty: it is."""
        self._tail = bytearray()
        self._listening = asyncio.create_task(self._keep_tail(process.stderr), name=f"stderr of {name}")

    @classmethod
    async def start(cls, name: str, command: Sequence[str] = WORKER_COMMAND) -> Self:
        """Start a worker in a process group of its own, which a terminal's Ctrl-C does not reach."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_UNREAD_BYTES, process_group=0
        )
        return cls(name, process)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its process has not ended, as far as known."""
        return self._process.returncode is None

    @property
    def last_lines(self) -> list[str]:
        """The last of what it wrote to its standard error."""
        return self._tail.decode(errors="replace").splitlines()[-_TAIL_LINES:]

    async def send(self, message: bytes) -> None:
        """Write a message; waits while the worker reads slower. Says nothing if the worker is gone: `receive` does.

        Whoever sends also has someone receive: a worker that hangs is killed there, which ends this call.
        """
        with contextlib.suppress(OSError):
            self._down.write(message)
            await self._down.drain()

    async def receive(self, limit_seconds: float) -> list[tuple[Kind, bytes]]:
        """Return what the worker says next, at least a message; raises WorkerDiedError.

        A worker that says nothing for `limit_seconds` is killed. So is one that says what is no message.
        """
        messages: list[tuple[Kind, bytes]] = []
        while not messages:
            data = await self._read(limit_seconds)
            if not data:
                raise await self._died()
            self._take(data, messages)
        return messages

    def _take(self, data: bytes, messages: list[tuple[Kind, bytes]]) -> None:
        """Add the messages that are whole. What is recorded before or after something went wrong still counts."""
        try:
            for kind, payload in self._messages.feed(data):
                if kind is Kind.FAILED:
                    self._cause = f"cannot go on: {msgspec.json.decode(payload, type=Failed).message}"
                elif not (kind is Kind.STAGE_ENDED and self._cause):
                    messages.append((kind, payload))
        except (ValueError, msgspec.MsgspecError) as error:
            self.kill(f"wrote what is no message ({error})")

    async def stop(self, *, end_seconds: float = 1.5, terminate_seconds: float = 0.5) -> None:
        """End the worker: its pipe ends, then SIGTERM, then SIGKILL; takes 2 s by default."""
        try:
            self._down.close()
            await self._ended(end_seconds)
            if self.is_alive:
                self._signal(signal.SIGTERM)
                await self._ended(terminate_seconds)
        finally:  # also when the patience of whoever stops it is over
            self.kill()
        await self._ended(_LAST_WORDS_SECONDS)
        self._listening.cancel()
        self._process._transport.close()  # type: ignore[attr-defined]  # nothing else closes its pipes

    def kill(self, cause: str = "") -> None:
        """End the worker at once. cause: why, for whoever receives from it."""
        self._cause = self._cause or cause
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):  # ended this moment
                self._process.send_signal(number)

    async def _ended(self, limit_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                while await self._up.read(_READ_BYTES):
                    pass  # nobody wants it any more, but a full pipe would hold the worker up
                await self._process.wait()

    async def _read(self, limit_seconds: float) -> bytes:
        # The second look is for a supervisor that was itself held up: what came meanwhile is read then.
        for patience_seconds in (limit_seconds, _SECOND_LOOK_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_seconds):
                    return await self._up.read(_READ_BYTES)
        self.kill(f"said nothing for {limit_seconds:g} s and was killed")
        return b""

    async def _died(self) -> WorkerDiedError:
        await self._ended(_LAST_WORDS_SECONDS)
        self.kill()  # in case it has closed its pipe and lives on
        await self._ended(_LAST_WORDS_SECONDS)
        exit_code = self._process.returncode
        cause = self._cause or ("cannot be ended" if exit_code is None else describe_exit(exit_code))
        tail = "".join(f"\n  | {line}" for line in self.last_lines)
        return WorkerDiedError(f"{self.name} {cause}" + (f"; the last of what it wrote:{tail}" if tail else ""))

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(_TAIL_BYTES):
            self._tail += data
            del self._tail[:-_TAIL_BYTES]
