"""One tuning, run by this process from the probes that its log has to its end.

Invariant: a weight is published before its tuning has ended, and a probe is in the log before the next one begins to
count on it; what was found is kept for later tunings last, so that none of them finds what is not yet said.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from llmpilot_contracts.errors import PilotError
from llmpilot_contracts.job import State
from llmpilot_contracts.subjects import TUNING_COMPLETED
from llmpilot_servicekit.jobs.conduct import Conduct, Ending, JobKeeping, failed
from llmpilot_servicekit.jobs.job_states import StoredJob
from llmpilot_servicekit.patience import patiently
from llmpilot_tuner.domain.cache_key import cache_key
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
from llmpilot_tuner.domain.probe_json import KeptProbe
from llmpilot_tuner.domain.probing import Probe, ProbeError
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.domain.tuning import Changed, LogEvent, Tuning
from llmpilot_tuner.outputs.report import Report, read_report, report_json, report_text
from llmpilot_tuner.result_cache import ResultCache
from llmpilot_tuner.tuning_log import History, TuningLog, read_history, tuning_log
from llmpilot_tuner.wire import read_kept_spec
from llmpilot_tuner.wire_events import write_completed

_NAMESPACE = uuid.UUID("5c1b8a0e-6a7f-4d0c-9f57-3f1f6f0b9d42")
_SHOWN_LOG = 3_000
"""Characters, the last ones, of what the process of a probe said that failed."""
_LARGEST_REPORT_BYTES = 600_000
"""It is in the snapshot, one message of 1 MiB on NATS."""


class Run(Protocol):
    """A tuning from its start to its result."""

    def events(self) -> AsyncGenerator[RunEvent, None]:
        """Yield what happens; closing it ends whatever runs."""


StartRun = Callable[[TuningSpec, Sequence[Probe]], Run]
"""Makes the run of a specification that goes on from some probes; raises PilotError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every tuning of this process is run with."""

    keeping: JobKeeping[Tuning]
    cache: ResultCache
    start_run: StartRun


def event_id_of(tuning_id: str) -> str:
    """Return the id of the event that says what a tuning found."""
    return str(uuid.uuid5(_NAMESPACE, tuning_id))


class TuningConduct(Conduct[Tuning, LogEvent, History]):
    """Runs a tuning that this process owns."""

    def __init__(self, around: Surroundings, stored: StoredJob[Tuning]) -> None:
        super().__init__(around.keeping, stored)
        self._around = around
        self._nats = around.keeping.nats
        self._key = ""
        """Of what was asked, on this machine; known once a run has started."""
        self._keep: Callable[[], Awaitable[None]] | None = None
        """Keeps the result for later tunings."""
        self._is_found = False
        """Whether the weight is known, and only NATS is waited for: a cancel comes too late then."""

    async def run(self) -> None:
        """Run the tuning to its end, its loss or its interruption."""
        await super().run()
        if self._keep is not None and not self._ownership.is_lost:
            await patiently(self._keep)

    async def _read_history(self) -> History:
        return await read_history(self._nats, self._id)

    def _open_log(self, history: History) -> TuningLog:
        return tuning_log(self._nats, self._id, history)

    def _changed(self, job: Tuning) -> LogEvent:
        return Changed(tuning=job)

    def _known(self, history: History) -> Mapping[str, Any]:
        return {"probe_count": len(history.probes)}

    def _found(self, ended: Tuning) -> Mapping[str, Any]:
        names = ("max_batch_weight", "report_json", "measured", "probe_count", "from_cache")
        return {name: getattr(ended, name) for name in names}

    async def _perform(self, events: TuningLog, history: History) -> Ending | None:
        """Tune until it is done or told to stop; then whatever runs is ended before this returns."""
        async with asyncio.TaskGroup() as tasks:
            tuning = tasks.create_task(self._tune(events, history))
            stopping = tasks.create_task(self._stop.wait())
            await asyncio.wait([tuning, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            own = self._ownership
            if own.is_lost or not (self._is_found and own.job.cancel_requested):
                tuning.cancel()
            await asyncio.wait([tuning])
        return self._stopped() if tuning.cancelled() else tuning.result()

    async def _tune(self, events: TuningLog, history: History) -> Ending | None:
        try:
            spec = await asyncio.to_thread(read_kept_spec, await self._read_spec())
            kept = history.probes if spec.goes_on_from_probes else ()
            self._ownership.change(probe_count=len(kept))
            while (found := await self._follow(spec, kept, events)) is None:
                kept = tuple(each for each in kept if each.key == self._key)
                self._ownership.change(probe_count=len(kept))
            report, from_cache = found
            return await self._succeed(events, report, from_cache=from_cache)
        except ProbeError as error:
            return failed(f"{error}\n{error.log[-_SHOWN_LOG:]}" if error.log else str(error))
        except Exception as error:  # noqa: BLE001 a tuning that fails must not end the others
            return self._ending_of(error)

    async def _follow(
        self, spec: TuningSpec, kept: Sequence[KeptProbe], events: TuningLog
    ) -> tuple[Report, bool] | None:
        """Return what was found, and whether an earlier tuning found it; whatever ran has ended then.

        None: some probes were made on another machine, or by other versions, and do not count here.
        """
        run = await asyncio.to_thread(self._around.start_run, spec, [each.probe for each in kept])
        async with aclosing(run.events()) as happening:
            async for event in happening:
                match event:
                    case TuningStarted(facts=facts):
                        self._key = cache_key(spec, facts)
                        if report := await self._found_before(spec):
                            await events.append(Note(text="an earlier tuning of the same found the weight; no probe"))
                            return report, True
                        if any(each.key != self._key for each in kept):
                            await events.append(Note(text="probes that were made elsewhere do not count here"))
                            return None
                        await events.append(Note(text=_started(event)))
                        if kept:
                            await events.append(Note(text=f"going on from {len(kept)} probe(s) that were made before"))
                    case ProbeStarted() | SoakStarted() | Note():
                        await events.append(Note(text=_noted(event)))
                    case CaseRan():
                        await events.append(event)
                    case ProbeEnded(probe=probe):
                        await events.append(KeptProbe(key=self._key, probe=probe))
                        self._ownership.change(probe_count=self._ownership.job.probe_count + 1)
                    case TuningEnded(result=result):
                        text = await asyncio.to_thread(report_json, result, spec)
                        if spec.is_repeatable:
                            self._keep = partial(self._around.cache.keep, self._key, text)
                        return read_report(text), False
        raise PilotError("the run of a tuning ended without a result: a bug")

    async def _found_before(self, spec: TuningSpec) -> Report | None:
        if not spec.is_repeatable:
            return None
        return await patiently(partial(self._around.cache.find, self._key, spec))

    async def _succeed(self, events: TuningLog, report: Report, *, from_cache: bool) -> Ending:
        """Publish what was found, however long NATS is away, and return how the tuning ends."""
        self._is_found = True
        text = report_text(report)
        if len(text.encode()) > _LARGEST_REPORT_BYTES:
            await events.append(Note(text=f"the report has {len(text):,} characters, too many to be kept here"))
            text = ""
        found: dict[str, Any] = {
            "max_batch_weight": report.max_batch_weight,
            "report_json": text,
            "measured": report.is_measured,
            "from_cache": from_cache,
        }
        end_time = datetime.now(UTC)
        tuning = replace(self._ownership.job, state=State.SUCCEEDED, end_time=end_time, **found)
        await events.flush()  # who has lost the tuning finds out here, and publishes nothing
        event_id = event_id_of(self._id)
        publish = partial(self._nats.publish, TUNING_COMPLETED, event_id=event_id)
        await patiently(partial(publish, payload=write_completed(tuning, event_id)))
        return Ending(state=State.SUCCEEDED, found=found, end_time=end_time)


def _started(event: TuningStarted) -> str:
    facts = event.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions)
    predicted = "no weight" if event.predicted_weight is None else f"{event.predicted_weight:,}"
    return (
        f"{facts.kind.value} probe on {facts.device} ({versions}): weights between {event.lowest_weight:,} and "
        f"{event.highest_weight:,}, the formulas predict {predicted}"
    )


def _noted(event: ProbeStarted | SoakStarted | Note) -> str:
    match event:
        case ProbeStarted():
            return f"probing {event.weight:,} with {event.case_count} case(s): {event.why}"
        case SoakStarted():
            return f"final verdict on {event.weight:,}: {event.step_count} steps"
        case Note():
            return event.text
