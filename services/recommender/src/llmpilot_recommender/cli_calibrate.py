"""`llm-pilot dataset calibrate` and `requests`: what the performance model takes from the raw records."""

from pathlib import Path

import click

from llmpilot_recommender.raw_source import PROVENANCE
from llmpilot_servicekit.file_output import write_whole
from llmpilot_servicekit.progress import shown_progress


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The table to write.")
@click.option(
    "--users",
    multiple=True,
    type=click.IntRange(1),
    help="Fit on load tests with so many users only; give it several times. Without it: on all clean ones.",
)
def calibrate(path: Path, out: Path, users: tuple[int, ...]) -> None:
    """Fit step constants for every LLM and GPU profile in raw records (a folder or a tar archive of CSVs at PATH).

    Load tests in which 1 % or more of the requests failed are left out where there are others.
    """
    from llmpilot_perfmodel.steps.fitted import write_fitted  # noqa: PLC0415 numba only where it is needed
    from llmpilot_recommender.step_calibration import calibrate_raw  # noqa: PLC0415 and pyarrow

    with shown_progress("load tests read") as advance:
        rows = calibrate_raw(path, users=users, progress=advance)
    options = "".join(f" --users {count}" for count in users)
    comments = {**PROVENANCE, "command": f"llm-pilot dataset calibrate PATH --out FILE{options}"}
    write_whole(out, write_fitted(rows, comments).encode())
    click.echo(f"step constants of {len(rows)} pairs of an LLM and a GPU profile written to {out}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The table to write.")
def requests(path: Path, out: Path) -> None:
    """Write the lengths of the fixed list of requests that all load tests in raw records at PATH draw from."""
    from llmpilot_recommender.step_calibration import request_list  # noqa: PLC0415 pyarrow only where it is needed

    with shown_progress("load tests read") as advance:
        counts = request_list(path, progress=advance)
    comments = {**PROVENANCE, "command": "llm-pilot dataset requests PATH --out FILE"}
    lines = [f"# {key}: {value}" for key, value in comments.items()]
    lines.append("input_tokens,output_tokens,count")
    lines += [f"{inputs},{outputs},{count}" for (inputs, outputs), count in sorted(counts.items())]
    write_whole(out, "\n".join([*lines, ""]).encode())
    click.echo(f"{counts.total()} requests of {len(counts)} different lengths written to {out}")
