"""The limit of the cpu probe: what fails under it is of memory only if it does not fail without it; and ranks."""

import asyncio
import contextlib
import runpy
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeError, ProbeKind
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.torch_probe import TorchProber
from llmpilot_tuner.probes.worker_process import WORKER_COMMAND

HERE = Path(__file__).parent
TINY_LLMS = runpy.run_path(str(HERE / "tiny_llms.py"))["TINY_LLMS"]
CAPACITY = 40 << 20
LEAK_BYTES = 2 << 20
PASSED, OUT_OF_MEMORY = Outcome.PASSED, Outcome.OUT_OF_MEMORY
SMALL, HUGE = (2, 50), (64, 900)


def batch(case: str, request_count: int, tokens: int) -> Batch:
    rows = Rows(request_count=request_count, input_tokens=tokens, output_tokens=1)
    return Batch(case=case, prefill=(rows,), pool_tokens=rows.token_count)


@contextlib.asynccontextmanager
async def entered(
    llm: str = "llama-gqa",
    *,
    command: tuple[str, ...] = WORKER_COMMAND,
    kind: ProbeKind = ProbeKind.CPU,
    gpu_count: int = 1,
) -> AsyncIterator[TorchProber]:
    config_json = TINY_LLMS[llm]
    spec = TuningSpec(
        config_json=config_json,
        probe=kind,
        gpu_memory_bytes=CAPACITY,
        reserved_bytes=0,
        gpu_count=gpu_count,
        longest_sequence=1000,
        most_new_tokens=100,
        most_requests=64,
        step_seconds=60,
    )
    execution = Execution(layout=Layout.PACKED, activation_bits=32, gpu_count=gpu_count)
    async with TorchProber(spec, parse_llm(config_json), execution, command=command) as prober:
        yield prober


async def runs_of(prober: TorchProber, *batches: Batch, soak: bool = False) -> list[CaseRun]:
    return [case_run async for case_run in prober.run(batches, soak=soak)]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def odd(loop: asyncio.Runner) -> Iterator[TorchProber]:
    """A cpu prober whose worker can misbehave."""
    context = entered(command=(sys.executable, str(HERE / "programs" / "odd_cpu_worker.py")))
    prober = loop.run(context.__aenter__())
    yield prober
    loop.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("case", ["vague", "crash"])
def test_a_failure_that_only_the_limit_causes_is_out_of_memory(
    case: str, odd: TorchProber, loop: asyncio.Runner
) -> None:
    pids = odd.worker_pids
    case_runs = loop.run(runs_of(odd, batch(case, *SMALL), batch(case, 16, 400), batch("never", *SMALL)))
    assert [case_run.outcome for case_run in case_runs] == [PASSED, OUT_OF_MEMORY]
    assert "only where more memory is to be had it does not fail" in case_runs[1].message
    assert odd.worker_pids == pids


def test_a_failure_that_more_memory_cures_is_of_memory_only_near_the_limit(
    odd: TorchProber, loop: asyncio.Runner
) -> None:
    """The step that takes .95 of the capacity, by a line through two that take less."""
    few, many = loop.run(runs_of(odd, batch("few", 1, 500), batch("many", 1, 900)))
    slope = ((many.reserved_bytes or 0) - (few.reserved_bytes or 0)) / 400
    near = 900 + round((0.95 * CAPACITY - (many.reserved_bytes or 0)) / slope)
    (case_run,) = loop.run(runs_of(odd, batch("early", near // 500, 500)))
    assert case_run.outcome is OUT_OF_MEMORY
    with pytest.raises(ProbeError, match="not for want of memory: RuntimeError: could not create a primitive"):
        loop.run(runs_of(odd, batch("early", *SMALL)))


def test_it_is_in_a_soak_too(odd: TorchProber, loop: asyncio.Runner) -> None:
    steps = [batch("never", *SMALL), batch("vague", 16, 400), batch("never", *SMALL)]
    case_runs = loop.run(runs_of(odd, *steps, soak=True))
    assert [case_run.outcome for case_run in case_runs] == [PASSED, OUT_OF_MEMORY]


def test_new_shapes_leave_nothing_behind_in_a_soak() -> None:
    """GPT-NeoX's GELU is oneDNN's, which would keep code for every shape: 3 MB after fifteen."""
    shapes = [batch(str(count), count, 400 // count) for count in range(1, 40, 2)]

    async def soaked() -> tuple[list[CaseRun], list[CaseRun]]:
        async with entered("gpt-neox") as prober:
            return await runs_of(prober, *shapes), await runs_of(prober, *shapes, soak=True)

    alone, together = asyncio.run(soaked())
    most_alone = max(case_run.reserved_bytes or 0 for case_run in alone)
    assert max(case_run.reserved_bytes or 0 for case_run in together) <= most_alone + 500_000


def test_what_a_step_leaves_alive_never_reaches_another(odd: TorchProber, loop: asyncio.Runner) -> None:
    plain, *leaks = loop.run(runs_of(odd, batch("plain", *SMALL), *[batch("leak", *SMALL)] * 3))
    assert {case_run.live_before_bytes for case_run in leaks} == {plain.live_before_bytes}
    assert plain.peak_bytes is not None
    assert leaks[-1].peak_bytes == pytest.approx(plain.peak_bytes + LEAK_BYTES, abs=65_536)


def test_in_a_soak_what_steps_leave_alive_adds_up(odd: TorchProber, loop: asyncio.Runner) -> None:
    case_runs = loop.run(runs_of(odd, *[batch("leak", *SMALL)] * 4, soak=True))
    alive = [case_run.live_before_bytes or 0 for case_run in case_runs]
    assert len(alive) == 4
    for index in (1, 2, 3):
        assert alive[index] - alive[index - 1] == pytest.approx(LEAK_BYTES, abs=65_536)


def test_a_failure_that_is_there_without_the_limit_too_is_an_error(odd: TorchProber, loop: asyncio.Runner) -> None:
    with pytest.raises(ProbeError, match="not for want of memory: RuntimeError: could not create a primitive"):
        loop.run(runs_of(odd, batch("broken", *SMALL)))


def test_two_ranks_decide_together_and_share_the_weights() -> None:
    """Embedding and norms lie on both, as in transformers' own plan; of all else each has half."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            contexts = (entered(gpu_count=2), entered(gpu_count=2, kind=ProbeKind.DRY))
            ranks, dry = await asyncio.gather(*(stack.enter_async_context(context) for context in contexts))
            pids = ranks.worker_pids
            assert len(ranks.worker_pids) == 2
            assert len(dry.worker_pids) == 1
            assert ranks.facts.weight_bytes == dry.facts.weight_bytes
            batches = (batch("small", *SMALL), batch("large", 16, 200), batch("huge", *HUGE), batch("never", *SMALL))
            case_runs = await runs_of(ranks, *batches)
            assert [case_run.outcome for case_run in case_runs] == [PASSED, PASSED, OUT_OF_MEMORY]
            large, as_dry = case_runs[1], (await runs_of(dry, batches[1]))[0]
            assert large.peak_bytes == pytest.approx(as_dry.peak_bytes, rel=0.15)  # gloo's own buffers, kernels'
            case_runs = await runs_of(ranks, *batches[:2], *batches[:2], soak=True)
            assert [case_run.outcome for case_run in case_runs] == [PASSED] * 4
            assert ranks.worker_pids == pids

    asyncio.run(main())
