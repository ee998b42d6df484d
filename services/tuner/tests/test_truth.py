"""The weight that is found against the truth: every batch of small limits, at the found weight and 1 % above it.

What a server admits at one weight it admits at every larger one, so that these two weights settle all: at the found
one every batch must fit, and at 1 % more one must not.
"""

import asyncio
import heapq
import math
import runpy
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.admissibility import is_admissible
from llmpilot_tuner.domain.events import TuningEnded
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.plan import Plan, plan_of
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeFacts, ProbeKind, Prober
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.search import Search
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.open_probe import open_probe
from llmpilot_tuner.tuning_run import TuningRun, searched

HERE = Path(__file__).parent
TINY_LLM: Callable[..., str] = runpy.run_path(str(HERE / "tiny_llms.py"))["tiny_llm"]
EVERY_BATCH: Callable[[Limits, int], Iterator[Batch]] = runpy.run_path(str(HERE / "every_batch.py"))["every_batch"]
PRECISION = 0.01
MOST = 5
"""Batches that are run at a weight besides its corner cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An LLM on a server, and the limits of its requests."""

    config_json: str
    server: Server
    sequence: int
    output: int
    requests: int
    eager: bool = False
    prefill_limit: int | None = None


LLAMA = TINY_LLM("llama-gqa")
CASES = {
    "packed": Case(config_json=LLAMA, server=Server.TGI, sequence=8, output=3, requests=6),
    "packed, copied": Case(config_json=LLAMA, server=Server.TGIS, sequence=8, output=3, requests=6),
    "chunked": Case(config_json=LLAMA, server=Server.VLLM, sequence=40, output=3, requests=2, prefill_limit=20),
    "padded": Case(config_json=LLAMA, server=Server.TGI, sequence=12, output=3, requests=7, eager=True),
    "padded, squares": Case(config_json=LLAMA, server=Server.TGIS, sequence=12, output=3, requests=7, eager=True),
    "padded, mixed": Case(
        config_json=LLAMA, server=Server.TGI, sequence=12, output=3, requests=7, eager=True, prefill_limit=15
    ),
    "window": Case(
        config_json=TINY_LLM("llama-gqa", model_type="mistral", sliding_window=4),
        server=Server.TGI,
        sequence=12,
        output=3,
        requests=7,
        eager=True,
        prefill_limit=15,
    ),
    "encoder-decoder": Case(config_json=TINY_LLM("t5"), server=Server.TGI, sequence=8, output=3, requests=5),
    "encoder-decoder, squares": Case(config_json=TINY_LLM("t5"), server=Server.TGIS, sequence=8, output=3, requests=5),
}


def spec_of(case: Case, probe: ProbeKind, *, share: float) -> TuningSpec:
    """Return a tuning whose memory is so large a share of what the whole range needs."""
    spec = TuningSpec(
        config_json=case.config_json,
        probe=probe,
        server=case.server,
        gpu_memory_bytes=2**40,
        reserved_bytes=0,
        precision_name="fp32",
        eager_attention=case.eager,
        longest_sequence=case.sequence,
        most_new_tokens=case.output,
        most_requests=case.requests,
        prefill_limit=case.prefill_limit,
        precision=PRECISION,
    )
    plan = plan_of(spec)
    low, high = (
        max(map(plan.predict, plan.problem.cases(weight))) for weight in (plan.problem.lowest, plan.problem.highest)
    )
    return replace(spec, gpu_memory_bytes=math.ceil(low + share * (high - low)))


def found(spec: TuningSpec) -> TuningResult:
    async def main() -> TuningResult:
        async with aclosing(TuningRun(spec).events()) as events:
            async for event in events:
                if isinstance(event, TuningEnded):
                    return event.result
        raise AssertionError("a tuning that ends gives a result")

    return asyncio.run(main())


def admitted(plan: Plan, weight: int) -> list[Batch]:
    return [batch for batch in EVERY_BATCH(plan.limits, weight) if is_admissible(batch, plan.limits, weight)]


def above(plan: Plan, weight: int) -> int | None:
    """The first weight that is more than 1 % above; None: the limits allow none."""
    more = int(weight / (1 - PRECISION)) + 1
    return more if more <= plan.problem.highest else None


