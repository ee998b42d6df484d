"""`llm-pilot tune`: its options. What it does is in cli_running.py, which imports much."""

from pathlib import Path
from typing import Any

import click

from llmpilot_tuner.cli_options import TuneOptions, tune_options

_path = click.Path(path_type=Path)


@click.command()
@tune_options
@click.option("--env-file", type=_path, help="Write the server's settings there, as NAME=value lines.")
@click.option("--result-file", type=_path, help="Write the weight alone there.")
@click.option("--report", type=_path, help="Write the report there, as JSON.")
@click.option("--html", type=_path, help="Write the report there, as a page with a plot.")
@click.option("--cache", type=_path, help="Folder to keep probes and results in; the same command goes on from there.")
@click.option("--nats", "nats_url", metavar="URL", help="Tell NATS there, too, that the weight was found.")
def tune(
    *,
    env_file: Path | None,
    result_file: Path | None,
    report: Path | None,
    html: Path | None,
    cache: Path | None,
    nats_url: str | None,
    **options: Any,
) -> None:
    """Find the largest maximum batch weight that no batch of requests can run out of memory with.

    Exit status: 0 if it was found, 1 if it was not, 2 if the command line is wrong, 130 if it was cancelled.
    """
    from llmpilot_tuner.cli_spec import spec_of  # noqa: PLC0415 what it imports takes time

    spec = spec_of(TuneOptions(**options))
    from llmpilot_tuner.cli_running import Outputs, tune_and_write  # noqa: PLC0415

    outputs = Outputs(
        report=report, html=html, env_file=env_file, result_file=result_file, cache=cache, nats_url=nats_url
    )
    tune_and_write(spec, outputs)
