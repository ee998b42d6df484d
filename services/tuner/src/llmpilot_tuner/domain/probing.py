"""What a probe is asked and what it answers.

Invariant: a step that failed for want of memory is an answer; whatever else goes wrong is a `ProbeError`, and never
taken for a limit of memory.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol, Self

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.step_memory.batch import Batch


class ProbeKind(StrEnum):
    """How memory is learnt."""

    ANALYTIC = "analytic"
    """By the formulas of `libs/perfmodel`."""
    DRY = "dry"
    """The LLM under PyTorch's fake tensors: every allocation is counted, none is made."""
    CPU = "cpu"
    """The LLM on the CPU, under a limit of memory that really fails."""
    TORCH = "torch"
    """The LLM on a GPU."""
    SERVER = "server"
    """An inference server."""

    @property
    def is_measured(self) -> bool:
        """Whether memory was really allocated."""
        return self not in {ProbeKind.ANALYTIC, ProbeKind.DRY}


class Outcome(StrEnum):
    """How a step went."""

    PASSED = "passed"
    OUT_OF_MEMORY = "out-of-memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRun:
    """A step that was run; bytes are of the GPU that needed most, weights included. None: not known."""

    batch: Batch
    outcome: Outcome
    peak_bytes: int | None = None
    """Most that tensors had at once; of a step that failed, before the allocation that did."""
    reserved_bytes: int | None = None
    """Most that the allocator held, its unused pieces included."""
    live_before_bytes: int | None = None
    """What tensors had before the step: the weights, and whatever earlier steps left behind."""
    seconds: float = 0.0
    message: str = ""
    """What the allocator said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The corner cases of one weight, run until one failed."""

    weight: int
    runs: tuple[CaseRun, ...]

    @property
    def passed(self) -> bool:
        """Whether no case failed."""
        return all(run.outcome is Outcome.PASSED for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFacts:
    """What a prober is made of; enters the key that results are kept under."""

    kind: ProbeKind
    device: str
    """E.g. "NVIDIA H100 80GB HBM3", "cpu", "fake"."""
    capacity_bytes: int
    """What weights, cache and everything else may have together on each GPU."""
    weight_bytes: int
    versions: tuple[tuple[str, str], ...] = ()
    """Of what ran, e.g. ("torch", "2.13.0"), ("driver", "550.54")."""
    notes: tuple[str, ...] = ()
    """What this prober could not do."""


class Prober(Protocol):
    """Runs batches; `async with` starts it and leaves no process behind."""

    async def __aenter__(self) -> Self:
        """Load the LLM; raises ProbeError, or PreconditionError where it cannot be had here."""

    async def __aexit__(self, *error: object) -> None:
        """End whatever runs."""

    @property
    def facts(self) -> ProbeFacts:
        """What this prober is made of, once it is entered."""

    def run(self, batches: Sequence[Batch], *, soak: bool = False) -> AsyncGenerator[CaseRun, None]:
        """Run batches in turn, and end after the first that runs out of memory.

        soak: in a process that has run nothing else, and with nothing given back to the system between batches.
        Raises ProbeError.
        """


class ProbeError(PreconditionError):
    """A probe failed for another reason than memory; `log` is what its process said last."""

    reason = "PROBE_FAILED"

    def __init__(self, message: str, *, log: str = "") -> None:
        self.log = log
        super().__init__(message)


class ProbeTimeoutError(ProbeError):
    """A step did not end in its time."""

    reason: ClassVar[str] = "PROBE_TIMED_OUT"


class NoSafeWeightError(PreconditionError):
    """Not even one longest request is safe."""

    reason = "NO_SAFE_WEIGHT"
