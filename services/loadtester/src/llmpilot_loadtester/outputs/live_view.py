"""How a load test goes, while it goes: a table that renews itself on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from llmpilot_loadtester.domain.events import LiveMetrics, StageBegan
from llmpilot_loadtester.outputs.summary import stage_table
from llmpilot_loadtester.outputs.watched_run import WatchedRun

SECONDS_BETWEEN_LINES = 5.0
_REFRESH_PER_SECOND = 5

Show = Callable[[WatchedRun], None]


@contextmanager
def live_view(console: Console) -> Iterator[Show]:
    """Yield a function that shows how far a load test is."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True) as live:
            yield lambda run: live.update(_screen(run))
    else:
        yield _Lines(console).show


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        self._shown_stage = -1

    def show(self, run: WatchedRun) -> None:
        running, live, now = run.running, run.live, time.monotonic()
        if running is None:
            return
        if running.stage_index != self._shown_stage:
            self._shown_stage, self._last = running.stage_index, now
            self._print(_title(running))
        elif live is not None and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._print(f"  {live.phase} {live.elapsed_seconds:.0f} s: {_words(live)}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _screen(run: WatchedRun) -> RenderableType:
    parts: list[RenderableType] = []
    if run.results:
        parts.append(stage_table(run.ordered_results))
    if run.running is None:
        parts.append("waiting for the target ..." if not run.results else "next stage ...")
        return Group(*parts)
    live = run.live
    stage = run.running.stage
    total_seconds = stage.warm_up_seconds + stage.measure_seconds
    line = Table.grid(padding=(0, 2))
    elapsed_seconds = live.elapsed_seconds if live else 0.0
    bar = ProgressBar(total=total_seconds, completed=min(elapsed_seconds, total_seconds), width=30)
    phase = f"{live.phase} {elapsed_seconds:.0f} of {total_seconds:.0f} s" if live else "starting"
    line.add_row(_title(run.running), bar, phase)
    parts.append(line)
    if live:
        parts.append(_words(live))
    return Group(*parts)


def _title(running: StageBegan) -> str:
    attempt = f", attempt {running.attempt}" if running.attempt > 1 else ""
    return f"stage {running.stage_index + 1} of {running.stage_count}: {running.stage.load.label}{attempt}"


def _words(live: LiveMetrics) -> str:
    words = [f"{live.sent_count:,} sent", f"{live.in_flight_count:,} under way", f"{live.ok_count:,} ok"]
    words += [f"{live.error_count:,} failed"] * (live.error_count > 0)
    words.append(f"{live.tokens_per_second:,.0f} tokens/s")
    if live.ttft_median_ms is not None:
        words.append(f"TTFT {live.ttft_median_ms:,.1f} ms")
    if live.itl_median_ms is not None:
        words.append(f"ITL {live.itl_median_ms:,.2f} ms")
    return ", ".join([*words, f"client {live.worker_cpu:.0%} of a core"])
