"""`llm-pilot loadtest compare`: load tests side by side."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from llmpilot_loadtester.outputs.comparison import Comparison, Difference, StageComparison

WIDTH_OFF_TERMINAL = 160
CAVEAT = (
    "Intervals are of 95 % and of the noise within each run: of 20 equal figures about one differs by chance, and "
    "another run of the same server may differ by more."
)


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("others", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--seed", default=0, show_default=True, help="Of the intervals.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def compare(*, first: Path, others: tuple[Path, ...], seed: int, as_json: bool) -> None:
    """Compare records files with the FIRST, load by load, and say which differences are more than noise."""
    from rich.console import Console  # noqa: PLC0415 the compilers take half a second

    from llmpilot_loadtester.outputs import comparison  # noqa: PLC0415
    from llmpilot_loadtester.outputs.records_file import read_records  # noqa: PLC0415

    files = [read_records(path) for path in (first, *others)]
    compared = comparison.compare(files, seed=seed)
    names = comparison.names_of([first, *others])
    if as_json:
        click.echo(json.dumps(_json(compared, names), indent=2))
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OFF_TERMINAL)
    for file, name in zip(files, names, strict=True):
        profiles = sorted({stage.gpu_profile for stage in file.stages})
        words = ("simulated" * file.facts.simulated, file.facts.served_model, *profiles, file.facts.target_url)
        click.echo(f"{name}: {', '.join(word for word in words if word)}")
    for stage in compared.stages:
        click.echo()
        for doubt in stage.doubts:
            click.echo(doubt)
        console.print(_table(stage, names))
    if not compared.stages:
        click.echo("no load is in all of them")
    for label in compared.unmatched:
        click.echo(f"not in all of them: {label}")
    if compared.stages:
        click.echo(CAVEAT)


def _table(stage: "StageComparison", names: list[str]) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    from llmpilot_loadtester.outputs.comparison import shown_value  # noqa: PLC0415

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(stage.load)
    table.add_column(names[0], justify="right")
    for name in names[1:]:
        table.add_column(name, justify="right")
        table.add_column("against the first")
    for row in zip(*stage.differences, strict=True):
        cells = [row[0].metric, shown_value(row[0].first, row[0])]
        for one in row:
            cells += [shown_value(one.other, one), _coloured(one)]
        table.add_row(*cells)
    return table


def _coloured(difference: "Difference") -> str:
    colour = {None: "dim", True: "green", False: "red"}[difference.is_better]
    return f"[{colour}]{difference.sentence().replace('[', chr(92) + '[')}[/]"


def _json(compared: "Comparison", names: list[str]) -> dict[str, object]:
    return {
        "files": names,
        "stages": [
            {
                "load": stage.load,
                "doubts": list(stage.doubts),
                "against_first": {
                    name: [asdict(one) | {"is_seen": one.is_seen, "is_better": one.is_better} for one in differences]
                    for name, differences in zip(names[1:], stage.differences, strict=True)
                },
            }
            for stage in compared.stages
        ],
        "not_in_all": list(compared.unmatched),
        "note": CAVEAT,
    }
