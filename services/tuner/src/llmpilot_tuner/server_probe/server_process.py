"""An inference server that is started here: its own process group, its log in a file, always ended.

Invariant: when `stop` returns, every process of the group was killed or has ended.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT

from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.process_exit import describe_exit

_GRACE_SECONDS = 5.0
"""What a server has to say goodbye; nothing that it holds is needed any more."""
_TAIL_BYTES = 65_536
_TAIL_LINES = 150


class LogFile:
    """What a server wrote since some point."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._mark_bytes = 0
        self.mark()

    def mark(self) -> None:
        """Let `since_mark` begin here."""
        with suppress(OSError):
            self._mark_bytes = self._path.stat().st_size if self._path else 0

    def since_mark(self) -> str:
        """Return what was written since."""
        return self._read(self._mark_bytes)

    def all(self) -> str:
        """Return everything."""
        return self._read(0)

    def tail(self) -> str:
        """Return the last lines."""
        return "\n".join(self._read(0, most_bytes=_TAIL_BYTES).splitlines()[-_TAIL_LINES:])

    def _read(self, start: int, *, most_bytes: int | None = None) -> str:
        if self._path is None:
            return ""
        try:
            with self._path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(start, 0 if most_bytes is None else end - most_bytes))
                return log.read().decode(errors="replace")
        except OSError:
            return ""


class ServerProcess:
    """A command that runs from `start` to `stop`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llm-pilot-tuner-")
        self.folder = Path(self._folder.name)
        self._log_path = self.folder / "server.log"
        self._log_path.touch()
        self.log = LogFile(self._log_path)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def ending(self) -> str | None:
        """How the process ended, in words; None: it runs."""
        if self._process is None or self._process.returncode is None:
            return None
        return describe_exit(self._process.returncode)

    async def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it; raises PreconditionError where the command cannot be run."""
        with self._log_path.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    env={**os.environ, **environment},
                    stdin=DEVNULL,
                    stdout=log,
                    stderr=STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise PreconditionError(
                    f"the server's command cannot be run: {command[0]}: {error.strerror or error}"
                ) from error

    async def stop(self) -> None:
        """Ask the group to end, and kill what is left of it."""
        process = self._process
        if process is not None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_GRACE_SECONDS):
                    await process.wait()
            except TimeoutError:
                pass
            finally:
                self._signal(signal.SIGKILL)  # the leader's children too, if they have outlived it
                await process.wait()
        self._folder.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            # its number is its group's as long as one of them lives, so it cannot be somebody else's yet
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
