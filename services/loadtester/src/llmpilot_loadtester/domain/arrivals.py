"""When scheduled requests are sent, and how users are split over workers.

Invariant: the same load and seed give the same times; the users of all workers add up to those of the load at every
moment.

Random gaps are made in blocks, and those of a block are scaled so that it lasts exactly as long as its rate says. For
gaps of a gamma distribution (an exponential one is of that kind) this is the process under the condition that every
block has its mean rate, since the proportions of gamma variables do not depend on their sum. So a short load has the
rate that was asked for, and its bursts are at most a block long.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.records import Integers
from llmpilot_loadtester.domain.spec import RATED, Load, LoadKind, UserStep

BLOCK_GAPS = 1_000
NANOS_PER_SECOND = 1e9


def arrival_offsets(load: Load, *, seed: int, until_seconds: float | None) -> Iterator[Integers]:
    """Yield blocks of send times in nanoseconds from the start, never falling; the first request arrives at 0.

    Ends with the load's `request_count` or before `until_seconds`, if there is one. ValueError: users and traces have
    no times here.
    """
    if load.kind is LoadKind.ALL_AT_ONCE:
        yield np.zeros(load.request_count, np.int64)
        return
    if load.kind not in RATED:
        raise ValueError(f"{load.kind.value} has no arrival times of its own")
    until_nanos = None if until_seconds is None else until_seconds * NANOS_PER_SECOND
    left = load.request_count or None
    for times in _rated_blocks(load, np.random.default_rng(seed)):
        kept = times if until_nanos is None else times[: np.searchsorted(times, until_nanos)]
        kept = kept[:left]
        if len(kept):
            yield kept
        if left is not None:
            left -= len(kept)
        if len(kept) < len(times) or left == 0:
            return


def _rated_blocks(load: Load, generator: np.random.Generator) -> Iterator[Integers]:
    """Yield the times of one block after another, without end."""
    number = 0
    while True:
        starts = number * BLOCK_GAPS + _unit_starts(load, generator)
        yield np.rint(starts / load.rate_per_second * NANOS_PER_SECOND).astype(np.int64)
        number += 1


def _unit_starts(load: Load, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the times of a block's requests from its begin, in mean gaps."""
    if load.kind is LoadKind.CONSTANT:
        return np.arange(BLOCK_GAPS, dtype=np.float64)
    shape = load.burstiness if load.kind is LoadKind.GAMMA else 1.0
    gaps = generator.standard_gamma(shape, BLOCK_GAPS)
    ends = np.cumsum(gaps)
    return np.asarray(np.concatenate([[0.0], ends[:-1]]) * (BLOCK_GAPS / ends[-1]))


def steps_of(load: Load) -> tuple[UserStep, ...]:
    """Return the users of a closed load as jumps; of a ramp every moment at which one user comes or goes.

    From step to step a ramp passes the k-th user on the way after k / (number of users to come or go) of the time.
    """
    if not load.ramp:
        return load.user_steps
    steps = list(load.user_steps[:1])
    for before, after in pairwise(load.user_steps):
        change = after.users_count - before.users_count
        sign = 1 if change > 0 else -1
        duration_seconds = after.at_seconds - before.at_seconds
        steps.extend(
            UserStep(
                at_seconds=before.at_seconds + duration_seconds * passed / abs(change),
                users_count=before.users_count + sign * passed,
            )
            for passed in range(1, abs(change) + 1)
        )
    return tuple(steps)


def shares(load: Load, worker_count: int) -> list[Load]:
    """Return the load of each worker, ramps as steps.

    User k is worker k modulo `worker_count`'s, so that a worker has none only while there are fewer users than workers.
    Scheduled loads are not split, as their times come with the requests; nor is `request_count`, which limits the
    requests given to all.
    """
    if not load.is_closed:
        return [load] * worker_count
    steps = steps_of(load)
    return [
        Load(
            kind=load.kind,
            user_steps=_changes(
                UserStep(
                    at_seconds=step.at_seconds,
                    users_count=(step.users_count - worker + worker_count - 1) // worker_count,
                )
                for step in steps
            ),
            request_count=load.request_count,
        )
        for worker in range(worker_count)
    ]


def _changes(steps: Iterator[UserStep]) -> tuple[UserStep, ...]:
    """Return the first step and those that change something."""
    kept: list[UserStep] = []
    for step in steps:
        if not kept or step.users_count != kept[-1].users_count:
            kept.append(step)
    return tuple(kept)
