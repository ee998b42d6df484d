"""The `llm-pilot` command: its own subcommands and those that installed services contribute.

Invariant: choosing one subcommand imports no other's module, and no PilotError leaves as a traceback.
"""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import IO, Any

import click

from llmpilot_console.local_platform import LocalPlatform
from llmpilot_console.plugins import COMMANDS_GROUP, installed_commands, load_command
from llmpilot_contracts.errors import InvalidInputError, PilotError

OWN_COMMANDS = (EntryPoint(name="up", value="llmpilot_console.up:up", group=COMMANDS_GROUP),)


class Refusal(click.ClickException):
    """Why a command ended, as the terminal shows it."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message alone on stderr."""
        click.echo(self.message, file=file, err=True)


class InvalidInputRefusal(Refusal):
    """The input was wrong; the exit code is that of a wrong option."""

    exit_code = 2


class Cancellation(Refusal):
    """Ctrl-C; the exit code is that of a process that SIGINT ended, as shells have it."""

    exit_code = 130


class PilotGroup(click.Group):
    """A group whose subcommands are imported when they are needed."""

    def __init__(self, *, find_commands: Callable[[], Mapping[str, EntryPoint]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._find_commands = find_commands

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of all subcommands."""
        return sorted(self._find_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import and return one subcommand."""
        point = self._find_commands().get(cmd_name)
        return load_command(point) if point else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the chosen subcommand, or suggest the ones with a similar name."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            names = self.list_commands(ctx)
            raise click.NoSuchCommand(error.command_name, possibilities=names, ctx=ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen subcommand and turn its errors into what the terminal shows."""
        try:
            return super().invoke(ctx)
        except (PilotError, ExceptionGroup) as error:
            from llmpilot_servicekit.status import sole_cause  # noqa: PLC0415 gRPC, which not every command needs

            cause = sole_cause(error)
            if not isinstance(cause, PilotError):
                raise
            kind = InvalidInputRefusal if isinstance(cause, InvalidInputError) else Refusal
            raise kind(describe(cause)) from error
        except KeyboardInterrupt as error:
            raise Cancellation("cancelled") from error


def describe(error: PilotError) -> str:
    """Word an error for a terminal, one line per violation."""
    if isinstance(error, InvalidInputError):
        return "\n".join(["error: the input is not valid", *(f"  - {violation}" for violation in error.violations)])
    return f"error: {error}"


def all_commands() -> dict[str, EntryPoint]:
    """Return the entry points of contributed and own commands; own ones cannot be replaced."""
    return installed_commands() | {point.name: point for point in OWN_COMMANDS}


@click.pass_context
def _provide_platform(context: click.Context) -> None:
    context.obj = LocalPlatform(environment=os.environ)


pilot = PilotGroup(
    name="llm-pilot",
    find_commands=all_commands,
    callback=_provide_platform,
    help="""Find the GPU and the number of pods that serve an LLM to your users within your latency limits, at the
    lowest cost.

    Every command works at once: it uses the service that LLMPILOT_<SERVICE>_ADDRESS names, else the platform that
    `llm-pilot up` keeps running on this machine, else it starts what it needs and stops it again.
    """,
)
click.version_option(package_name="llm-pilot", prog_name="llm-pilot")(pilot)
