"""`llm-pilot loadtest report`: every number and plot again, from the records file alone."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmpilot_contracts.errors import Violation

FORMATS = ("html", "json", "csv", "llm-d")
WIDTH_OFF_TERMINAL = 160
"""Of tables that go into a file or a pipe."""


@click.command()
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: named as RECORDS]")
@click.option("--format", "formats", default=",".join(FORMATS), show_default=True, help="Which files, between commas.")
@click.option("--ttft-ms", type=float, help="Limit of the time to first token.  [default: the load test's limits]")
@click.option("--nttft-ms", type=float, help="Limit of TTFT per input token.")
@click.option("--itl-ms", type=float, help="Limit of a request's mean inter-token latency.")
@click.option("--tpot-ms", type=float, help="Limit of the time per output token.")
@click.option("--end-to-end-ms", type=float, help="Limit of the whole request.")
@click.option("--share", type=float, help="Share of the requests that must be within the limits.  [default: 0.95]")
def report(
    *,
    records: Path,
    out: Path | None,
    formats: str,
    ttft_ms: float | None,
    nttft_ms: float | None,
    itl_ms: float | None,
    tpot_ms: float | None,
    end_to_end_ms: float | None,
    share: float | None,
) -> None:
    """Write reports on the load test whose records are in the Parquet file RECORDS.

    With a limit on the command line, only the limits given there count.
    """
    from rich.console import Console  # noqa: PLC0415 the compilers take half a second

    from llmpilot_contracts.errors import InvalidInputError  # noqa: PLC0415
    from llmpilot_loadtester.domain.spec import ServiceLevel  # noqa: PLC0415
    from llmpilot_loadtester.outputs.records_file import read_records  # noqa: PLC0415
    from llmpilot_loadtester.outputs.report_files import reported  # noqa: PLC0415
    from llmpilot_loadtester.outputs.summary import remarks, stage_table  # noqa: PLC0415

    wanted = tuple(part.strip() for part in formats.split(",") if part.strip())
    limits = {
        "--ttft-ms": ttft_ms,
        "--nttft-ms": nttft_ms,
        "--itl-ms": itl_ms,
        "--tpot-ms": tpot_ms,
        "--end-to-end-ms": end_to_end_ms,
    }
    if violations := _violations(wanted, limits, share):
        raise InvalidInputError(violations)
    level = ServiceLevel(
        ttft_ms=ttft_ms,
        nttft_ms=nttft_ms,
        itl_ms=itl_ms,
        tpot_ms=tpot_ms,
        end_to_end_ms=end_to_end_ms,
        share=ServiceLevel().share if share is None else share,
    )
    file = read_records(records)
    has_limits = any(limit is not None for limit in limits.values())
    written = reported(file, out or Path(records.stem), wanted, level if has_limits else None)
    if file.facts.simulated:
        click.echo("simulated: the server says of itself that it is a simulator")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OFF_TERMINAL)
    console.print(stage_table(written.results))
    for remark in remarks(written.results):
        console.print(remark, soft_wrap=True)
    for path in written.paths:
        click.echo(path)


def _violations(wanted: tuple[str, ...], limits: dict[str, float | None], share: float | None) -> list["Violation"]:
    from llmpilot_contracts.errors import Violation  # noqa: PLC0415

    violations = [
        Violation("--format", f"must be some of {', '.join(FORMATS)}, has {name!r}")
        for name in wanted
        if name not in FORMATS
    ]
    violations += [
        Violation(name, f"must be > 0, is {limit:g}")
        for name, limit in limits.items()
        if limit is not None and not limit > 0
    ]
    if share is not None and not 0 < share <= 1:
        violations.append(Violation("--share", f"must be > 0 and at most 1, is {share:g}"))
    if share is not None and all(limit is None for limit in limits.values()):
        violations.append(Violation("--share", "goes with a limit, e.g. --ttft-ms 500"))
    return violations
