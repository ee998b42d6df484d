"""One worker process: started, spoken to over two pipes, watched, and never left behind.

Invariant: every wait for a worker has a limit, and a worker is ended with all processes it has made: it leads a session
of its own. A worker whose prober is killed is killed by the kernel, and reads the end of its pipe.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import msgspec

from llmpilot_servicekit.process_exit import describe_exit
from llmpilot_tuner.probes.worker_messages import Answer, Order, Run, pack, unpack_answer

WORKER_COMMAND = (sys.executable, "-P", "-m", "llmpilot_tuner.torch_worker")

_LARGEST_MESSAGE_BYTES = 1 << 20
_TAIL_BYTES = 32_768
_TAIL_LINES = 40
_READ_BYTES = 1 << 16
_SECOND_LOOK_SECONDS = 0.2
_LAST_WORDS_SECONDS = 1.0
_TERMINATE_SECONDS = 0.5


class WorkerDiedError(Exception):
    """A worker ended, or spoke what is no message and was killed."""

    def __init__(self, message: str, *, exit_code: int | None, log: str) -> None:
        self.exit_code = exit_code
        """None: it did not end by itself."""
        self.log = log
        super().__init__(message)


class WorkerSilentError(Exception):
    """A worker said nothing for too long."""


class WorkerProcess:
    """A worker; as a context it is ended at the end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        assert process.stdin is not None  # noqa: S101 as it was started
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        self._down, self._up = process.stdin, process.stdout
        self._cause = ""
        self._tail = bytearray()
        self._listening = asyncio.create_task(self._keep_tail(process.stderr), name=f"stderr of {name}")

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str] = WORKER_COMMAND, *, variables: Mapping[str, str] | None = None
    ) -> Self:
        """Start a worker with these environment variables beside the inherited ones."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            limit=_LARGEST_MESSAGE_BYTES,
            start_new_session=True,
            env=os.environ | (variables or {}),
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
        """Its process id, which is that of its process group too."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its process has not ended, as far as known."""
        return self._process.returncode is None

    @property
    def log(self) -> str:
        """The last lines that it wrote to its standard error."""
        return "\n".join(self._tail.decode(errors="replace").splitlines()[-_TAIL_LINES:])

    async def send(self, message: Order | Run) -> None:
        """Write a message. Says nothing if the worker is gone: `receive` does."""
        with contextlib.suppress(OSError):
            self._down.write(pack(message))
            await self._down.drain()

    async def receive(self, limit_seconds: float) -> Answer:
        """Return what the worker says next. Raises WorkerDiedError; WorkerSilentError: it lives, and says nothing."""
        line = await self._line(limit_seconds)
        try:
            if line.endswith(b"\n"):
                return unpack_answer(line)
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            self._cause = f"wrote what is no message ({error}) and was killed"
        raise await self._died()

    async def stop(self) -> None:
        """End the worker and all it has made: SIGTERM, then SIGKILL."""
        try:
            self._signal(signal.SIGTERM)
            await self._ended(_TERMINATE_SECONDS)
        finally:  # also when whoever stops it is cancelled
            self.kill()
        await self._ended(_LAST_WORDS_SECONDS)
        self._listening.cancel()
        self._process._transport.close()  # type: ignore[attr-defined]  # nothing else closes its pipes

    def kill(self) -> None:
        """End the worker and all it has made at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its leader, and its number is not given to another as long as it does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _line(self, limit_seconds: float) -> bytes:
        # The second look is for a prober that was itself held up: what came meanwhile is read then.
        for patience_seconds in (limit_seconds, _SECOND_LOOK_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_seconds):
                    try:
                        return await self._up.readline()
                    except ValueError as error:  # what readline says of a line that does not end
                        self._cause = f"wrote what is no message ({error}) and was killed"
                        return b""
        raise WorkerSilentError(f"{self.name} said nothing for {limit_seconds:g} s")

    async def _ended(self, limit_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                while await self._up.read(_READ_BYTES):
                    pass  # nobody wants it any more, but a full pipe would hold the worker up
                await self._process.wait()

    async def _died(self) -> WorkerDiedError:
        if not self._cause:
            await self._ended(_LAST_WORDS_SECONDS)
        self.kill()  # in case it has closed its pipe and lives on, or has children
        await self._ended(_LAST_WORDS_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._listening), _LAST_WORDS_SECONDS)
        exit_code = self._process.returncode
        cause = self._cause or ("cannot be ended" if exit_code is None else describe_exit(exit_code))
        return WorkerDiedError(f"{self.name} {cause}", exit_code=None if self._cause else exit_code, log=self.log)

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(_READ_BYTES):
            self._tail += data
            del self._tail[:-_TAIL_BYTES]
