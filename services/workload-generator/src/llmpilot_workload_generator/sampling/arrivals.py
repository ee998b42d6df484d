"""Arrival processes: when each request is sent, in whole nanoseconds from the begin of the load.

Invariant: the time of request i depends on the process, the seed and i alone, never falls with i, and the first request
of every process arrives at 0: a rate is that of the gaps after it.
Random gaps are made in blocks, each by a generator of its own (numpy's Philox, keyed by seed and block), and rounded
where they have been added up within the block, so that a mean gap of a few nanoseconds is not biased.
"""

import math
from threading import Lock
from typing import Protocol

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Floats, Integers

BLOCK_GAPS = 65_536
LARGEST_RANDOM_START = 10**9
"""The gaps before the first request asked for are added up first, in ten seconds or so."""
NANOS_PER_SECOND = 1e9

_LARGEST_NANOS = 2.0**63 - 2**11
_BLOCKS_KEPT = 4
_RANDOM_KINDS = (ArrivalKind.POISSON, ArrivalKind.GAMMA)
_KINDS_WITH_RATE = (ArrivalKind.CONSTANT, *_RANDOM_KINDS)


class ArrivalTimes(Protocol):
    """When requests arrive."""

    def nanos(self, start: int, count: int) -> Integers:
        """Return the times of requests `start` to `start + count - 1`; InvalidInputError beyond 292 years."""
        ...


def arrival_violations(arrivals: Arrivals, trace_nanos: Integers | None) -> list[Violation]:
    """Say what is wrong with an arrival process; `trace_nanos` are the times of a trace, where one was kept."""
    violations = []
    checked = []
    if arrivals.kind in _KINDS_WITH_RATE:
        checked.append(("rate_per_second", arrivals.rate_per_second))
    if arrivals.kind is ArrivalKind.GAMMA:
        checked.append(("burstiness", arrivals.burstiness))
    if arrivals.kind is ArrivalKind.TRACE:
        checked.append(("speed", arrivals.speed))
        if trace_nanos is None or not len(trace_nanos):
            violations.append(
                Violation("arrivals.kind", "trace needs a model that keeps its trace: fit it with keep_replay")
            )
    for name, value in checked:
        if not 0 < value < math.inf:
            violations.append(Violation(f"arrivals.{name}", f"must be > 0, is {value:g}"))
    return violations


def arrival_times(arrivals: Arrivals, *, seed: int, trace_nanos: Integers | None) -> ArrivalTimes | None:
    """Return a process without violations; None for a closed loop, in which nothing arrives by itself."""
    match arrivals.kind:
        case ArrivalKind.CLOSED:
            return None
        case ArrivalKind.ALL_AT_ONCE:
            return _AllAtOnce()
        case ArrivalKind.CONSTANT:
            return _Constant(arrivals.rate_per_second)
        case ArrivalKind.TRACE:
            return _Recorded(np.zeros(1, np.int64) if trace_nanos is None else trace_nanos, arrivals.speed)
        case ArrivalKind.POISSON | ArrivalKind.GAMMA:
            shape = arrivals.burstiness if arrivals.kind is ArrivalKind.GAMMA else 1.0
            return _RandomGaps(arrivals.rate_per_second, shape, seed)


def _whole(nanos: Floats) -> Integers:
    if len(nanos) and not nanos[-1] <= _LARGEST_NANOS:
        raise _too_late()
    return np.rint(nanos).astype(np.int64)


def _too_late() -> InvalidInputError:
    return InvalidInputError([Violation("arrivals", "a request arrives later than in 292 years")])


class _AllAtOnce:
    def nanos(self, start: int, count: int) -> Integers:  # noqa: ARG002 all the same
        return np.zeros(count, np.int64)


class _Constant:
    def __init__(self, rate_per_second: float) -> None:
        self._rate_per_second = rate_per_second

    def nanos(self, start: int, count: int) -> Integers:
        indices = np.arange(start, start + count, dtype=np.float64)
        with np.errstate(over="ignore"):  # such times are refused
            return _whole(indices / self._rate_per_second * NANOS_PER_SECOND)


class _Recorded:
    """The times of a trace; after its end it begins again, a mean gap later."""

    def __init__(self, trace_nanos: Integers, speed: float) -> None:
        self._trace_nanos = trace_nanos - trace_nanos[0]
        last = int(self._trace_nanos[-1])
        self._period_nanos = last + round(last / max(len(trace_nanos) - 1, 1))
        self._speed = speed

    def nanos(self, start: int, count: int) -> Integers:
        length = len(self._trace_nanos)
        if (start + count) / length * self._period_nanos / min(self._speed, 1.0) > _LARGEST_NANOS:
            raise _too_late()
        rounds, places = np.divmod(np.arange(start, start + count), length)
        recorded = rounds * self._period_nanos + self._trace_nanos[places]
        return recorded if self._speed == 1.0 else _whole(recorded / self._speed)


class _RandomGaps:
    """Gaps of a gamma distribution; what blocks before took is added up once, from the first block on."""

    def __init__(self, rate_per_second: float, shape: float, seed: int) -> None:
        self._mean_nanos = NANOS_PER_SECOND / rate_per_second
        self._shape = shape
        self._seed = seed
        self._starts = [0]
        self._kept: dict[int, Integers] = {}
        self._lock = Lock()

    def nanos(self, start: int, count: int) -> Integers:
        last = max(start + count - 1, start) // BLOCK_GAPS
        parts = []
        with self._lock:
            if (start // BLOCK_GAPS - len(self._starts)) * BLOCK_GAPS > LARGEST_RANDOM_START:
                problem = f"must be at most {LARGEST_RANDOM_START:,} with arrivals at random, is {start:,}"
                raise InvalidInputError([Violation("start", f"{problem}; further on go constant ones, or none")])
            for number in range(start // BLOCK_GAPS, last + 1):
                first = number * BLOCK_GAPS
                parts.append(self._block(number)[max(start - first, 0) : start + count - first])
        return np.concatenate(parts)

    def _block(self, number: int) -> Integers:
        """Return the times of the requests of a block."""
        for before in range(len(self._starts) - 1, number):
            self._make(before)
        return self._kept[number] if number in self._kept else self._make(number)

    def _make(self, number: int) -> Integers:
        """Return the times of a block of which it is known when it begins, and remember when it ends."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, number], np.uint64)))
        if self._shape == 1.0:
            gaps = generator.standard_exponential(BLOCK_GAPS)
        else:
            gaps = generator.standard_gamma(self._shape, BLOCK_GAPS) / self._shape
        ends = _whole(np.cumsum(gaps) * self._mean_nanos)
        start = self._starts[number]
        if number + 1 == len(self._starts):
            self._starts.append(start + int(ends[-1]))
        if self._starts[number + 1] > _LARGEST_NANOS:
            raise _too_late()
        times = np.concatenate((np.zeros(1, np.int64), ends[:-1])) + start
        while len(self._kept) >= _BLOCKS_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[number] = times
        return times
