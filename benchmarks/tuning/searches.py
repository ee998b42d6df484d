"""A tuning as the product does it, and plain binary search over the same corner cases."""

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.events import TuningEnded
from llmpilot_tuner.domain.plan import Plan
from llmpilot_tuner.domain.probing import Outcome, Prober
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.open_probe import open_probe
from llmpilot_tuner.tuning_run import TuningRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search found, and what it took, the start of the worker included."""

    weight: int
    probe_count: int
    step_count: int
    seconds: float


async def tuned(spec: TuningSpec, *, open_prober: Callable[[Plan], Prober] = open_probe) -> TuningResult:
    """Tune as the product does."""
    async with aclosing(TuningRun(spec, open_prober=open_prober).events()) as events:
        async for event in events:
            if isinstance(event, TuningEnded):
                return event.result
    raise AssertionError("a tuning that ends gives a result")


def steps_of(result: TuningResult) -> int:
    """Return how many steps the probes of a tuning ran; a soak's do not count."""
    return sum(len(probe.runs) for probe in result.probes)


async def plain_search(plan: Plan) -> Searched:
    """Halve the range until it is settled, the corner cases in their own order."""
    started, steps, count, problem = time.perf_counter(), 0, 0, plan.problem
    async with open_probe(plan) as prober:
        low, high = problem.lowest, problem.highest + problem.granule
        while high - low > problem.granule and not problem.is_settled(low, high):
            middle = max(problem.down((low + high) // 2), low + problem.granule)
            passed, ran = await run_batches(prober, problem.cases(middle))
            count, steps = count + 1, steps + ran
            low, high = (middle, high) if passed else (low, middle)
    return Searched(weight=low, probe_count=count, step_count=steps, seconds=time.perf_counter() - started)


async def run_batches(prober: Prober, batches: Sequence[Batch], *, soak: bool = False) -> tuple[bool, int]:
    """Run batches until one fails; returns whether none did, and how many ran."""
    count, passed = 0, True
    async with aclosing(prober.run(batches, soak=soak)) as runs:
        async for run in runs:
            count += 1
            passed = run.outcome is Outcome.PASSED
    return passed, count
