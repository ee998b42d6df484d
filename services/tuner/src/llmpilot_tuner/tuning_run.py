"""One tuning from its specification to its result: probes as the search asks for them, then the final verdict.

Invariant: what ends without a result raises; a result is only given of a weight whose every corner case passed.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

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
from llmpilot_tuner.domain.plan import Plan, half_sequence_weight, plan_of, predicted_weight
from llmpilot_tuner.domain.probing import (
    CaseRun,
    NoSafeWeightError,
    Outcome,
    Probe,
    ProbeError,
    ProbeFacts,
    ProbeKind,
    Prober,
)
from llmpilot_tuner.domain.result import Soak, TuningResult
from llmpilot_tuner.domain.search import Search, belongs
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.domain.verdict import curve, headroom, lacking_bytes, soak_batches, soak_of
from llmpilot_tuner.probes.open_probe import open_probe
from llmpilot_tuner.server_probe.tuning import server_events


class TuningRun:
    """Made of a valid specification only: raises InvalidInputError and PreconditionError as `plan_of` does."""

    def __init__(
        self,
        spec: TuningSpec,
        *,
        kept: Sequence[Probe] = (),
        open_prober: Callable[[Plan], Prober] = open_probe,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan_of(spec)
        self._open_prober = open_prober
        self._kept = tuple(kept)
        self._monotonic = monotonic

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        """Yield what happens; the last is `TuningEnded`. Closing it ends whatever runs.

        Raises NoSafeWeightError where not even one longest request fits, ProbeError where something else than memory
        fails, PreconditionError where the probe cannot be made here.
        """
        if self.plan.spec.probe is ProbeKind.SERVER:
            async with aclosing(self._server_events()) as events:
                async for event in events:
                    yield event
            return
        async with aclosing(self._probe_events()) as events:
            async for event in events:
                yield event

    async def _server_events(self) -> AsyncGenerator[RunEvent, None]:
        plan = self.plan
        predicted = predicted_weight(plan.problem)
        if predicted is None:
            raise NoSafeWeightError("not even one longest request fits by the formulas: lower longest_sequence")
        async with aclosing(server_events(plan, predicted_weight=predicted)) as events:
            async for event in events:
                yield event

    async def _probe_events(self) -> AsyncGenerator[RunEvent, None]:
        started = self._monotonic()
        async with self._open_prober(self.plan) as prober:
            facts = prober.facts
            plan = replace(self.plan, predict=replace(self.plan.predict, weight_bytes=facts.weight_bytes))
            search = Search(plan.problem, (probe for probe in self._kept if belongs(plan.problem, probe)))
            predicted = predicted_weight(plan.problem)
            yield TuningStarted(
                facts=facts,
                lowest_weight=search.problem.lowest,
                highest_weight=search.problem.highest,
                predicted_weight=predicted,
            )
            async with aclosing(searched(search, prober)) as events:
                async for event in events:
                    yield event
            verdict = _Verdict(plan, search)
            if facts.kind.is_measured and plan.spec.soak_steps:
                async with aclosing(_soaked(verdict, plan, prober)) as events:
                    async for event in events:
                        yield event
        result = verdict.result(facts, predicted=predicted, elapsed_seconds=self._monotonic() - started)
        yield TuningEnded(result=result)


async def searched(search: Search, prober: Prober) -> AsyncGenerator[RunEvent, None]:
    """Probe what a search asks for, until it has ended; raises NoSafeWeightError and ProbeError."""
    noted = len(search.notes)
    while (following := search.next()) is not None:
        weight, cases = following.weight, search.ordered_cases(following.weight)
        yield ProbeStarted(weight=weight, case_count=len(cases), why=following.why)
        runs: list[CaseRun] = []
        async with aclosing(prober.run(cases)) as ran:
            async for run in ran:
                runs.append(run)
                yield CaseRan(weight=weight, run=run)
        probe = Probe(weight=weight, runs=tuple(runs))
        if not belongs(search.problem, probe):
            raise ProbeError(f"the probe of a weight of {weight:,} ended after {len(runs)} of {len(cases)} cases")
        search.record(probe)
        yield ProbeEnded(probe=probe)
        for note in search.notes[noted:]:
            yield Note(text=note)
        noted = len(search.notes)


async def _soaked(verdict: "_Verdict", plan: Plan, prober: Prober) -> AsyncGenerator[RunEvent, None]:
    """Soak the weight that was found, and lower ones until one holds."""
    while (weight := verdict.weight_to_soak()) is not None:
        spec = plan.spec
        steps = soak_batches(plan.limits, weight, step_count=spec.soak_steps, seed=spec.seed, costs=plan.predict)
        yield SoakStarted(weight=weight, step_count=len(steps))
        runs: list[CaseRun] = []
        async with aclosing(prober.run(steps, soak=True)) as ran:
            async for run in ran:
                runs.append(run)
                yield CaseRan(weight=weight, run=run)
        verdict.learn(runs, batch_count=len(set(steps)))


class _Verdict:
    """What remains of the weight that the search found."""

    def __init__(self, plan: Plan, search: Search) -> None:
        self._plan = plan
        self._search = search
        self._found = self._weight = search.passed or 0
        self._lowered_from: list[int] = []
        self._runs: list[CaseRun] = []
        self._soak: Soak | None = None

    def weight_to_soak(self) -> int | None:
        """Return the weight to soak; None: the verdict is there."""
        return self._weight if self._soak is None else None

    def learn(self, runs: Sequence[CaseRun], *, batch_count: int) -> None:
        """Take a soak: keep the weight, or lower it to be soaked again. Raises NoSafeWeightError."""
        failed = runs[-1].outcome is Outcome.OUT_OF_MEMORY
        soak = soak_of(runs[:-1] if failed else runs, batch_count=batch_count, lowered_from=self._lowered_from)
        lacking = lacking_bytes(soak, self._search.problem.capacity_bytes)
        if failed or lacking:
            self._lower(lacking or soak.growth_bytes + soak.drift_bytes)
        else:
            self._soak, self._runs = soak, list(runs)

    def result(self, facts: ProbeFacts, *, predicted: int | None, elapsed_seconds: float) -> TuningResult:
        """Return the result."""
        search, weight = self._search, self._weight
        runs = [run for probe in search.probes if probe.weight == weight for run in probe.runs]
        return TuningResult(
            max_batch_weight=weight,
            limit="limits" if weight >= search.problem.highest else "memory",
            facts=facts,
            probes=search.probes,
            plain_probe_count=search.plain_probe_count,
            headroom=headroom(search, weight, [*runs, *self._runs]),
            soak=self._soak,
            margin_weight=self._found - weight,
            curve=curve(search, weight),
            half_sequence_weight=half_sequence_weight(self._plan),
            predicted_weight=predicted,
            elapsed_seconds=elapsed_seconds,
            notes=(*facts.notes, *search.notes),
        )

    def _lower(self, lacking: int) -> None:
        """Take off what the lacking bytes come to: at first a quarter of the precision, then twice it."""
        problem = self._search.problem
        self._lowered_from.append(self._weight)
        root = self._search.root(capacity_bytes=problem.capacity_bytes - lacking, below=self._weight) or 0
        quarter = max(problem.granule, problem.down((problem.step(self._weight) - self._weight) / 4))
        least = quarter * 2 ** (len(self._lowered_from) - 1)
        lowered = problem.down(min(root or self._weight, self._weight - least))
        if lowered < problem.lowest:
            raise NoSafeWeightError(
                f"a weight of {self._found:,} passed its probes, but soaks of it and of lower ones, down to "
                f"{self._weight:,}, ran out of memory: what the process holds grows while it runs; give it more memory"
            )
        self._weight = lowered
