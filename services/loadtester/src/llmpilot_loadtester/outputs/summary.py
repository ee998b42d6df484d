"""The table of a load test for a terminal: a row a stage."""

from collections.abc import Sequence

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
    table.add_column("verdict", overflow="fold")
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
            _verdict(result),
        )
    return table


def _verdict(result: StageResult) -> Text:
    if result.verdict.is_valid:
        return Text("valid", style="green")
    return Text("not valid: " + "; ".join(result.verdict.reasons), style="red")
