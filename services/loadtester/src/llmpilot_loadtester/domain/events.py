"""What happens while a load test runs, in the order of a log that can be replayed.

Invariant: the results and records of a load test follow from its events alone.
"""

from dataclasses import dataclass

from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFound:
    """The target answered."""

    served_model: str
    simulated: bool
    """Whether it says of itself that it is a simulator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegan:
    """A stage began."""

    stage_index: int
    attempt: int
    """Which run of it, from 1."""
    stage: Stage
    start_unix_nanos: int
    stage_count: int
    """Stages known so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsCame:
    """Requests ended."""

    stage_index: int
    attempt: int
    request_count: int
    columns: bytes
    """Of `record_frames`; times since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveMetrics:
    """How it goes, over all workers."""

    stage_index: int
    elapsed_seconds: float
    phase: str
    """warm-up, measuring or cool-down."""
    users_count: int
    in_flight_count: int
    sent_count: int
    ok_count: int
    error_count: int
    tokens_per_second: float
    """Of the last second, about: parts received times the tokens that a part had so far."""
    requests_per_second: float
    ttft_median_ms: float | None
    itl_median_ms: float | None
    worker_cpu: float
    """Largest share of a core that a worker uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMeasured:
    """A stage was measured."""

    result: StageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Something to know."""

    text: str


RunEvent = TargetFound | StageBegan | RecordsCame | LiveMetrics | StageMeasured | Noted
