"""What `llm-pilot tune` does: runs the tuning, shows how it goes, writes what came of it.

Invariant: nothing is written before the weight is found, and then every file is whole or not there. Whatever ends the
command, no worker stays, and with --cache what was probed is kept.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console

from llmpilot_contracts.errors import InvalidInputError, PilotError, Violation
from llmpilot_servicekit.file_output import write_whole
from llmpilot_tuner.cli_spec import in_options, words_in_options
from llmpilot_tuner.domain.cache_key import cache_key
from llmpilot_tuner.domain.events import Note, ProbeEnded, RunEvent, TuningEnded, TuningStarted
from llmpilot_tuner.domain.plan import Plan
from llmpilot_tuner.domain.probing import NoSafeWeightError, ProbeError
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.kept_tunings import Kept, KeptTunings
from llmpilot_tuner.outputs.html_report import html_report
from llmpilot_tuner.outputs.progress_view import progress_view
from llmpilot_tuner.outputs.report import Report, report_of, report_text
from llmpilot_tuner.outputs.server_settings import environment_file
from llmpilot_tuner.outputs.summary import facts_table, headroom_table
from llmpilot_tuner.tuning_run import TuningRun

_WIDTH_OFF_TERMINAL = 140
_LOG_LINES = 20
EXIT_CANCELLED = 130

Show = Callable[[RunEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where the result goes; None: nowhere."""

    report: Path | None = None
    html: Path | None = None
    env_file: Path | None = None
    result_file: Path | None = None
    """The number alone."""
    cache: Path | None = None
    """A folder that results and probes are kept in."""
    nats_url: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Return the files by their options."""
        named = {
            "--report": self.report,
            "--html": self.html,
            "--env-file": self.env_file,
            "--result-file": self.result_file,
        }
        return {option: path for option, path in named.items() if path is not None}


def tune_and_write(spec: TuningSpec, outputs: Outputs) -> None:
    """Tune to the end and write the files; leaves the process with exit status 130 on Ctrl-C."""
    _require_writable(outputs)
    plan = _plan(spec)
    keeper = _Keeper(spec, KeptTunings(outputs.cache, spec) if outputs.cache and spec.is_repeatable else None)
    try:
        with progress_view(_console(sys.stderr)) as show, _sigterm_restored():
            result = asyncio.run(_cancelled_by_sigterm(spec, keeper, show))
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo(f"cancelled; {keeper.how_to_go_on()}", err=True)
        sys.exit(EXIT_CANCELLED)
    except InvalidInputError as error:  # what only a server, or a worker, could say
        raise in_options(error) from error
    except NoSafeWeightError as error:
        raise NoSafeWeightError(words_in_options(str(error))) from error
    except ProbeError as error:
        _tell_log(error)
        raise type(error)(words_in_options(str(error)), log=error.log) from error
    report = report_of(result, spec, plan)
    for path in _write(report, plan, outputs):
        click.echo(f"written: {path}", err=True)
    _tell(report)
    if outputs.nats_url:
        _publish(result, spec, report, outputs.nats_url)


def _plan(spec: TuningSpec) -> Plan:
    try:
        return TuningRun(spec).plan
    except InvalidInputError as error:
        raise in_options(error) from error


def _console(stream: object) -> Console:
    is_terminal = getattr(stream, "isatty", bool)()
    return Console(file=stream, width=None if is_terminal else _WIDTH_OFF_TERMINAL)  # type: ignore[arg-type] # a stream


def _require_writable(outputs: Outputs) -> None:
    """Raise InvalidInputError for every file that could not be written after a long tuning."""
    violations = []
    seen: dict[Path, str] = {}
    for option, path in outputs.files.items():
        other = seen.setdefault(path.absolute(), option)
        if other != option:
            violations.append(Violation(option, f"{path} is the file of {other} already"))
        if path.is_dir():
            violations.append(Violation(option, f"{path} is a folder: name a file"))
        elif not path.parent.is_dir():
            violations.append(Violation(option, f"{path.parent} is no folder: make it first"))
        elif not os.access(path.parent, os.W_OK):
            violations.append(Violation(option, f"{path.parent} cannot be written"))
    if violations:
        raise InvalidInputError(violations)


class _Keeper:
    """Keeps probes as they come, if there is a folder for them."""

    def __init__(self, spec: TuningSpec, file: KeptTunings | None) -> None:
        self._spec = spec
        self._file = file
        self.kept = file.read() if file else Kept()

    def take(self, event: RunEvent) -> None:
        """Keep what an event brings."""
        match event:
            case TuningStarted(facts=facts):
                self.kept = replace(self.kept, key=cache_key(self._spec, facts))
            case ProbeEnded(probe=probe) if self._spec.goes_on_from_probes:
                self.kept = replace(self.kept, probes=(*self.kept.probes, probe))
                self._write()
            case TuningEnded(result=result):
                self.kept = replace(self.kept, result=result)
                self._write()
            case _:
                pass

    def forget(self) -> None:
        """Begin anew."""
        self.kept = Kept()

    def how_to_go_on(self) -> str:
        """Say what is kept, and what to do about it."""
        if not self._spec.goes_on_from_probes:
            return "nothing is kept: with a server the same command begins anew"
        if self._file is None:
            return "nothing is kept: with --cache FOLDER the same command would go on where it stopped"
        count = len(self.kept.probes)
        return (
            f"{count} probe{'' if count == 1 else 's'} kept in {self._file.path}: the same command goes on from there"
        )

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self.kept)


@contextmanager
def _sigterm_restored() -> Iterator[None]:
    """Put back what SIGTERM did: an event loop that ends leaves it to end the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def _cancelled_by_sigterm(spec: TuningSpec, keeper: _Keeper, show: Show) -> TuningResult:
    """Follow a tuning; SIGTERM cancels it as Ctrl-C does."""
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    return await _follow(spec, keeper, show)


