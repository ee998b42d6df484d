"""The folder in which a platform keeps what outlives it, and the note that says where it runs.

Invariant: at most one platform uses a state directory at a time (an advisory lock, which the kernel drops with its
holder).
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llmpilot_contracts.errors import PreconditionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAddresses:
    """Where one service listens, as host:port."""

    grpc: str
    metrics: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPlatform:
    """Where a platform runs."""

    pid: int
    """The supervisor's."""
    nats_url: str
    services: Mapping[str, ServiceAddresses]


def default_state_path(environment: Mapping[str, str]) -> Path:
    """Return LLMPILOT_HOME, else the folder llm-pilot in the XDG state folder."""
    if home := environment.get("LLMPILOT_HOME"):
        return Path(home).expanduser()
    state_home = environment.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state_home).expanduser() / "llm-pilot"


class StateDirectory:
    """A state directory on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.nats_store = path / "nats"
        self._note = path / "platform.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and hold it; raises PreconditionError that says who holds it already."""
        with self._opened_lock() as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PreconditionError(self._describe_holder()) from error
            yield

    def announce(self, platform: RunningPlatform) -> None:
        """Write the note, whole or not at all."""
        draft = self._note.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(platform), indent=2) + "\n")
        draft.replace(self._note)

    def withdraw(self) -> None:
        """Remove the note."""
        self._note.unlink(missing_ok=True)

    def announced(self) -> RunningPlatform | None:
        """Return the platform of the note if its process is alive; whether it serves is for the caller to ask."""
        try:
            platform = _parse(json.loads(self._note.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return platform if _is_alive(platform.pid) else None

    def _opened_lock(self) -> TextIO:
        try:
            for folder in (self.path, self.logs, self.nats_store):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return (self.path / "lock").open("w")
        except OSError as error:
            raise PreconditionError(
                f"cannot write to the state directory {self.path} ({error.strerror}); "
                "name another with --state-dir or LLMPILOT_HOME"
            ) from error

    def _describe_holder(self) -> str:
        platform = self.announced()
        if platform is None:
            return f"another platform is starting or stopping in {self.path}; try again, or use another --state-dir"
        where = ", ".join(f"{name} at {addresses.grpc}" for name, addresses in platform.services.items())
        return (
            f"a platform already runs in {self.path} (process {platform.pid}; {where}); "
            "use it, stop it, or use another --state-dir"
        )


def _parse(note: Any) -> RunningPlatform:
    return RunningPlatform(
        pid=int(note["pid"]),
        nats_url=str(note["nats_url"]),
        services={
            str(name): ServiceAddresses(grpc=str(addresses["grpc"]), metrics=addresses.get("metrics"))
            for name, addresses in note["services"].items()
        },
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True
