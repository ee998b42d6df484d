"""`llm-pilot simulate`: what users of an LLM on a GPU profile would see, and a server that lets them see it.

Invariant: the subcommands import what they need when they run, so that each starts at once.
"""

import click

from llmpilot_simulator.cli_run import run
from llmpilot_simulator.cli_serve import serve


@click.group()
def simulate() -> None:
    """Simulate an inference server without a GPU."""


COMMANDS: tuple[click.Command, ...] = (run, serve)
for command in COMMANDS:
    simulate.add_command(command)
