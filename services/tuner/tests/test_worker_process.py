"""What becomes of a tuning's worker processes, whatever they do: the right kind of answer, and none is left."""

import asyncio
import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeError, ProbeKind, ProbeTimeoutError
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes import torch_probe
from llmpilot_tuner.probes.torch_probe import TorchProber

HERE = Path(__file__).parent
LLAMA = runpy.run_path(str(HERE / "tiny_llms.py"))["TINY_LLMS"]["llama-gqa"]
LIMIT_SECONDS = 60
CAPACITY = 2_000_000
"""The odd worker has weights of 1,000,000 bytes and takes 1,000 for each token: a batch may have 1,000."""


@pytest.fixture(autouse=True)
def _no_pytorch_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_probe, "LIBRARIES", ())


def odd_worker(*how: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / "programs" / "odd_torch_worker.py"), *how)


def batch(tokens: int, case: str = "plain") -> Batch:
    return Batch(case=case, decode=(Rows(request_count=1, input_tokens=tokens),))


def spec(*, gpu_count: int = 1, step_seconds: float = LIMIT_SECONDS, kind: ProbeKind = ProbeKind.TORCH) -> TuningSpec:
    return TuningSpec(
        config_json=LLAMA,
        probe=kind,
        gpu_memory_bytes=CAPACITY,
        reserved_bytes=0,
        gpu_count=gpu_count,
        longest_sequence=100,
        most_new_tokens=10,
        most_requests=10,
        step_seconds=step_seconds,
    )


@contextlib.asynccontextmanager
async def prober_of(
    *how: str,
    gpu_count: int = 1,
    step_seconds: float = LIMIT_SECONDS,
    start_seconds: float = LIMIT_SECONDS,
    kind: ProbeKind = ProbeKind.TORCH,
) -> AsyncIterator[TorchProber]:
    """A prober with odd workers; at its end none of the last ones lives."""
    execution = Execution(layout=Layout.PADDED, gpu_count=gpu_count)
    made = TorchProber(
        spec(gpu_count=gpu_count, step_seconds=step_seconds, kind=kind),
        parse_llm(LLAMA),
        execution,
        command=odd_worker(*how),
        start_seconds=start_seconds,
    )
    async with asyncio.timeout(LIMIT_SECONDS):
        async with made as prober:
            yield prober
            pids = prober.worker_pids
        assert all(is_gone(pid) for pid in pids)


async def runs_of(prober: TorchProber, batches: Sequence[Batch], *, soak: bool = False) -> list[CaseRun]:
    return [case_run async for case_run in prober.run(batches, soak=soak)]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, whoever reaps it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcomes(case_runs: Sequence[CaseRun]) -> list[Outcome]:
    return [case_run.outcome for case_run in case_runs]


PASSED, OUT_OF_MEMORY = Outcome.PASSED, Outcome.OUT_OF_MEMORY


def test_batches_run_in_turn_until_one_is_out_of_memory_and_the_next_run_goes_on_in_the_same_worker() -> None:
    async def main() -> None:
        async with prober_of("plain") as prober:
            pids = prober.worker_pids
            case_runs = await runs_of(prober, [batch(10), batch(1000), batch(1001), batch(1)])
            assert outcomes(case_runs) == [PASSED, PASSED, OUT_OF_MEMORY]
            assert [case_run.peak_bytes for case_run in case_runs[:2]] == [1_010_000, 2_000_000]
            assert outcomes(await runs_of(prober, [batch(5)])) == [PASSED]
            assert prober.worker_pids == pids

    asyncio.run(main())


def test_a_soak_on_a_gpu_has_a_worker_of_its_own() -> None:
    async def main() -> None:
        async with prober_of("plain") as prober:
            await runs_of(prober, [batch(1)])
            pids = prober.worker_pids
            assert outcomes(await runs_of(prober, [batch(1), batch(2)] * 20, soak=True)) == [PASSED] * 40
            assert prober.worker_pids != pids

    asyncio.run(main())


