"""A load test through its life, and what its log has that a run does not say itself.

Invariant: a load test that has ended does not change again.
"""

from dataclasses import dataclass
from typing import ClassVar

from llmpilot_contracts.job import Job
from llmpilot_loadtester.domain.events import RunEvent
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import LoadTestSpec

COLLECTION = "loadTests/"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest(Job):
    """A load test as clients see it, and as the replicas of the service share it."""

    kind: ClassVar[str] = "load test"
    collection: ClassVar[str] = COLLECTION

    spec: LoadTestSpec
    """Without what `LoadTestSnapshot` leaves out."""
    results: tuple[StageResult, ...] = ()
    found_load: float | None = None
    simulated: bool = False
    served_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """The state of a load test changed, or what is known of its target."""

    load_test: LoadTest


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementPublished:
    """What a stage measured went to the stream of measurements."""

    stage_index: int
    event_id: str


LogEvent = RunEvent | Changed | MeasurementPublished
