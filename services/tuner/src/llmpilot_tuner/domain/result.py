"""What a tuning found, and the evidence for it."""

from dataclasses import dataclass

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.probing import Probe, ProbeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseHeadroom:
    """How near a corner case comes to the capacity at the weight that was found."""

    batch: Batch
    predicted_bytes: float
    peak_bytes: int | None
    """Most that tensors had; None: not measured."""
    reserved_bytes: int | None
    headroom_bytes: float
    """Capacity less the larger of what was reserved and what tensors had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """The final verdict: corner cases and other batches in random order, in a fresh process."""

    step_count: int
    largest_peak_bytes: int | None
    largest_reserved_bytes: int | None
    growth_bytes: int
    """By how much what the allocator held beyond its tensors grew from the first to the last step."""
    drift_bytes: int
    """By how much tensors that were alive between steps grew."""
    lowered_from: tuple[int, ...] = ()
    """Weights that the search had passed and the soak did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Predicted memory of one case at one weight."""

    case: str
    weight: int
    predicted_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """The largest maximum batch weight that no admissible batch can run out of memory with."""

    max_batch_weight: int
    limit: str
    """Why it is no larger: "memory", or what the limits allow."""
    facts: ProbeFacts
    probes: tuple[Probe, ...]
    """In the order they were made."""
    plain_probe_count: int
    """Probes that plain binary search takes at worst for the same range and precision."""
    headroom: tuple[CaseHeadroom, ...]
    soak: Soak | None
    """None: nothing was allocated, so nothing could grow."""
    margin_weight: int
    """What was taken off the weight that the search had found."""
    curve: tuple[CurvePoint, ...]
    half_sequence_weight: int | None
    """What the same memory would give, by prediction, for requests of half the length; None: no prediction."""
    predicted_weight: int | None
    """What the formulas alone say."""
    elapsed_seconds: float
    notes: tuple[str, ...] = ()
