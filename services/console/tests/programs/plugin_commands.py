"""Commands that a service might contribute."""

import signal

import click

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, UnavailableError, Violation
from llmpilot_servicekit.platform import Platform


@click.command()
def greet() -> None:
    """Say hello."""
    click.echo("hello")


@click.command()
def refuse_input() -> None:
    """Find two faults."""
    raise InvalidInputError([Violation("users", "must be > 0, is 0"), Violation("itl_ms", "must be > 0, is -1")])


@click.command()
def refuse() -> None:
    """Be in no state for it."""
    raise PreconditionError("no model is trained: run `llm-pilot train`")


@click.command()
def refuse_in_tasks() -> None:
    """Fail as a task group does."""
    raise ExceptionGroup("tasks", [UnavailableError("NATS does not answer: check that it runs")])


@click.command()
def interrupted() -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


@click.command()
@click.pass_obj
def hold(platform: Platform) -> None:
    """Use the service until Ctrl-C."""
    with platform.address_of("recommender") as address:
        click.echo(address)
        signal.pause()
