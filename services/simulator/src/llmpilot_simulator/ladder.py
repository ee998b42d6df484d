"""A ladder of loads: what users see as their number doubles, on one simulated deployment.

Invariant: every level starts from an idle server and the same seed, so a level does not depend on its neighbours.
Source of the curves: Fig. 7, Lazuka et al., 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.batching.simulation import simulate_users
from llmpilot_simulator.deployment import Deployment
from llmpilot_simulator.request_lengths import RequestLengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What users saw under one load; None: no request succeeded, or no reply had a second token."""

    users_count: int
    ttft_ms_median: float | None
    nttft_ms_median: float | None
    itl_ms_median: float | None
    itl_ms_p95: float | None
    tokens_per_second: float
    """Output tokens of successful requests over the length of the test."""
    requests_per_second: float
    error_rate: float | None
    """None: no request ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The levels of one deployment."""

    name: str
    """Of the deployment, as a legend shows it."""
    levels: tuple[Level, ...]
    price_per_hour: float | None
    """Of one pod; None: nobody stated it."""


def simulate_levels(
    deployment: Deployment,
    *,
    lengths: RequestLengths,
    users_counts: Sequence[int],
    duration_seconds: float,
    seed: int,
    progress: Callable[[int, int | None], None],
) -> tuple[RequestRecords, ...]:
    """Run one load test per number of users; raises InvalidInputError for a request that the server can never take."""
    tables = deployment.step_constants.tables()
    records: list[RequestRecords] = []
    for users_count in users_counts:
        records.append(
            simulate_users(
                policy=deployment.policy,
                tables=tables,
                input_tokens=lengths.input_tokens,
                output_tokens=lengths.output_tokens,
                users_count=users_count,
                duration_seconds=duration_seconds,
                seed=np.random.default_rng([seed, users_count]),
                out_of_memory_tokens=deployment.out_of_memory_tokens,
            )
        )
        progress(len(records), len(users_counts))
    return tuple(records)


def level(users_count: int, records: RequestRecords) -> Level:
    """Return what the users of one load test saw."""
    summary = records.summary()
    return Level(
        users_count=users_count,
        ttft_ms_median=summary.ttft.median_ms,
        nttft_ms_median=summary.nttft.median_ms,
        itl_ms_median=summary.itl.median_ms,
        itl_ms_p95=summary.itl.p95_ms,
        tokens_per_second=summary.throughput_tokens_per_second,
        requests_per_second=summary.requests_per_second,
        error_rate=summary.error_rate,
    )
