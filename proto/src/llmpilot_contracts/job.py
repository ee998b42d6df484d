"""What every job has in common that a service accepts at once, runs later and tells of: load tests, tunings.

Invariant: a job that has ended does not change again.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import ClassVar


class State(StrEnum):
    """Where a job is in its life."""

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
class Job:
    """A job as clients see it, and as the replicas of its service share it; a service adds its own fields."""

    kind: ClassVar[str]
    """In messages, e.g. "load test"."""
    collection: ClassVar[str]
    """What resource names begin with, e.g. "loadTests/"."""

    id: str
    request_id: str
    create_time: datetime
    state: State = State.PENDING
    error: str = ""
    end_time: datetime | None = None
    owner: str = ""
    """Which process runs it; empty: none."""
    cancel_requested: bool = False
    spec_digest: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Resource name."""
        return f"{self.collection}{self.id}"
