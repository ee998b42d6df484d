"""The programs a platform is made of: how each is started, and how to see that it is ready.

Invariant: the address of a member is chosen once; every later start of the same member uses it again.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from llmpilot_console.state_directory import ServiceAddresses
from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import nats_server_command, nats_server_url
from llmpilot_servicekit.neighbours import address_file_of

ANY_PORT = "127.0.0.1:0"
_HEALTH_CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command line and its environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


class Member(Protocol):
    """A program of the platform."""

    @property
    def name(self) -> str:
        """Name in messages and of the log file."""

    def prepare(self) -> Launch:
        """Clear what the run before left behind and say how to start."""

    async def is_ready(self) -> bool:
        """Whether the started program answers; called again until it does."""


class NatsMember:
    """The real nats-server with JetStream, on loopback."""

    name = "nats"

    def __init__(self, store: Path, *, environment: Mapping[str, str]) -> None:
        self._store = store
        self._environment = environment
        self._url: str | None = None

    @property
    def url(self) -> str:
        """Where clients connect; known once ready."""
        if self._url is None:
            raise PreconditionError("nats-server has not been started yet")
        return self._url

    def prepare(self) -> Launch:
        """Give the command line; raises PreconditionError if nats-server is not installed."""
        port = urlsplit(self._url).port if self._url else None
        return Launch(command=nats_server_command(self._store, port=port), environment=self._environment)

    async def is_ready(self) -> bool:
        """Whether the server has written the file that names its port."""
        url = nats_server_url(self._store)
        self._url = url or self._url
        return url is not None


class ServiceMember:
    """A service, run as `python -m module`."""

    def __init__(
        self, name: str, module: str, *, folder: Path, listen: str, nats_url: str, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._module = module
        self._folder = folder
        self._address_file = address_file_of(folder, name)
        self._addresses = ServiceAddresses(grpc=listen, metrics=ANY_PORT)
        self._nats_url = nats_url
        self._environment = environment

    @property
    def addresses(self) -> ServiceAddresses:
        """Where it listens; the real ports once ready."""
        return self._addresses

    def prepare(self) -> Launch:
        """Give the command line and the settings that make the service a part of this platform."""
        self._address_file.unlink(missing_ok=True)
        settings = {
            "LLMPILOT_LISTEN": self._addresses.grpc,
            "LLMPILOT_METRICS_LISTEN": self._addresses.metrics or ANY_PORT,
            "LLMPILOT_NATS_URL": self._nats_url,
            "LLMPILOT_ADDRESS_FILE": str(self._address_file),
            "LLMPILOT_ADDRESS_FOLDER": str(self._folder),
        }
        # -P: a file in the user's folder must not replace a module of the service.
        return Launch(command=(sys.executable, "-P", "-m", self._module), environment={**self._environment, **settings})

    async def is_ready(self) -> bool:
        """Whether the service has said where it listens and its health service says SERVING."""
        try:
            written = json.loads(self._address_file.read_text())
        except (FileNotFoundError, ValueError):  # not yet there, not whole yet
            return False
        try:
            await asyncio.to_thread(wait_until_serving, written["grpc"], _HEALTH_CHECK_SECONDS)
        except UnavailableError:
            return False
        self._addresses = ServiceAddresses(grpc=written["grpc"], metrics=written.get("metrics"))
        return True
