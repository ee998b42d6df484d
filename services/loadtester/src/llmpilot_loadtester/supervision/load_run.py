"""A load test from its first stage to its last.

Invariant: what happened is emitted in order before the run ends, however it ends, and no worker outlives it. Memory
holds the records of the running stage only.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_loadtester.domain.events import Noted, StageMeasured, TargetFound
from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.slo_search import SloSearch
from llmpilot_loadtester.domain.spec import Load, LoadKind, LoadTestSpec, Protocol, UserStep, stages_of
from llmpilot_loadtester.domain.stage_plan import StagePlan, plan_of
from llmpilot_loadtester.domain.verdict import verdict_of
from llmpilot_loadtester.supervision.crew import Crew, worker_count_for, worker_count_of
from llmpilot_loadtester.supervision.event_outbox import Emit, EventOutbox
from llmpilot_loadtester.supervision.request_sources import RequestSource, stage_seed
from llmpilot_loadtester.supervision.stage_run import Limits, StageJob, StageRecords, StageRun
from llmpilot_loadtester.supervision.worker_process import WORKER_COMMAND
from llmpilot_loadtester.worker_messages import Probed

Found = TypeVar("Found")

_FLUSH_SECONDS = 3600.0
"""For NATS to come back, where more waits than it takes at once."""
_LAST_FLUSH_SECONDS = 1.5
_DEATH_CHARACTERS = 1_000
_SHOWN_MODELS = 20
_NAMELESS = (Protocol.TGI, Protocol.TGIS)
"""Servers with one model, which requests do not name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended that did not fail."""

    found_load: float | None = None
    """Of a search."""
    sentence: str = ""
    """What the search knows."""


class LoadRun:
    """Runs a load test whose spec has no violations."""

    def __init__(
        self,
        spec: LoadTestSpec,
        *,
        load_test_id: str,
        source: RequestSource,
        cpu_count: int,
        limits: Limits | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        """cpu_count: CPUs that workers may use."""
        self._spec, self._load_test_id, self._source = spec, load_test_id, source
        self._cpu_count = cpu_count
        self._limits = limits or Limits()
        self._worker_command = worker_command

    async def run(
        self,
        emit: Emit,
        *,
        stop: asyncio.Event,
        done: Sequence[StageResult] = (),
        attempts: Mapping[int, int] | None = None,
    ) -> RunOutcome:
        """Run all stages that are not `done`. Raises a PilotError if it cannot go on.

        stop: once set, the run ends within 5 s, and what is recorded by then is emitted. attempts: how often each stage
        was begun before.
        """
        outbox = EventOutbox(emit)
        emitting = asyncio.create_task(outbox.run(), name=f"events of {self._load_test_id}")
        running = asyncio.create_task(
            self._run_stages(outbox, stop=stop, results=list(done), attempts=attempts or {}),
            name=f"stages of {self._load_test_id}",
        )
        try:
            await asyncio.wait([emitting, running], return_when=asyncio.FIRST_COMPLETED)
            if emitting.done():
                emitting.result()  # raises what kept an event from being stored
            return await running
        finally:
            running.cancel()
            await asyncio.wait([running])
            with suppress(UnavailableError):
                if not emitting.done():
                    await outbox.flush(_LAST_FLUSH_SECONDS)
            emitting.cancel()
            await asyncio.wait([emitting])

    async def _run_stages(
        self, outbox: EventOutbox, *, stop: asyncio.Event, results: list[StageResult], attempts: Mapping[int, int]
    ) -> RunOutcome:
        plan = plan_of(self._spec)
        if plan.next_stage(results) is None:
            return _outcome(plan, results)  # all that was left was to say so
        most = worker_count_for(_loads(self._spec), asked=self._spec.worker_count, cpu_count=self._cpu_count)
        async with Crew(most, self._worker_command) as crew:
            spec = await _unless_stopped(stop, self._look_at_target(crew, outbox))
            while spec is not None and (stage := plan.next_stage(results)) is not None:
                count = worker_count_of(stage.load, asked=spec.worker_count, present=most)
                job = StageJob(
                    stage=stage,
                    index=len(results),
                    attempt=attempts.get(len(results), 0) + 1,
                    stage_count=plan.stage_count,
                    load_test_id=self._load_test_id,
                )
                processes = await _unless_stopped(stop, crew.ready(count))
                if processes is None:
                    break
                run = StageRun(job, spec, processes=processes, source=self._source, outbox=outbox, limits=self._limits)
                found = await run.run(stop)
                if found is None:
                    break
                results.append(await asyncio.to_thread(_result, spec, job, found))
                await outbox.put(StageMeasured(result=results[-1]))
        await _unless_stopped(stop, outbox.flush(_FLUSH_SECONDS))  # once stopped, the run has its last flush
        return _outcome(plan, results)

    async def _look_at_target(self, crew: Crew, outbox: EventOutbox) -> LoadTestSpec:
        """Return the spec with the served model filled in. PreconditionError: the target cannot be put under load."""
        target = self._spec.target
        probed = await crew.probe(target)
        if probed.problem:
            raise PreconditionError(probed.problem)
        served_model = target.served_model or _only_model(probed, target.protocol, target.url)
        if target.served_model and probed.served_models and target.served_model not in probed.served_models:
            names = _names(probed.served_models)
            await outbox.put(
                Noted(text=f"the server does not list {target.served_model!r} among what it serves: {names}")
            )
        await outbox.put(TargetFound(served_model=served_model, simulated=probed.simulated))
        return replace(self._spec, target=replace(target, served_model=served_model))


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[None, None, Found]) -> Found | None:
    """Return what comes of the work; None: the run was told to stop first."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else working.result()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.wait([working, stopping])