@pytest.mark.parametrize("share", [0.0, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_formulas_find_the_largest_weight_at_which_every_batch_fits(case: Case, share: float) -> None:
    spec = spec_of(case, ProbeKind.ANALYTIC, share=share)
    plan = plan_of(spec)
    result = found(spec)
    weight = result.max_batch_weight
    assert max(map(plan.predict, admitted(plan, weight))) <= spec.capacity_bytes
    more = above(plan, weight)
    if more is None:
        assert result.limit == ("limits" if weight == plan.problem.highest else "memory")
    else:
        assert max(map(plan.predict, admitted(plan, more))) > spec.capacity_bytes


class Capped:
    """A dry prober with so much memory that nothing fails, held against one capacity after the other."""

    def __init__(self, prober: Prober, capacity_bytes: int, peaks: dict[Batch, int]) -> None:
        self._prober = prober
        self._capacity_bytes = capacity_bytes
        self._peaks = peaks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    @property
    def facts(self) -> ProbeFacts:
        """Those of the worker."""
        return replace(self._prober.facts, capacity_bytes=self._capacity_bytes)

    async def run(self, batches: Sequence[Batch], *, soak: bool = False) -> AsyncGenerator[CaseRun, None]:  # noqa: ARG002
        """Run batches until one needs more than the capacity."""
        await self.learn(batches)
        for batch in batches:
            peak = self._peaks[replace(batch, case="")]
            passed = peak <= self._capacity_bytes
            yield CaseRun(
                batch=batch, outcome=Outcome.PASSED if passed else Outcome.OUT_OF_MEMORY, peak_bytes=peak, message=""
            )
            if not passed:
                return

    async def learn(self, batches: Sequence[Batch]) -> None:
        """Run what was not run before."""
        unknown = [batch for batch in batches if replace(batch, case="") not in self._peaks]
        async with aclosing(self._prober.run(unknown)) as runs:
            async for run in runs:
                assert run.peak_bytes is not None
                self._peaks[replace(run.batch, case="")] = run.peak_bytes


async def between(plan: Plan, prober: Capped) -> int:
    """Return the middle of what the lowest and the highest weight need."""
    low, high = [
        max([run.peak_bytes or 0 async for run in prober.run(plan.problem.cases(weight))])
        for weight in (plan.problem.lowest, plan.problem.highest)
    ]
    return (low + high) // 2


async def passes_here_and_above(plan: Plan, prober: Capped) -> tuple[bool, bool]:
    """Whether every batch passes at the weight that is found, and whether it does 1 % above."""
    search = Search(plan.problem)
    async with aclosing(searched(search, prober)) as events:
        async for _ in events:
            pass
    assert search.passed is not None
    more = above(plan, search.passed)
    assert more is not None
    here = [run.outcome async for run in prober.run(maximal(plan, search.passed))]
    there = [run.outcome async for run in prober.run(maximal(plan, more))]
    return Outcome.OUT_OF_MEMORY not in here, Outcome.OUT_OF_MEMORY not in there


LAYOUTS = (("packed", "chunked"), ("padded, mixed", "padded, squares"), ("encoder-decoder, squares",))


def test_fake_tensors_find_the_largest_weight_at_which_every_maximal_batch_passes() -> None:
    """One worker for all cases of a layout, which runs each batch once."""
    pytest.importorskip("torch", reason="the steps run in PyTorch")

    async def of_layout(names: tuple[str, ...]) -> dict[str, tuple[bool, bool]]:
        peaks: dict[Batch, int] = {}
        specs = {name: spec_of(CASES[name], ProbeKind.DRY, share=1e6) for name in names}
        async with open_probe(plan_of(specs[names[0]])) as prober:
            checked = {}
            for name, spec in specs.items():
                middle = await between(plan_of(spec), Capped(prober, spec.capacity_bytes, peaks))
                plan = plan_of(replace(spec, gpu_memory_bytes=middle))
                checked[name] = await passes_here_and_above(plan, Capped(prober, middle, peaks))
            return checked

    async def main() -> list[dict[str, tuple[bool, bool]]]:
        return await asyncio.gather(*map(of_layout, LAYOUTS))

    assert asyncio.run(main()) == [dict.fromkeys(names, (True, False)) for names in LAYOUTS]


def maximal(plan: Plan, weight: int) -> list[Batch]:
    """Return the corner cases, and of all admitted batches those that the formulas say need most."""
    dearest = heapq.nlargest(MOST, admitted(plan, weight), key=plan.predict)
    return list({replace(batch, case=""): batch for batch in (*plan.problem.cases(weight), *dearest)}.values())
