"""What every prober keeps to: formulas, fake tensors, the CPU under a limit, and a GPU where one is at hand."""

import asyncio
import contextlib
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from llmpilot_contracts.errors import PreconditionError  # noqa: E402
from llmpilot_perfmodel.llm_config import parse_llm  # noqa: E402
from llmpilot_perfmodel.precision import precision_named  # noqa: E402
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows  # noqa: E402
from llmpilot_tuner.domain.plan import prediction  # noqa: E402
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeKind, Prober  # noqa: E402
from llmpilot_tuner.domain.spec import TuningSpec  # noqa: E402
from llmpilot_tuner.probes.analytic_probe import AnalyticProber  # noqa: E402
from llmpilot_tuner.probes.torch_probe import TorchProber  # noqa: E402
from llmpilot_tuner.probes.worker_messages import Order  # noqa: E402
from llmpilot_tuner.torch_worker.meter_cpu import CpuMeter  # noqa: E402
from llmpilot_tuner.torch_worker.meter_cuda import CudaMeter  # noqa: E402

HERE = Path(__file__).parent
LLAMA = runpy.run_path(str(HERE / "tiny_llms.py"))["tiny_llm"](
    "llama-gqa", hidden_size=128, intermediate_size=344, num_hidden_layers=4, vocab_size=2048, torch_dtype="float32"
)
WEIGHT_BYTES = 4 * (2 * 2048 * 128 + 4 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 344 + 2 * 128) + 128)
"""By hand: embedding and head; in 4 layers the queries' and output's, keys' and values' and feed-forward's; norms."""
CAPACITY = 48 << 20
EXECUTION = Execution(layout=Layout.PACKED, activation_bits=32)
LIMIT_SECONDS = 120
PASSED, OUT_OF_MEMORY = Outcome.PASSED, Outcome.OUT_OF_MEMORY
ENOUGH_FOR_A_GPU = 1 << 30

Answer = TypeVar("Answer")


def spec(kind: ProbeKind, *, capacity_bytes: int = CAPACITY, config_json: str = LLAMA) -> TuningSpec:
    return TuningSpec(
        config_json=config_json,
        probe=kind,
        gpu_memory_bytes=capacity_bytes,
        reserved_bytes=0,
        longest_sequence=1000,
        most_new_tokens=100,
        most_requests=64,
        step_seconds=LIMIT_SECONDS,
    )


def prober_of(wanted: TuningSpec) -> Prober:
    config = parse_llm(wanted.config_json)
    if wanted.probe is ProbeKind.ANALYTIC:
        return AnalyticProber(wanted.capacity_bytes, prediction(config, EXECUTION, precision_named("fp32")))
    return TorchProber(wanted, config, EXECUTION)


def prefill(request_count: int, tokens: int) -> Batch:
    rows = Rows(request_count=request_count, input_tokens=tokens, output_tokens=1)
    return Batch(case="prefill", prefill=(rows,), pool_tokens=rows.token_count)


def decode(request_count: int, tokens: int) -> Batch:
    rows = Rows(request_count=request_count, input_tokens=tokens - 1, output_tokens=1)
    return Batch(case="decode", decode=(rows,), pool_tokens=rows.token_count)


