"""The probes that run the LLM itself: dry, cpu and torch, each in worker processes.

Invariant: this process never imports PyTorch; a step is out of memory only where a worker or the kernel says so, and
whatever else goes wrong is a `ProbeError` with the worker's log. When the context ends no process is left.
"""

import importlib.util
import json
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Self

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.step_memory.batch import Batch, Execution
from llmpilot_servicekit.process_exit import describe_exit
from llmpilot_tuner.domain.probing import CaseRun, Outcome, ProbeError, ProbeFacts, ProbeKind, ProbeTimeoutError
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.machine_memory import available_bytes
from llmpilot_tuner.probes.worker_crew import START_SECONDS, Heard, WorkerCrew
from llmpilot_tuner.probes.worker_messages import CaseFailed, CaseResult, Drifted, Order, Run, RunEnded
from llmpilot_tuner.probes.worker_process import WORKER_COMMAND, WorkerDiedError
from llmpilot_tuner.torch_worker.failures import HOST_MEMORY, FailureKind, classify_exit, oom_kill_count

LIBRARIES: tuple[str, ...] = ("torch", "transformers", "safetensors")
_KILLED = -signal.SIGKILL


class _RunAgainError(Exception):
    """A batch has to be run again in a fresh worker, for no fault of its own; the message says why."""

    def __init__(self, message: str, *, log: str) -> None:
        self.log = log
        super().__init__(message)


