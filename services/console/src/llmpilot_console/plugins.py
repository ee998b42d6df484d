"""Finds what installed distributions contribute: commands and services, by entry point.

Invariant: finding imports nothing; loading a command imports that command's module only.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

import click

from llmpilot_contracts.errors import NotFoundError, PreconditionError

COMMANDS_GROUP = "llmpilot.commands"
SERVICES_GROUP = "llmpilot.services"

_IMPORT_FAILURES = (ImportError, AttributeError, NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError)
"""What running a module for the first time may raise; shared libraries that do not load raise one of these too."""


def installed_commands() -> dict[str, EntryPoint]:
    """Return the entry points of all contributed commands by command name."""
    return _by_name(COMMANDS_GROUP)


def installed_services() -> dict[str, str]:
    """Return the module that `python -m` runs, for each installed service by name."""
    return {name: point.module.removesuffix(".__main__") for name, point in _by_name(SERVICES_GROUP).items()}


def module_of_service(name: str, services: Mapping[str, str]) -> str:
    """Return the module of one service; raises NotFoundError that lists the others."""
    if name not in services:
        known = ", ".join(sorted(services)) or "none"
        raise NotFoundError("service", name, hint=f"installed services: {known}")
    return services[name]


def load_command(point: EntryPoint) -> click.Command:
    """Import one command; one that does not load becomes a command that says so."""
    try:
        command: object = point.load()
    except _IMPORT_FAILURES as error:
        return _broken_command(point, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return _broken_command(point, f"{point.value} is no click command")
    return command


def _by_name(group: str) -> dict[str, EntryPoint]:
    # Of two with one name the first on the path wins, as with modules.
    return {point.name: point for point in reversed([*entry_points(group=group)])}


def _broken_command(point: EntryPoint, cause: str) -> click.Command:
    distribution = point.dist.name if point.dist else point.module
    first_line = cause.splitlines()[0]

    def complain(arguments: tuple[str, ...]) -> None:  # noqa: ARG001 - accepted so that this message wins over click's
        raise PreconditionError(
            f"{point.name!r} of {distribution} does not load ({first_line}); reinstall {distribution}"
        )

    return click.Command(
        point.name,
        callback=complain,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
        short_help=f"(does not load; reinstall {distribution})",
    )
