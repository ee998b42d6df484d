"""`llm-pilot loadtest run`: its options. What it does is in cli_running.py, which imports much."""

from pathlib import Path
from typing import Any

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.cli_options import RunOptions, run_options
from llmpilot_loadtester.cli_spec import llm_config_of, spec_of
from llmpilot_servicekit.platform import Platform


@click.command()
@run_options
@click.option("--name", default="", help="Name: lower-case letters, digits, dashes.  [default: made up]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: the load test's name]")
@click.option("--format", "formats", help="Files beside the records, comma-separated.  [default: all]")
@click.option("--prometheus", metavar="HOST:PORT", help="Serve the live metrics there while the load test runs.")
@click.pass_obj
def run(
    platform: Platform, /, *, name: str, out: Path | None, formats: str | None, prometheus: str | None, **options: Any
) -> None:
    """Put an inference server under load, and report when every token arrived.

    Exit status: 0 if the numbers count, 1 if the load test failed or was cancelled, 2 if the command line is wrong,
    3 if the load tester itself was too slow or too late for its numbers to count.
    """
    from llmpilot_loadtester.cli_running import Outputs, run_load_test  # noqa: PLC0415 what it imports takes time
    from llmpilot_loadtester.outputs.report_files import FORMATS  # noqa: PLC0415

    asked = RunOptions(**options)
    spec, llm_config_json = spec_of(asked), llm_config_of(asked)
    wanted = tuple(FORMATS) if formats is None else tuple(part.strip() for part in formats.split(",") if part.strip())
    if unknown := sorted(set(wanted) - set(FORMATS)):
        problem = f"unknown: {', '.join(unknown)}; known: {', '.join(FORMATS)}"
        raise InvalidInputError([Violation("--format", problem)])
    outputs = Outputs(name=name, folder=out, formats=wanted, prometheus=prometheus)
    run_load_test(platform, spec, outputs, llm_config_json=llm_config_json)