def _only_model(probed: Probed, protocol: Protocol, url: str) -> str:
    """Return the model that a server has. PreconditionError: it must be said which."""
    models = probed.served_models
    if len(models) == 1 or (models and protocol in _NAMELESS):
        return models[0]
    if protocol in _NAMELESS:
        return ""
    if not models:
        raise PreconditionError(f"{url} does not say which models it serves: set target.served_model")
    raise PreconditionError(f"{url} serves several models, set target.served_model to one of them: {_names(models)}")


def _names(models: Sequence[str]) -> str:
    more = f" and {len(models) - _SHOWN_MODELS} more" if len(models) > _SHOWN_MODELS else ""
    return ", ".join(models[:_SHOWN_MODELS]) + more


def _outcome(plan: StagePlan, results: Sequence[StageResult]) -> RunOutcome:
    if isinstance(plan, SloSearch):
        return RunOutcome(found_load=plan.found_load(results), sentence=plan.answer(results))
    return RunOutcome()


def _loads(spec: LoadTestSpec) -> list[Load]:
    """Return the loads that a run may have, those of a search at their largest."""
    if spec.search is None:
        return [stage.load for stage in stages_of(spec)]
    if spec.search.kind is not LoadKind.USERS:
        return [Load(kind=spec.search.kind, rate_per_second=spec.search.high)]
    step = UserStep(at_seconds=0.0, users_count=round(spec.search.high))
    return [Load(kind=LoadKind.USERS, user_steps=(step,))]


def _result(spec: LoadTestSpec, job: StageJob, found: StageRecords) -> StageResult:
    seed = stage_seed(spec.seed, job.index)
    metrics = stage_metrics(found.records, found.window, spec.service_level, seed=seed)
    verdict = verdict_of(found.health, metrics, job.stage.load)
    if found.deaths:
        reasons = tuple(f"A worker died: {death[:_DEATH_CHARACTERS]}." for death in found.deaths)
        verdict = replace(verdict, is_valid=False, reasons=(*reasons, *verdict.reasons))
    return StageResult(
        stage_index=job.index,
        attempt=job.attempt,
        stage=job.stage,
        start_unix_nanos=found.start_nanos,
        metrics=metrics,
        verdict=verdict,
        service_level=spec.service_level,
    )
