"""`llm-pilot workload describe|compare|plot|profiles`: what is in a model."""

import json
from pathlib import Path

import click

from llmpilot_workload_generator.cli_options import open_model, output_violations, refuse


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def describe(model: str, as_json: bool) -> None:
    """Print the marginals, correlations and entropy of MODEL, a file or a profile."""
    from llmpilot_workload_generator import model_report, statistics  # noqa: PLC0415

    opened = open_model(model)
    description = statistics.describe(opened)
    if as_json:
        click.echo(json.dumps(model_report.description_json(opened, description), indent=2))
    else:
        model_report.print_description(opened, description)


@click.command()
@click.argument("model")
@click.argument("other")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def compare(model: str, other: str, as_json: bool) -> None:
    """Print how far the distributions of two models, files or profiles, are from each other."""
    from llmpilot_workload_generator import model_report, statistics  # noqa: PLC0415

    comparison = statistics.compare(open_model(model), open_model(other))
    if as_json:
        click.echo(json.dumps(model_report.comparison_json(comparison), indent=2))
    else:
        model_report.print_comparison(comparison, names=(Path(model).stem, Path(other).stem))


@click.command()
@click.argument("model")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the pictures.  [default: where the command runs]"
)
def plot(model: str, out: Path | None) -> None:
    """Draw marginal CDFs and the correlation heat map of MODEL, a file or a profile, as PNG and SVG."""
    from llmpilot_servicekit.file_output import make_folder, write_whole  # noqa: PLC0415
    from llmpilot_workload_generator.plots import model_figures  # noqa: PLC0415

    opened = open_model(model)
    folder = out or Path()
    make_folder(folder)
    stem = Path(model).stem
    figures = {folder / f"{stem}-{name}": content for name, content in model_figures(opened, title=stem).items()}
    refuse([violation for path in figures for violation in output_violations("--out", path)])
    for path, content in figures.items():
        write_whole(path, content)
        click.echo(path)


@click.command()
def profiles() -> None:
    """List the workload models that ship with LLM-Pilot."""
    from llmpilot_workload_generator import model_report  # noqa: PLC0415
    from llmpilot_workload_generator.profiles import PROFILE_NAMES, load_profile  # noqa: PLC0415

    model_report.print_profiles({name: load_profile(name) for name in PROFILE_NAMES})
