"""How a worker process did while it sent: what the verdict on a load test's own numbers is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHealth:
    """How a worker did, since its stage began. What the verdict is made of."""

    cpu_share: float = 0.0
    """CPU seconds per second of this process, highest second."""
    loop_lag_p99_ms: float = 0.0
    """How late the event loop was when it should have woken up."""
    loop_lag_max_ms: float = 0.0
    coalesced_read_count: int = 0
    """Reads that brought several chunks of one reply at once, so that the earlier ones' times are lost."""
    read_count: int = 0
    starved_count: int = 0
    """Requests that were sent late because the supervisor had given none."""
    clock_step_ms: float = 0.0
    """Largest difference between the wall clock and the monotonic clock since the start."""
    dropped_record_count: int = 0
    other_model: str = ""
    """Another model than the one asked for, as a reply named it; empty: none did."""
    other_model_count: int = 0
    """Replies that named another model."""
    parse_backlog_count: int = 0
    """Replies that wait to be parsed."""
