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
    "TTFT median ms",
    "p99",
    "ITL median ms",
    "p99",
    "tokens/s",
    "goodput req/s",
)


def stage_table(results: Sequence[StageResult]) -> Table:
    """Return a row for each stage: what it measured, and whether it counts."""
    table = Table(box=None, header_style="bold", pad_edge=False)
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
    """Yield what the table has no room for, a line each: why a stage does not count, notes, what failed."""
    said = set()
    for result in results:
        label = result.stage.load.label
        lines = [(f"{label}: not valid because {_lowered(reason)}", "red") for reason in result.verdict.reasons]
        lines += [(f"{label}: {note}", "") for note in result.verdict.notes]
        lines += [
            (f"{label}: {error.count:,} x {error.status}: {error.example}", "red") for error in result.metrics.errors
        ]
        for line, style in lines:
            if line not in said:
                said.add(line)
                yield Text(line, style=style)


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