@dataclass(frozen=True)
class Running:
    """An entered prober and the event loop that it lives in."""

    kind: ProbeKind
    prober: Prober
    loop: asyncio.Runner

    def do(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do something that takes the loop."""
        return self.loop.run(asyncio.wait_for(work, LIMIT_SECONDS))

    def run(self, *batches: Batch, soak: bool = False) -> list[CaseRun]:
        """Run batches to their end."""
        return self.do(runs_of(self.prober, batches, soak=soak))


async def runs_of(prober: Prober, batches: Sequence[Batch], *, soak: bool = False) -> list[CaseRun]:
    return [case_run async for case_run in prober.run(batches, soak=soak)]


def taken(case_run: CaseRun) -> int:
    """The most that a step took, of tensors or of the allocator."""
    return max(case_run.peak_bytes or 0, case_run.reserved_bytes or 0)


@pytest.fixture(
    scope="module",
    params=[ProbeKind.ANALYTIC, ProbeKind.DRY, ProbeKind.CPU, ProbeKind.TORCH],
    ids=str,
)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    kind: ProbeKind = request.param
    if kind is ProbeKind.TORCH and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    prober = prober_of(spec(kind))
    with asyncio.Runner() as loop:
        loop.run(asyncio.wait_for(prober.__aenter__(), LIMIT_SECONDS))
        try:
            yield Running(kind, prober, loop)
        finally:
            loop.run(prober.__aexit__(None, None, None))


def test_a_small_batch_passes_and_takes_more_than_the_weights(running: Running) -> None:
    for case_run in running.run(prefill(1, 50), decode(2, 50)):
        assert case_run.outcome is PASSED
        assert case_run.peak_bytes is not None
        assert WEIGHT_BYTES < case_run.peak_bytes <= CAPACITY


def test_a_huge_batch_is_out_of_memory_and_what_follows_is_not_run(running: Running) -> None:
    case_runs = running.run(prefill(1, 50), prefill(64, 900), prefill(1, 50))
    assert [case_run.outcome for case_run in case_runs] == [PASSED, OUT_OF_MEMORY]
    assert case_runs[1].message


def test_a_cache_that_is_too_large_is_out_of_memory(running: Running) -> None:
    """64 requests of 4,000 tokens, 2 x 4 layers x 32 x 4 bytes each: 262,144,000 bytes."""
    (case_run,) = running.run(decode(64, 4000))
    assert case_run.outcome is OUT_OF_MEMORY


def test_after_out_of_memory_it_goes_on_as_before(running: Running) -> None:
    (before,) = running.run(prefill(4, 100))
    running.run(prefill(64, 900))
    (after,) = running.run(prefill(4, 100))
    assert after.outcome is PASSED
    assert after.peak_bytes == before.peak_bytes


def test_the_same_batch_takes_the_same_each_time(running: Running) -> None:
    case_runs = running.run(*[prefill(8, 100), decode(16, 100)] * 3)
    assert len({case_run.peak_bytes for case_run in case_runs[::2]}) == 1
    assert len({case_run.peak_bytes for case_run in case_runs[1::2]}) == 1


@pytest.mark.parametrize("kind", [prefill, decode])
def test_a_larger_batch_takes_more(running: Running, kind: Callable[[int, int], Batch]) -> None:
    peaks = [taken(case_run) for case_run in running.run(*(kind(count, 100) for count in (1, 4, 8, 16, 24)))]
    assert len(peaks) == 5
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


def test_the_cache_of_a_decode_step_takes_what_it_takes_by_hand(running: Running) -> None:
    """From 1,600 to 16,000 tokens: 14,400 x 2 x 4 layers x 2 heads x 16 x 4 bytes; activations stay as they are."""
    small, large = running.run(decode(16, 100), decode(16, 1000))
    assert taken(large) - taken(small) == pytest.approx(14_400 * 2 * 4 * 2 * 16 * 4, rel=0.02)


def test_a_soak_runs_all_batches_and_leaves_nothing_alive(running: Running) -> None:
    batches = [prefill(8, 100), decode(16, 100), prefill(1, 20)] * 4
    case_runs = running.run(*batches, soak=True)
    assert [case_run.outcome for case_run in case_runs] == [PASSED] * 12
    assert [case_run.batch for case_run in case_runs] == batches
    alive = [case_run.live_before_bytes for case_run in case_runs if case_run.live_before_bytes is not None]
    assert len(alive) == 12
    assert max(alive) - min(alive) < 100_000


def test_a_soak_ends_with_the_first_batch_that_is_too_large(running: Running) -> None:
    case_runs = running.run(decode(16, 100), prefill(64, 900), decode(16, 100), soak=True)
    assert [case_run.outcome for case_run in case_runs] == [PASSED, OUT_OF_MEMORY]
    assert [case_run.outcome for case_run in running.run(decode(1, 10))] == [PASSED]


def test_facts_say_what_ran(running: Running) -> None:
    facts = running.prober.facts
    assert facts.kind is running.kind
    assert facts.capacity_bytes == CAPACITY
    assert facts.weight_bytes == WEIGHT_BYTES
    assert facts.device
    assert all(name and version for name, version in facts.versions)
    assert facts.versions


@pytest.mark.parametrize("running", [ProbeKind.ANALYTIC, ProbeKind.CPU], ids=str, indirect=True)
def test_a_run_that_is_cancelled_leaves_the_prober_of_use(running: Running) -> None:
    """Of probers with workers one: they do the same about it, see also `test_worker_process`."""

    async def main() -> None:
        task = asyncio.ensure_future(runs_of(running.prober, [prefill(8, 100)] * 10_000))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    running.do(main())
    assert [case_run.outcome for case_run in running.run(decode(1, 10))] == [PASSED]


def order(kind: ProbeKind, capacity_bytes: int) -> Order:
    return Order(kind=kind, config_json=LLAMA, execution=EXECUTION, capacity_bytes=capacity_bytes)


def test_weights_that_do_not_fit_are_said_to_be_so_much_too_large() -> None:
    with pytest.raises(PreconditionError, match=f"{WEIGHT_BYTES:,} bytes .* 1,000 too many"):
        CpuMeter(order(ProbeKind.CPU, WEIGHT_BYTES - 1000)).start()

    async def main() -> None:
        async with prober_of(spec(ProbeKind.DRY, capacity_bytes=WEIGHT_BYTES - 1000)):
            pass

    with pytest.raises(PreconditionError, match=f"{WEIGHT_BYTES:,} bytes .* 1,000 too many"):
        asyncio.run(main())


def test_a_gpu_that_is_not_there_is_said_with_what_needs_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(PreconditionError, match=r"no GPU here: use --probe dry, .* cpu .* or analytic"):
        CudaMeter(order(ProbeKind.TORCH, CAPACITY)).start()


@pytest.mark.parametrize("running", [ProbeKind.CPU], ids=str, indirect=True)
def test_a_cpu_step_whose_process_is_killed_is_run_again_and_no_limit_of_memory(running: Running) -> None:
    prober = running.prober
    assert isinstance(prober, TorchProber)

    async def main() -> None:
        (first,) = prober.worker_pids
        batches = [prefill(16, 200)] * 2
        task = asyncio.ensure_future(runs_of(prober, batches))
        while not (steps := psutil.Process(first).children()):  # noqa: ASYNC110 nothing says that it came
            await asyncio.sleep(0.001)
        steps[0].kill()
        assert [case_run.outcome for case_run in await task] == [PASSED] * 2
        assert prober.worker_pids != (first,)
        assert "the process of the step was killed by SIGKILL" in prober.facts.notes[-1]

    running.do(main())


def test_no_process_is_left_when_a_cpu_prober_is_killed_in_the_middle_of_a_step() -> None:
    command = [sys.executable, str(HERE / "programs" / "doomed_prober.py"), "cpu", LLAMA]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as prober:
        assert prober.stdout is not None
        (worker,) = [psutil.Process(int(pid)) for pid in prober.stdout.readline().split()]
        while not (steps := worker.children()):  # they are short-lived processes
            pass
        prober.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(is_running(process) for process in (worker, *steps)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
