"""Progress of long work: a bar on a terminal, now and then a line elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0

Advance = Callable[[int, int | None], None]
"""Called with the steps done and the steps in all (None: not known yet)."""


@contextmanager
def shown_progress(
    description: str, *, stream: TextIO | None = None, monotonic: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Yield a function that shows how far the work is, on stderr unless told otherwise."""
    console = Console(file=stream or sys.stderr)
    yield from _bar(description, console) if console.is_terminal else _lines(description, console, monotonic)


@contextmanager
def noted_if_slow(note: str, *, seconds: float = 2.0, stream: TextIO | None = None) -> Iterator[None]:
    """Print a note, on stderr unless told otherwise, if what happens inside takes longer than some seconds."""
    console = Console(file=stream or sys.stderr)
    timer = threading.Timer(seconds, console.print, args=(note,), kwargs={"highlight": False, "soft_wrap": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _bar(description: str, console: Console) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(description: str, console: Console, monotonic: Callable[[], float]) -> Iterator[Advance]:
    last = monotonic()

    def advance(done: int, total: int | None) -> None:
        nonlocal last
        now = monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            console.print(f"{description}: {done}{f' of {total}' if total else ''}", highlight=False, soft_wrap=True)

    yield advance