async def _follow(spec: TuningSpec, keeper: _Keeper, show: Show) -> TuningResult:
    result = await _run(spec, keeper, show)
    if result is None:
        keeper.forget()
        result = await _run(spec, keeper, show)
    if result is None:
        raise RuntimeError("a tuning that keeps nothing has nothing to disagree with")
    return result


async def _run(spec: TuningSpec, keeper: _Keeper, show: Show) -> TuningResult | None:
    """Return the result; None: what was kept is of another device or other versions."""
    kept = keeper.kept
    async with aclosing(TuningRun(spec, kept=kept.probes).events()) as events:
        async for event in events:
            if isinstance(event, TuningStarted) and kept.key:
                if kept.key != cache_key(spec, event.facts):
                    show(Note(text="what is kept is of another device or other versions: it is tuned anew"))
                    return None
                if kept.result is not None:
                    show(Note(text=f"found before, in {kept.result.elapsed_seconds:.1f} s: this is the kept result"))
                    return kept.result
                if kept.probes:
                    show(Note(text=f"going on after {len(kept.probes)} kept probes"))
            keeper.take(event)
            show(event)
            if isinstance(event, TuningEnded):
                return event.result
    raise RuntimeError("a tuning ended without its last event")


def _write(report: Report, plan: Plan, outputs: Outputs) -> list[Path]:
    weight = report.max_batch_weight
    facts = f"{report.llm_name or 'LLM'} for {report.server}: maximum batch weight {weight:,}, {report.evidence}"
    texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (outputs.env_file, lambda: environment_file(plan.limits, weight, gpu_count=report.gpu_count, facts=facts)),
        (outputs.result_file, lambda: f"{weight}\n"),
        (outputs.report, lambda: report_text(report)),
        (outputs.html, lambda: html_report(report)),
    )
    written = []
    for path, text in texts:
        if path is not None:
            write_whole(path, text().encode())
            written.append(path)
    return written


def _tell(report: Report) -> None:
    console = _console(sys.stdout)
    console.print(facts_table(report), highlight=False)
    if report.headroom:
        console.print()
        console.print(headroom_table(report), highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _tell_log(error: ProbeError) -> None:
    lines = error.log.strip().splitlines()
    for line in lines[-_LOG_LINES:]:
        click.echo(f"  | {line}", err=True)


def _publish(result: TuningResult, spec: TuningSpec, report: Report, url: str) -> None:
    from llmpilot_tuner.result_event import publish_completed  # noqa: PLC0415 NATS, which few need

    try:
        tuning_id = asyncio.run(publish_completed(result, spec, report_text(report), url))
    except PilotError as error:
        click.echo(f"warning: the event was not sent: {error}; the result stands", err=True)
        return
    click.echo(f"sent: TuningCompleted of tunings/{tuning_id}", err=True)