class TorchProber:
    """Has workers run batches."""

    def __init__(
        self,
        spec: TuningSpec,
        config: LlmConfig,
        execution: Execution,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._spec = spec
        self._command = command
        self._start_seconds = start_seconds
        # Fake ranks are all the same, and hear nothing of each other.
        self._rank_count = 1 if spec.probe is ProbeKind.DRY else execution.gpu_count
        self._order = Order(
            kind=spec.probe,
            config_json=_as_served(spec.config_json, config.spec.torch_dtype),
            model_folder=str(spec.model_folder or ""),
            execution=execution,
            capacity_bytes=spec.capacity_bytes,
            reserved_bytes=spec.reserved_bytes,
            seed=spec.seed,
        )
        self._crew: WorkerCrew | None = None
        self._has_run = False
        self._run_count = 0
        self._facts: ProbeFacts | None = None
        self._replacements: list[str] = []

    async def __aenter__(self) -> Self:
        """Load the LLM in the workers."""
        self._check_machine()
        await self._ready_crew()
        return self

    async def __aexit__(self, *error: object) -> None:
        """End the workers."""
        await self._drop_crew()

    @property
    def facts(self) -> ProbeFacts:
        """What ran, with a note for each worker that was replaced."""
        if self._facts is None:
            raise PreconditionError("a prober has facts once it is entered")
        return ProbeFacts(
            kind=self._facts.kind,
            device=self._facts.device,
            capacity_bytes=self._facts.capacity_bytes,
            weight_bytes=self._facts.weight_bytes,
            versions=self._facts.versions,
            notes=(*self._facts.notes, *self._replacements),
        )

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are running."""
        return () if self._crew is None else self._crew.pids

    async def run(self, batches: Sequence[Batch], *, soak: bool = False) -> AsyncGenerator[CaseRun, None]:
        """Run batches in turn, and end after the first that runs out of memory. Raises ProbeError.

        The soak of a cpu probe is a fork of a worker that has run nothing but the warm-up, see `meter_cpu`.
        """
        if soak and self._spec.probe is ProbeKind.TORCH and self._has_run:
            await self._drop_crew()
        left = list(batches)
        is_second_try = False
        while left:
            # One at a time: ranks stay together, and who stops listening leaves idle workers behind, to be used again.
            share = left[:] if soak else left[:1]
            try:
                async with aclosing(self._run_share(share, soak=soak)) as case_runs:
                    async for case_run in case_runs:
                        is_second_try = False
                        left.pop(0)
                        yield case_run
                        if case_run.outcome is not Outcome.PASSED:
                            return
            except _RunAgainError as error:
                if is_second_try:
                    raise ProbeError(f"in a fresh worker too, {error}", log=error.log) from error
                is_second_try = True
                self._replacements.append(f"a worker was replaced: {error}")

    async def _run_share(self, batches: Sequence[Batch], *, soak: bool) -> AsyncGenerator[CaseRun, None]:
        """Run batches in the crew; one that is in no known state afterwards is dropped."""
        crew = await self._ready_crew()
        self._has_run = True
        self._run_count += 1
        oom_kills = oom_kill_count()
        is_idle = False
        try:
            await crew.send(Run(number=self._run_count, batches=list(batches), soak=soak))
            for index, batch in enumerate(batches):
                heard = await crew.hear(self._spec.step_seconds)
                case_run = self._judged(batch, heard, crew, oom_kill_count() - oom_kills)
                is_last = index == len(batches) - 1 or case_run.outcome is not Outcome.PASSED
                if is_last:
                    ends = await crew.hear(self._spec.step_seconds) if self._all_go_on(heard) else []
                    is_idle = bool(ends) and all(isinstance(end, RunEnded) for end in ends)
                yield case_run
                if is_last:
                    return
        finally:
            if not is_idle:
                await self._drop_crew()

    def _judged(self, batch: Batch, heard: Sequence[Heard], crew: WorkerCrew, oom_kills: int) -> CaseRun:
        """Return how a batch went on all ranks: on one that has no memory left it fails, whatever others say."""
        results = [answer for answer in heard if isinstance(answer, CaseResult)]
        if failed := [result for result in results if result.outcome is Outcome.OUT_OF_MEMORY]:
            return _combined(batch, Outcome.OUT_OF_MEMORY, results, failed[0].message)
        for answer in heard:
            if killer := _memory_killer(answer, oom_kills):
                if self._spec.probe is not ProbeKind.CPU:
                    raise ProbeError(f"while it ran {_words(batch)}, {killer}; {HOST_MEMORY}", log=crew.log)
                return _combined(batch, Outcome.OUT_OF_MEMORY, results, killer)
        for answer in heard:
            _raise_failure(answer, batch, crew)
        if len(results) < len(heard):
            raise ProbeTimeoutError(
                f"{_words(batch)} did not end within {self._spec.step_seconds:g} s; its worker was killed. Allow more "
                "seconds for a step, or find out from the log what it waited for",
                log=crew.log,
            )
        return _combined(batch, Outcome.PASSED, results, "")

    def _all_go_on(self, heard: Sequence[Heard]) -> bool:
        """Whether all workers are as they were before: the steps of a cpu probe fail in processes of their own."""
        kinds = (CaseResult, CaseFailed) if self._spec.probe is ProbeKind.CPU else CaseResult
        return all(isinstance(answer, kinds) for answer in heard)

    async def _ready_crew(self) -> WorkerCrew:
        if self._crew is not None:
            return self._crew
        crew = await WorkerCrew.start(
            self._order, rank_count=self._rank_count, command=self._command, start_seconds=self._start_seconds
        )
        self._crew = crew
        self._has_run = False
        self._facts = ProbeFacts(
            kind=self._spec.probe,
            device=crew.ready[0].device,
            capacity_bytes=self._spec.capacity_bytes,
            weight_bytes=max(ready.weight_bytes for ready in crew.ready),
            versions=tuple((name, version) for name, version in crew.ready[0].versions),
            notes=tuple(dict.fromkeys(note for ready in crew.ready for note in ready.notes)),
        )
        return crew

    async def _drop_crew(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            await crew.stop()

    def _check_machine(self) -> None:
        missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        if missing:
            raise PreconditionError(
                f"a {self._spec.probe} probe needs {', '.join(missing)}: "
                'pip install "llm-pilot-tuner[torch]", or use --probe analytic'
            )
        if self._spec.probe is not ProbeKind.CPU:
            return
        needed_bytes = self._rank_count * self._spec.capacity_bytes
        there_bytes = available_bytes()
        if there_bytes is not None and needed_bytes > there_bytes:
            raise PreconditionError(
                f"a cpu probe really allocates up to {needed_bytes:,} bytes and this machine has {there_bytes:,}: "
                "use --probe dry, which allocates nothing, or a smaller LLM"
            )


def _as_served(config_json: str, torch_dtype: str) -> str:
    """Return a config.json that states the data type that is served, whatever its own was."""
    return json.dumps(json.loads(config_json) | {"torch_dtype": torch_dtype})


def _raise_failure(answer: Heard, batch: Batch, crew: WorkerCrew) -> None:
    """Raise what an answer says that went wrong, if anything."""
    words = _words(batch)
    match answer:
        case CaseFailed(exit_code=exit_code, message=message) if exit_code == _KILLED:
            raise _RunAgainError(f"while it ran {words}, {message}", log=crew.log)
        case CaseFailed(message=message, log=log):
            raise ProbeError(f"{words} failed, and not for want of memory: {message}", log=log or crew.log)
        case WorkerDiedError(exit_code=exit_code, log=log) if exit_code == _KILLED:
            raise _RunAgainError(f"while it ran {words}, {answer}", log=log) from answer
        case WorkerDiedError(log=log):
            raise ProbeError(f"while it ran {words}, {answer}", log=log) from answer
        case Drifted(live_bytes=live_bytes, baseline_bytes=baseline_bytes):
            left_bytes = live_bytes - baseline_bytes
            raise _RunAgainError(f"earlier steps had left {left_bytes:,} bytes alive before {words}", log=crew.log)
        case CaseResult() | None:
            return
        case _:
            raise ProbeError(f"a worker said {type(answer).__name__} while it ran {words}", log=crew.log)


def _memory_killer(answer: Heard, oom_kills: int) -> str:
    """Return what ended a worker, if it was want of memory; empty: it was not."""
    if not isinstance(answer, WorkerDiedError | CaseFailed) or answer.exit_code is None:
        return ""
    exit_code, log = answer.exit_code, answer.log
    if classify_exit(exit_code, log, oom_kills=oom_kills) is not FailureKind.OUT_OF_MEMORY:
        return ""
    return f"the step's process {describe_exit(exit_code)}, as the machine had no memory left"


def _combined(batch: Batch, outcome: Outcome, results: Sequence[CaseResult], message: str) -> CaseRun:
    return CaseRun(
        batch=batch,
        outcome=outcome,
        peak_bytes=_largest([result.peak_bytes for result in results]),
        reserved_bytes=_largest([result.reserved_bytes for result in results]),
        live_before_bytes=_largest([result.live_before_bytes for result in results]),
        seconds=max((result.seconds for result in results), default=0.0),
        message=message,
    )


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _words(batch: Batch) -> str:
    return f'the case "{batch.case}" of {batch.request_count} requests'
