"""A load test through its life, and what its log has that a run does not say itself.

Invariant: a load test that has ended does not change again.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from llmpilot_loadtester.domain.events import RunEvent
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import LoadTestSpec

KIND = "load test"
COLLECTION = "loadTests/"


class State(StrEnum):
    """Where a load test is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing comes after."""
        return self not in {State.PENDING, State.RUNNING}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """A load test as clients see it, and as the replicas of the service share it."""

    id: str
    spec: LoadTestSpec
    """Without what `LoadTestSnapshot` leaves out."""
    request_id: str
    create_time: datetime
    state: State = State.PENDING
    error: str = ""
    end_time: datetime | None = None
    results: tuple[StageResult, ...] = ()
    found_load: float | None = None
    simulated: bool = False
    served_model: str = ""
    owner: str = ""
    """Which process runs it; empty: none."""
    cancel_requested: bool = False
    spec_digest: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Resource name."""
        return f"{COLLECTION}{self.id}"


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
