"""Finds a service for a command: a named address, a running platform, or one started for this command only.

Invariant: what was started for a command is stopped with it, also after an error or Ctrl-C.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from llmpilot_console.plugins import installed_services, module_of_service
from llmpilot_console.state_directory import RunningPlatform, StateDirectory, default_state_path
from llmpilot_contracts.errors import InvalidInputError, UnavailableError, Violation
from llmpilot_servicekit.address import split_address

_HEALTH_CHECK_SECONDS = 2.0


class LocalPlatform:
    """The platform of this machine, as commands see it."""

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        find_services: Callable[[], Mapping[str, str]] = installed_services,
    ) -> None:
        self._environment = environment
        self._find_services = find_services

    @contextmanager
    def address_of(self, service: str, *, beside: Sequence[str] = ()) -> Iterator[str]:
        """Give the gRPC address of a service; raises NotFoundError if no installed distribution provides it.

        Where it must be started, those `beside` it are too, unless a variable names their address.
        """
        address = self._named_address_of(service) or self._running_address_of(service)
        if address:
            yield address
            return
        installed = self._find_services()
        started = [service, *(name for name in beside if not self._named_address_of(name))]
        modules = {name: module_of_service(name, installed) for name in started}
        with _temporary_platform(modules) as platform:
            yield platform.services[service].grpc

    def _named_address_of(self, service: str) -> str | None:
        variable = address_variable(service)
        address = self._environment.get(variable)
        if not address:
            return None
        try:
            split_address(address)
        except ValueError as error:
            raise InvalidInputError([Violation(variable, f"{error}, is {address!r}")]) from error
        return address

    def _running_address_of(self, service: str) -> str | None:
        platform = StateDirectory(default_state_path(self._environment)).announced()
        if platform is None or service not in platform.services:
            return None
        from llmpilot_servicekit.client import wait_until_serving  # noqa: PLC0415 gRPC, which many commands do without

        address = platform.services[service].grpc
        try:
            wait_until_serving(address, _HEALTH_CHECK_SECONDS)
        except UnavailableError:
            return None
        return address


def address_variable(service: str) -> str:
    """Return the environment variable that names a service's address, e.g. LLMPILOT_RECOMMENDER_ADDRESS."""
    return f"LLMPILOT_{service.upper().replace('-', '_')}_ADDRESS"


@contextmanager
def _temporary_platform(modules: Mapping[str, str]) -> Iterator[RunningPlatform]:
    from rich.console import Console  # noqa: PLC0415

    from llmpilot_console.supervisor import Supervisor, running_in_background  # noqa: PLC0415 only where it starts one

    console = Console(stderr=True)
    kept = "it" if len(modules) == 1 else "them"
    message = f"starting the {' and the '.join(modules)} for this command (`llm-pilot up` keeps {kept} running) ..."
    status = console.status(message)
    if console.is_terminal:
        status.start()
    else:
        console.print(message, highlight=False, soft_wrap=True)
    try:
        with tempfile.TemporaryDirectory(prefix="llm-pilot-") as folder:
            supervisor = Supervisor(Path(folder), modules, report=lambda line: click.echo(line, err=True))
            with running_in_background(supervisor) as run:
                status.stop()
                yield run.platform
    finally:
        status.stop()