def test_what_libraries_print_is_no_message() -> None:
    async def main() -> None:
        async with prober_of("prints") as prober:
            assert outcomes(await runs_of(prober, [batch(1)])) == [PASSED]

    asyncio.run(main())


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_an_error_of_a_step_is_no_limit_of_memory_and_ends_the_worker(text: str) -> None:
    async def main() -> None:
        async with prober_of("plain") as prober:
            pids = prober.worker_pids
            with pytest.raises(ProbeError, match="not for want of memory") as raised:
                await runs_of(prober, [batch(1, f"raise {text}"), batch(1)])
            assert text in str(raised.value)
            assert text in raised.value.log
            assert "Traceback" in raised.value.log
            assert all(is_gone(pid) for pid in pids)
            assert outcomes(await runs_of(prober, [batch(5)])) == [PASSED]

    asyncio.run(main())


def test_an_allocation_that_fails_inside_a_library_is_out_of_memory() -> None:
    async def main() -> None:
        async with prober_of("plain") as prober:
            (case_run,) = await runs_of(prober, [batch(1, "raise CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), batch(1)])
            assert case_run.outcome is OUT_OF_MEMORY
            assert "CUBLAS_STATUS_ALLOC_FAILED" in case_run.message

    asyncio.run(main())


def test_a_worker_that_was_killed_once_is_replaced_and_its_step_run_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with prober_of("killed-once", str(tmp_path / "flag")) as prober:
            case_runs = await runs_of(prober, [batch(1), batch(2, "odd"), batch(3)])
            assert outcomes(case_runs) == [PASSED] * 3
            assert [case_run.batch.token_count for case_run in case_runs] == [1, 2, 3]
            assert any("was killed by SIGKILL" in note for note in prober.facts.notes)

    asyncio.run(main())


def test_a_soak_goes_on_after_a_worker_was_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with prober_of("killed-once", str(tmp_path / "flag")) as prober:
            case_runs = await runs_of(prober, [batch(1), batch(2, "odd"), batch(3)], soak=True)
            assert [case_run.batch.token_count for case_run in case_runs] == [1, 2, 3]

    asyncio.run(main())


def test_a_worker_that_is_killed_in_the_same_step_twice_is_an_error_and_no_limit_of_memory() -> None:
    async def main() -> None:
        async with prober_of("killed") as prober:
            with pytest.raises(ProbeError, match=r"in a fresh worker too.*the worker was killed by SIGKILL"):
                await runs_of(prober, [batch(1), batch(2, "odd")])

    asyncio.run(main())


def test_a_cpu_worker_that_the_kernel_killed_for_want_of_memory_was_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = iter([4, 4, 4, 5])  # before and after each of two steps
    monkeypatch.setattr(torch_probe, "oom_kill_count", lambda: next(counts))

    async def main() -> None:
        async with prober_of("killed", kind=ProbeKind.CPU) as prober:
            case_runs = await runs_of(prober, [batch(1), batch(2, "odd"), batch(3)])
            assert outcomes(case_runs) == [PASSED, OUT_OF_MEMORY]
            assert case_runs[1].message == "the step's process was killed by SIGKILL, as the machine had no memory left"

    asyncio.run(main())


def test_want_of_the_machines_own_memory_is_no_limit_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr(torch_probe, "oom_kill_count", lambda: next(counts))

    async def main() -> None:
        async with prober_of("killed") as prober:
            with pytest.raises(ProbeError, match="this machine's own memory that is short, not the GPU's"):
                await runs_of(prober, [batch(2, "odd")])

    asyncio.run(main())


def test_an_allocation_that_aborts_the_process_is_out_of_memory() -> None:
    async def main() -> None:
        async with prober_of("bad-alloc", kind=ProbeKind.CPU) as prober:
            assert outcomes(await runs_of(prober, [batch(2, "odd")])) == [OUT_OF_MEMORY]

    asyncio.run(main())


def test_a_crash_is_an_error_with_the_last_words() -> None:
    async def main() -> None:
        async with prober_of("segfault") as prober:
            with pytest.raises(ProbeError, match="was killed by SIGSEGV") as raised:
                await runs_of(prober, [batch(2, "odd")])
            assert raised.value.log.endswith("the last words")

    asyncio.run(main())


@pytest.mark.parametrize("how", ["garble", "endless-line"])
def test_a_worker_that_says_what_is_no_message_is_killed(how: str) -> None:
    async def main() -> None:
        async with prober_of(how) as prober:
            pids = prober.worker_pids
            with pytest.raises(ProbeError, match="wrote what is no message"):
                await runs_of(prober, [batch(2, "odd")])
            assert all(is_gone(pid) for pid in pids)

    asyncio.run(main())


def test_a_step_that_never_ends_is_given_up_in_its_time_and_its_worker_killed() -> None:
    async def main() -> None:
        async with prober_of("hang", step_seconds=0.3) as prober:
            pids = prober.worker_pids
            with pytest.raises(ProbeTimeoutError, match=r"did not end within 0.3 s"):
                await runs_of(prober, [batch(2, "odd")])
            assert all(is_gone(pid) for pid in pids)

    asyncio.run(main())


def test_a_worker_that_is_stopped_is_given_up_in_its_time_and_killed() -> None:
    async def main() -> None:
        async with prober_of("plain", step_seconds=0.3) as prober:
            pids = prober.worker_pids
            os.kill(pids[0], signal.SIGSTOP)
            with pytest.raises(ProbeTimeoutError):
                await runs_of(prober, [batch(2)])
            assert all(is_gone(pid) for pid in pids)

    asyncio.run(main())


def test_a_worker_that_leaks_is_replaced_before_it_can_make_a_step_fail() -> None:
    """Each step leaves 3 MiB, more than the whole capacity: a worker serves one step."""

    async def main() -> None:
        async with prober_of("leak") as prober:
            case_runs = await runs_of(prober, [batch(900), batch(950), batch(1000)])
            assert outcomes(case_runs) == [PASSED] * 3
            assert {case_run.live_before_bytes for case_run in case_runs} == {1_000_000}
            notes = [note for note in prober.facts.notes if "3,145,728 bytes alive" in note]
            assert len(notes) == 2

    asyncio.run(main())


def test_in_a_soak_what_leaks_is_seen_and_fails() -> None:
    async def main() -> None:
        async with prober_of("leak") as prober:
            case_runs = await runs_of(prober, [batch(1)] * 3, soak=True)
            assert outcomes(case_runs) == [PASSED, OUT_OF_MEMORY]
            assert [case_run.live_before_bytes for case_run in case_runs] == [1_000_000, 4_145_728]

    asyncio.run(main())


def test_a_worker_that_dies_at_its_start_is_told_with_its_last_lines() -> None:
    async def main() -> None:
        with pytest.raises(ProbeError, match=r"^the worker ended with code 3 before the LLM was loaded$") as raised:
            async with prober_of("dies-at-start"):
                pass
        assert raised.value.log.splitlines() == [f"line {number}" for number in range(960, 1000)]

    asyncio.run(main())


def test_an_error_at_the_start_is_told_with_its_traceback() -> None:
    async def main() -> None:
        with pytest.raises(ProbeError, match="could not be loaded: RuntimeError: the driver is drunk") as raised:
            async with prober_of("fails-at-start"):
                pass
        assert "Traceback" in raised.value.log

    asyncio.run(main())


def test_a_start_that_never_ends_is_given_up() -> None:
    async def main() -> None:
        with pytest.raises(ProbeTimeoutError, match=r"^the LLM was not loaded within 0.5 s$"):
            async with prober_of("hangs-at-start", start_seconds=0.5):
                pass

    asyncio.run(main())


def test_what_a_worker_refuses_keeps_its_class_and_every_violation() -> None:
    async def main() -> None:
        with pytest.raises(PreconditionError, match=r"^no such GPU: use another$") as refused:
            async with prober_of("refuses"):
                pass
        assert not isinstance(refused.value, ProbeError)
        with pytest.raises(InvalidInputError) as raised:
            async with prober_of("refuses-input"):
                pass
        assert [violation.field for violation in raised.value.violations] == ["heads", "layers"]

    asyncio.run(main())


def test_a_program_that_is_not_there_is_an_error() -> None:
    prober = TorchProber(spec(), parse_llm(LLAMA), Execution(layout=Layout.PADDED), command=("/no/such/program",))

    async def main() -> None:
        async with prober:
            pass

    with pytest.raises(ProbeError, match="/no/such/program"):
        asyncio.run(main())


def test_a_cancelled_run_leaves_no_process_of_the_worker_nor_of_its_children() -> None:
    async def main() -> None:
        async with prober_of("child") as prober:
            pid = prober.worker_pids[0]
            running = asyncio.create_task(runs_of(prober, [batch(2, "odd")]))
            while not (children := psutil.Process(pid).children()):  # noqa: ASYNC110 nothing says that it came
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert is_gone(pid)
            wait_until_gone([children[0].pid])  # it is killed at the same moment, and not waited for
            assert outcomes(await runs_of(prober, [batch(1)])) == [PASSED]

    asyncio.run(main())


def test_who_stops_listening_between_batches_keeps_the_worker() -> None:
    async def main() -> None:
        async with prober_of("plain") as prober:
            pids = prober.worker_pids
            async with contextlib.aclosing(prober.run([batch(1), batch(2)])) as case_runs:
                assert (await anext(case_runs)).outcome is PASSED
            assert outcomes(await runs_of(prober, [batch(1)])) == [PASSED]
            assert prober.worker_pids == pids

    asyncio.run(main())


def test_one_rank_out_of_memory_is_the_answer_though_the_other_waits_for_it_forever() -> None:
    async def main() -> None:
        async with prober_of("one-rank", gpu_count=2) as prober:
            pids = prober.worker_pids
            assert len(pids) == 2
            assert outcomes(await runs_of(prober, [batch(1), batch(2, "odd")])) == [PASSED, OUT_OF_MEMORY]
            assert all(is_gone(pid) for pid in pids)
            assert outcomes(await runs_of(prober, [batch(1)])) == [PASSED]

    asyncio.run(main())


def test_no_worker_is_left_when_its_prober_is_killed() -> None:
    command = [sys.executable, str(HERE / "programs" / "doomed_prober.py"), "torch", LLAMA, *odd_worker("hang")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as prober:
        assert prober.stdout is not None
        pids = [int(pid) for pid in prober.stdout.readline().split()]
        assert pids
        assert not any(is_gone(pid) for pid in pids)
        prober.send_signal(signal.SIGKILL)
    wait_until_gone(pids)


def test_without_pytorch_there_is_a_clear_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_probe, "LIBRARIES", ("no_such_library",))

    async def main() -> None:
        async with prober_of("plain"):
            pass

    with pytest.raises(PreconditionError, match=r'pip install "llm-pilot-tuner\[torch\]", or use --probe analytic'):
        asyncio.run(main())


def test_a_cpu_probe_of_more_memory_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_probe, "available_bytes", lambda: CAPACITY - 1)
    prober = TorchProber(spec(kind=ProbeKind.CPU), parse_llm(LLAMA), Execution(layout=Layout.PADDED))

    async def main() -> None:
        async with prober:
            pass

    with pytest.raises(PreconditionError, match="2,000,000 bytes and this machine has 1,999,999: use --probe dry"):
        asyncio.run(main())
