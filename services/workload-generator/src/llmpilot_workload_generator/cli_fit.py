"""`llm-pilot workload fit|import|merge|edges`: from traces to model files."""

from contextlib import ExitStack
from pathlib import Path

import click

from llmpilot_contracts.errors import Violation
from llmpilot_workload_generator.cli_options import (
    arrival_options,
    bins_violations,
    command_line,
    names,
    open_edges,
    open_model,
    output_violations,
    pairs,
    read_arrivals,
    refuse,
)
from llmpilot_workload_generator.model import MAX_BINS
from llmpilot_workload_generator.traces.formats import FORMAT_NAMES

SUFFIX = ".workload"


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The model file.  [default: named as PATH, here]")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMAT_NAMES),
    help="The trace's format; table: of no publisher.  [default: found by its columns]",
)
@click.option(
    "--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Which column of the file a parameter is."
)
@click.option("--parameters", default="", metavar="NAMES", help="What to keep, between commas.  [default: all]")
@click.option("--bins", "max_bins", type=int, help="Most bins of a parameter, 2 to 256.  [default: 64]")
@click.option("--edges", type=click.Path(path_type=Path), help="Take the bins of this edges file, model or profile.")
@click.option("--keep-replay", is_flag=True, help="Keep the requests in their order, too, to replay the trace.")
@arrival_options
@click.option("--source", default="", help="What to say about where the trace comes from.")
@click.option("--licence", default="", help="Licence of the trace.")
@click.pass_context
def fit(
    context: click.Context,
    *,
    path: Path,
    out: Path | None,
    format_name: str | None,
    columns: tuple[str, ...],
    parameters: str,
    max_bins: int | None,
    edges: Path | None,
    keep_replay: bool,
    arrival_kind: str | None,
    rate: float | None,
    burstiness: float | None,
    speed: float | None,
    source: str,
    licence: str,
) -> None:
    """Fit a model to the trace at PATH: a CSV, JSONL, JSON or Parquet file, or a folder of partitions."""
    from llmpilot_servicekit.progress import noted_if_slow, shown_progress  # noqa: PLC0415
    from llmpilot_workload_generator.files.model_file import write_model  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_workload_generator.fitting.fit import FitOptions  # noqa: PLC0415
    from llmpilot_workload_generator.fitting.fit import fit as fit_model  # noqa: PLC0415
    from llmpilot_workload_generator.traces.reader import open_trace  # noqa: PLC0415

    target = out or Path(path.resolve().name.split(".", maxsplit=1)[0] + SUFFIX)
    violations = output_violations("--out", target, inputs=[path, *([edges] if edges else [])])
    if max_bins is not None:
        violations += bins_violations(max_bins)
        if edges is not None:
            violations.append(Violation("--bins", "cannot go with --edges, which says what the bins are"))
    named = pairs("--column", columns, violations)
    arrivals = read_arrivals(arrival_kind, rate=rate, burstiness=burstiness, speed=speed, violations=violations)
    if arrival_kind == "trace" and not keep_replay:
        violations.append(Violation("--arrivals", "trace needs --keep-replay"))
    refuse(violations)
    trace = open_trace(
        path,
        format_name=format_name,
        parameters=names(parameters),
        columns=named,
    )
    options = FitOptions(
        max_bins=max_bins or MAX_BINS,
        edges=open_edges(edges) if edges else None,
        keep_replay=keep_replay,
        source=source,
        licence=licence,
        command=command_line(context, dict(context.params)),
        **({"arrivals": arrivals} if arrivals else {}),
    )
    with shown_progress("bytes read") as advance, ExitStack() as until_it_runs:
        until_it_runs.enter_context(noted_if_slow(COMPILING))

        def advance_compiled(done: int, in_all: int | None) -> None:
            until_it_runs.close()
            advance(done, in_all)

        model = fit_model(trace, options, advance=advance_compiled)
    write_model(target, model)
    _say_written(target, model.request_count, len(model.keys), skipped=model.provenance.skipped_row_count)


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The model file.")
@click.option("--use-case", help="Which one of a file of published length distributions.")
@click.pass_context
def import_(context: click.Context, *, path: Path, out: Path, use_case: str | None) -> None:
    """Turn a model that others published into a model file: fmperf's pickle, or a CSV of length distributions."""
    from llmpilot_workload_generator.files.model_file import write_model  # noqa: PLC0415
    from llmpilot_workload_generator.imports.model_import import import_model  # noqa: PLC0415

    refuse(output_violations("--out", out, inputs=[path]))
    model = import_model(path, use_case=use_case, command=command_line(context, dict(context.params)))
    write_model(out, model)
    _say_written(out, model.request_count, len(model.keys))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The model file.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Add up models, files or profiles, with the same edges, as if one had been fitted to all their traces."""
    from llmpilot_workload_generator.files.model_file import write_model  # noqa: PLC0415
    from llmpilot_workload_generator.fitting.merging import merge_models  # noqa: PLC0415

    refuse(output_violations("--out", out))
    model = merge_models([open_model(str(file)) for file in files])
    write_model(out, model)
    _say_written(out, model.request_count, len(model.keys))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--bins", "max_bins", default=MAX_BINS, show_default=True, help="Most bins of a parameter, 2 to 256.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The edges file, JSON.")
def edges(files: tuple[Path, ...], max_bins: int, out: Path) -> None:
    """Find the edges that suit several models, files or profiles, for `fit --edges` on each of their traces."""
    from llmpilot_workload_generator.files.edges_file import write_edges  # noqa: PLC0415
    from llmpilot_workload_generator.fitting.merging import common_bins  # noqa: PLC0415

    refuse([*output_violations("--out", out, inputs=files), *bins_violations(max_bins)])
    bins = common_bins([open_model(str(file)) for file in files], max_bins=max_bins)
    write_edges(out, bins)
    click.echo(f"edges of {', '.join(f'{b.name} ({len(b)} bins)' for b in bins)} written to {out}")


COMPILING = "compiling the kernels, once after an installation ..."


def _say_written(path: Path, request_count: int, cell_count: int, *, skipped: int = 0) -> None:
    left_out = f", {skipped:,} failed ones left out" if skipped else ""
    size = f"{path.stat().st_size / 1000:.1f} kB"
    cells = f"{cell_count:,} cell{'s' * (cell_count != 1)}"
    click.echo(f"{request_count:,} request{'s' * (request_count != 1)}{left_out}, {cells}, {size}, written to {path}")
    click.echo(f"look at it with: llm-pilot workload describe {path}")
