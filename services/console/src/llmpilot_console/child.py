"""One child process of the supervisor: started again and again, stopped with patience, never left behind.

Invariant: the process dies with the thread that started it (Linux, see `tether`), and is its own process group, so that
a terminal's Ctrl-C does not reach it.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

from llmpilot_console import tether
from llmpilot_console.members import Launch

_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 16_384


class Child:
    """A process and its log file."""

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._log_start_bytes = 0
        if log_path.exists():
            log_path.replace(log_path.with_suffix(".log.1"))

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs or before the first start."""
        return self._process.returncode if self._process else None

    async def start(self, launch: Launch) -> None:
        """Start the process; its output is appended to the log."""
        # -I -S: the launcher needs nothing but the standard library, and starts in milliseconds.
        launcher = (sys.executable, "-I", "-S", tether.__file__, str(os.getpid()))
        with self.log_path.open("ab") as log:
            self._log_start_bytes = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *launcher,
                *launch.command,
                env=launch.environment,
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    async def wait(self) -> int:
        """Wait for the end of the process and return its exit code; 0 before the first start."""
        return await self._process.wait() if self._process else 0

    async def stop(self, grace_seconds: float) -> None:
        """Ask the process to end, and kill it after `grace_seconds`."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(grace_seconds):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End the process and what it started at once."""
        if self._process and self._process.returncode is None:  # not reaped, so its number is still its own
            with suppress(ProcessLookupError):  # reaped this moment
                os.killpg(self._process.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """Return the last lines since the latest start."""
        with self.log_path.open("rb") as log:
            end_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_bytes, end_bytes - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])
