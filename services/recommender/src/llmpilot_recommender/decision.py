"""From latency curves to pods: Eqs. (1)-(3), Lazuka et al., 2024.

Invariant: an unknown latency never meets a limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmpilot_contracts.errors import Violation
from llmpilot_recommender.measurement import Measurement

LARGEST_LIMIT_MS = 1e7
DEFAULT_ERROR_RATE = 0.01
"""Largest share of failed requests unless the caller names one: beyond it the survivors' medians flatter the load."""


class Basis(StrEnum):
    """Where the latencies of a curve come from, most trustworthy first."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    EXTRAPOLATED = "extrapolated"
    """Predicted for a GPU type on which nothing was measured."""
    SIMULATED = "simulated"


class Limit(StrEnum):
    """A limit a deployment must stay under."""

    NTTFT = "nTTFT"
    ITL = "ITL"
    ERROR_RATE = "error rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimits:
    """The latency limits L = (L1, L2) and the largest share of failed requests."""

    nttft_ms: float
    """L1: median time to first token per input token."""
    itl_ms: float
    """L2: median inter-token latency."""
    error_rate: float = DEFAULT_ERROR_RATE

    def violations(self) -> tuple[Violation, ...]:
        """Return every limit that is out of its range."""
        found = [
            Violation(f"limits.{name}", f"must be > 0 and at most {LARGEST_LIMIT_MS:g}, is {value:g}")
            for name, value in (("nttft_ms", self.nttft_ms), ("itl_ms", self.itl_ms))
            if not 0 < value <= LARGEST_LIMIT_MS
        ]
        if not 0 <= self.error_rate <= 1:
            found.append(Violation("limits.error_rate", f"must be between 0 and 1, is {self.error_rate:g}"))
        return tuple(found)

    def exceeded_by(self, point: "CurvePoint") -> dict[Limit, float]:
        """Return the limits that a point exceeds, with the point's value."""
        values = {
            Limit.NTTFT: (point.nttft_ms, self.nttft_ms),
            Limit.ITL: (point.itl_ms, self.itl_ms),
            Limit.ERROR_RATE: (point.error_rate or 0.0, self.error_rate),
        }
        return {limit: value for limit, (value, largest) in values.items() if not value <= largest}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Median latencies of one pod under one load."""

    users_count: int
    nttft_ms: float
    """Infinite where no request got a token."""
    itl_ms: float
    """Infinite where no request got a second token."""
    error_rate: float | None
    """Share of failed requests; None: not measured."""


def or_infinite(latency_ms: float | None) -> float:
    """Return a latency that nobody reported as infinite, so that it meets no limit."""
    return math.inf if latency_ms is None else latency_ms


def measured_point(row: Measurement) -> CurvePoint:
    """Return a measurement's medians and error rate as a point."""
    return CurvePoint(
        users_count=row.users_count,
        nttft_ms=or_infinite(row.nttft.median_ms),
        itl_ms=or_infinite(row.itl.median_ms),
        error_rate=row.error_rate,
    )


def predicted_points(users_counts: Sequence[int], latencies_ms: Sequence[Sequence[float]]) -> tuple[CurvePoint, ...]:
    """Return one point per number of users from rows of (nTTFT, ITL)."""
    return tuple(
        CurvePoint(users_count=users, nttft_ms=nttft, itl_ms=itl, error_rate=None)
        for users, (nttft, itl) in zip(users_counts, latencies_ms, strict=True)
    )


def users_per_pod(curve: Sequence[CurvePoint], limits: LatencyLimits) -> int:
    """Return u_max, the most users a pod serves within the limits at every level up to it, Eq. (3); 0 if none.

    The curve must ascend in users.
    """
    served = 0
    for point in curve:
        if limits.exceeded_by(point):
            break
        served = point.users_count
    return served


def pod_count(users_count: int, served_per_pod: int) -> int:
    """Return n, the pods that serve all users, Eq. (2)."""
    return -(-users_count // served_per_pod)
