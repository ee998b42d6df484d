"""`llm-pilot workload`: workload models on this machine's disk, without a running service.

Invariant: the subcommands import what they need when they run, so that each starts at once.
"""

import click

from llmpilot_workload_generator.cli_fit import edges, fit, import_, merge
from llmpilot_workload_generator.cli_sample import sample
from llmpilot_workload_generator.cli_show import compare, describe, plot, profiles


@click.group()
def workload() -> None:
    """Fit workload models to traces of requests, look at them, and draw requests from them."""


COMMANDS: tuple[click.Command, ...] = (fit, import_, merge, edges, describe, compare, plot, profiles, sample)
for command in COMMANDS:
    workload.add_command(command)
