"""How a tuning goes, while it goes: a line per probe, and on a terminal a bar of the cases of the one under way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmpilot_tuner.domain.events import (
    CaseRan,
    Note,
    ProbeEnded,
    ProbeStarted,
    RunEvent,
    SoakStarted,
    TuningEnded,
    TuningStarted,
)
from llmpilot_tuner.domain.probing import CaseRun, Outcome, Probe
from llmpilot_tuner.outputs.words import count, memory, seconds

Show = Callable[[RunEvent], None]


@contextmanager
def progress_view(console: Console) -> Iterator[Show]:
    """Yield a function that shows what happens in a tuning."""
    if not console.is_terminal:
        yield _Lines(lambda line: _print(console, line)).show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        lines = _Lines(lambda line: _print(progress.console, line))
        task = progress.add_task("starting", total=None)

        def show(event: RunEvent) -> None:
            lines.show(event)
            match event:
                case ProbeStarted(weight=weight, case_count=case_count):
                    progress.reset(task, description=f"weight {count(weight)}", total=case_count)
                case SoakStarted(weight=weight, step_count=step_count):
                    progress.reset(task, description=f"final verdict on {count(weight)}", total=step_count)
                case CaseRan():
                    progress.advance(task)
                case _:
                    pass

        yield show


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    """Words every event worth a line."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._capacity_bytes = 0
        self._why = ""
        self._soaked: int | None = None

    def show(self, event: RunEvent) -> None:
        match event:
            case TuningStarted():
                self._capacity_bytes = event.facts.capacity_bytes
                self._tell(_start(event))
            case ProbeStarted(why=why):
                self._why, self._soaked = why, None
            case ProbeEnded(probe=probe):
                self._tell(self._probe(probe))
            case SoakStarted(weight=weight, step_count=step_count):
                self._soaked = weight
                self._tell(f"final verdict on {count(weight)}: {step_count} steps")
            case CaseRan(run=run):
                if self._soaked is not None and run.outcome is Outcome.OUT_OF_MEMORY:
                    self._tell(f"{count(self._soaked)} did not last: out of memory in {run.batch.case}; lowering it")
            case Note(text=text):
                self._tell(text)
            case TuningEnded():
                pass

    def _probe(self, probe: Probe) -> str:
        spent = seconds(sum(run.seconds for run in probe.runs))
        head = f"weight {count(probe.weight)}, {self._why}:"
        if not probe.passed:
            run = probe.runs[-1]
            return f"{head} out of memory in {run.batch.case}{self._peak(run)}, {spent}"
        largest = max(probe.runs, key=lambda run: max(run.peak_bytes or 0, run.reserved_bytes or 0))
        return f"{head} passed {len(probe.runs)} cases{self._peak(largest)}, {spent}"

    def _peak(self, run: CaseRun) -> str:
        needed = max(run.peak_bytes or 0, run.reserved_bytes or 0)
        if not needed:
            return ""
        of_capacity = f"{memory(needed)} of {memory(self._capacity_bytes)}"
        return (
            f" at {of_capacity}"
            if run.outcome is Outcome.OUT_OF_MEMORY
            else f", most {of_capacity} in {run.batch.case}"
        )


def _start(event: TuningStarted) -> str:
    facts = event.facts
    predicted = "no prediction" if event.predicted_weight is None else f"predicted {count(event.predicted_weight)}"
    return (
        f"{facts.kind.value} probe on {facts.device}: {memory(facts.weight_bytes)} of weights in "
        f"{memory(facts.capacity_bytes)}; weights from {count(event.lowest_weight)} to {count(event.highest_weight)}, "
        f"{predicted}"
    )
