"""`llm-pilot dataset`: make a dataset file from raw records, and tell a running platform about its measurements."""

import asyncio
from pathlib import Path

import click

from llmpilot_recommender.cli_calibrate import calibrate, requests
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import read_dataset, write_dataset
from llmpilot_recommender.measurement import Origin
from llmpilot_recommender.raw_source import PROVENANCE
from llmpilot_servicekit.progress import shown_progress


@click.group()
def dataset() -> None:
    """Make and publish characterization datasets."""


@dataset.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--published-medians",
    type=click.Path(path_type=Path),
    help="Published predictions CSV; its medians stand in for load tests whose records are missing.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The dataset file to write.")
def import_(path: Path, published_medians: Path | None, out: Path) -> None:
    """Turn raw request records (a folder or a tar archive of CSV files at PATH) into a dataset file."""
    from llmpilot_recommender.dataset_import import import_raw  # noqa: PLC0415 pyarrow only where it is needed

    with shown_progress("files imported") as advance:
        measurements = import_raw(path, published_medians=published_medians, progress=advance)
    command = "llm-pilot dataset import PATH --published-medians expected_predictions_LLM-Pilot.csv --out FILE"
    if not published_medians:
        command = "llm-pilot dataset import PATH --out FILE"
    write_dataset(out, measurements, {**PROVENANCE, "command": command})
    filled = sum(row.origin is Origin.PUBLISHED_MEDIAN for row in measurements)
    click.echo(
        f"{len(measurements)} measurements, {filled} of them published medians, written to {out},"
        f" version {Dataset(measurements).version}"
    )


@dataset.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--nats-url", required=True, help="Where the platform's NATS listens; `llm-pilot up` prints it.")
def publish(file: Path, nats_url: str) -> None:
    """Publish the measurements of a dataset FILE; every running recommender answers from them at once.

    Publishing the same measurements again changes nothing.
    """
    from llmpilot_recommender.publication import publish_measurements  # noqa: PLC0415 NATS only where it is needed

    measurements = read_dataset(file).measurements
    with shown_progress("measurements published") as advance:
        asyncio.run(publish_measurements(nats_url, measurements, advance))
    click.echo(f"{len(measurements)} measurements published to {nats_url}")


dataset.add_command(calibrate)
dataset.add_command(requests)
