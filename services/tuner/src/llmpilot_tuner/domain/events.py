"""What a tuning says while it runs."""

from dataclasses import dataclass

from llmpilot_tuner.domain.probing import CaseRun, Probe, ProbeFacts
from llmpilot_tuner.domain.result import TuningResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningStarted:
    """The prober is ready."""

    facts: ProbeFacts
    lowest_weight: int
    highest_weight: int
    predicted_weight: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeStarted:
    """A weight is probed."""

    weight: int
    case_count: int
    why: str
    """What the search expects of it, e.g. "predicted root", "one granule more", "bisection"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRan:
    """A case of the weight that is probed was run."""

    weight: int
    run: CaseRun


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeEnded:
    """A weight was probed; kept, so that a tuning can go on from here."""

    probe: Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakStarted:
    """The final verdict on a weight begins: in a fresh process; of a server, with batches between the corner cases."""

    weight: int
    step_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something worth a line."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningEnded:
    """The weight was found; always the last event."""

    result: TuningResult


RunEvent = TuningStarted | ProbeStarted | CaseRan | ProbeEnded | SoakStarted | Note | TuningEnded
"""Whatever stops a tuning otherwise is raised."""
