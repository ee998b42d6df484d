"""The table of a load test for a terminal: a row a stage."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.outputs.number_format import percent, shown

_COLUMNS = (
    "load",
    "requests",
    "errors",
    "TTFT ms\nmedian",
    "\np99",
    "ITL ms\nmedian",
    "\np99",
    "tokens\nper s",
    "goodput\nper s",
)
"""In two lines, as a row with its widest usual numbers has to fit into 80 columns."""


def stage_table(results: Sequence[StageResult]) -> Table:
    """Return a row for each stage: what it measured, and whether it counts."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "load" else "right")
    table.add_column("verdict")
    for result in results:
        metrics = result.metrics
        table.add_row(
            Text(result.stage.load.label),
            f"{metrics.request_count:,}",
            Text(percent(metrics.error_rate), style="red" if metrics.error_count else ""),
            shown(metrics.ttft.median_ms),
            shown(metrics.ttft.p99_ms),
            shown(metrics.itl.median_ms),
            shown(metrics.itl.p99_ms),
            shown(metrics.output_tokens_per_second),
            shown(metrics.goodput_requests_per_second),
            Text("valid", style="green") if result.verdict.is_valid else Text("not valid", style="red"),
        )
    return table


def remarks(results: Sequence[StageResult]) -> Iterator[Text]:
    """Yield what the table has no room for, each once: why stages do not count, notes, what failed."""
    labels: dict[tuple[str, str], list[str]] = {}
    for result in results:
        lines = [(f"not valid because {_lowered(reason)}", "red") for reason in result.verdict.reasons]
        lines += [(note, "") for note in result.verdict.notes]
        lines += [(f"{error.count:,} x {error.status}: {error.example}", "red") for error in result.metrics.errors]
        for line in lines:
            said_of = labels.setdefault(line, [])
            if result.stage.load.label not in said_of:
                said_of.append(result.stage.load.label)
    for (text, style), said_of in labels.items():
        yield Text(f"{', '.join(said_of)}: {text}", style=style)


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
