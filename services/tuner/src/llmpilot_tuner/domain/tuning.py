"""A tuning through its life, and what its log has of it.

Invariant: a tuning that has ended does not change again.
"""

from dataclasses import dataclass
from typing import ClassVar

from llmpilot_contracts.job import Job
from llmpilot_tuner.domain.events import CaseRan, Note
from llmpilot_tuner.domain.probe_json import KeptProbe
from llmpilot_tuner.domain.spec import TuningSpec

COLLECTION = "tunings/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(Job):
    """A tuning as clients see it, and as the replicas of the service share it."""

    kind: ClassVar[str] = "tuning"
    collection: ClassVar[str] = COLLECTION

    spec: TuningSpec
    max_batch_weight: int | None = None
    """None: none was found yet."""
    report_json: str = ""
    measured: bool = False
    """Whether memory was really allocated to find the weight."""
    probe_count: int = 0
    from_cache: bool = False
    """Whether an earlier tuning found the weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """The state of a tuning changed."""

    tuning: Tuning


LogEvent = Changed | CaseRan | KeptProbe | Note
