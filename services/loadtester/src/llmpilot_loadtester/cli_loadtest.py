"""`llm-pilot loadtest`: load tests of inference servers, and what was measured by them.

Invariant: the subcommands import what they need when they run, so that each starts at once.
"""

import click

from llmpilot_loadtester.cli_compare import compare
from llmpilot_loadtester.cli_import import import_
from llmpilot_loadtester.cli_report import report
from llmpilot_loadtester.cli_run import run


@click.group()
def loadtest() -> None:
    """Put an inference server under load, report what it did, compare load tests."""


COMMANDS: tuple[click.Command, ...] = (run, report, compare, import_)
for command in COMMANDS:
    loadtest.add_command(command)
