"""A measured load test once more, simulated: the same requests in the same order, with the server's constants.

Invariant: both sides are read the same way, so their difference is the model's error: medians over requests of the time
to first token, over tokens of the time between two, and tokens per second of the requests sent during the test.
Source: the metrics of Lazuka et al., 2024.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.batching.simulation import simulate_users
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_recommender.calibration_source import LoadTest

_DRAINING_SECONDS = 10.0
"""What the replies to the last requests of a test had to end in; what took longer was cut off and counts as failed."""
_BETWEEN_REPLY_AND_REQUEST_SECONDS = 0.002
"""Median in the raw records, from the end of a reply to the next request of a user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What a load test showed."""

    throughput_tokens_per_second: float
    ttft_ms: float
    nttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedList:
    """The list of requests that all load tests draw from, by number."""

    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tests: Iterable[LoadTest]) -> "FixedList":
        """Return the lengths that the tests' successful requests show; 1 and 1 where none of a number succeeded."""
        chosen = [(test.request_number[ok], test.timeline, ok) for test in tests for ok in [test.timeline.is_ok]]
        size = max((int(numbers.max(initial=-1)) + 1 for numbers, _, _ in chosen), default=0)
        inputs, outputs = np.ones(size, np.int64), np.ones(size, np.int64)
        for numbers, timeline, ok in chosen:
            inputs[numbers], outputs[numbers] = timeline.input_tokens[ok], timeline.output_tokens[ok]
        return cls(input_tokens=inputs, output_tokens=outputs)


def measured(test: LoadTest) -> Latencies:
    """Return what a load test showed, of its successful requests."""
    timeline = test.timeline
    ok = np.flatnonzero(timeline.is_ok & (np.diff(timeline.token_starts) > 0))
    if not len(ok):
        raise InvalidInputError([Violation("test", "has no successful request; give another")])
    return _latencies(
        arrival_seconds=timeline.arrival_seconds[ok],
        input_tokens=timeline.input_tokens[ok],
        output_tokens=timeline.output_tokens[ok],
        token_starts=timeline.token_starts,
        token_seconds=timeline.token_seconds,
        requests=ok,
        first=np.zeros(len(ok), np.int64),
        test_seconds=test.test_seconds,
    )


def replayed(
    test: LoadTest,
    *,
    requests: FixedList,
    constants: StepConstants,
    max_batch_weight: int,
    is_padded: bool,
    turnaround_seconds: float,
    is_withheld: npt.NDArray[np.bool_],
) -> Latencies:
    """Return what a simulated server shows under the same load.

    max_batch_weight: the server's setting. turnaround_seconds: from the sending of a request to its place in the queue.
    is_withheld: of which requests of the list the server withholds the first token, for want of text.
    """
    records = simulate_users(
        policy=TgisPolicy(max_batch_weight=max_batch_weight, is_padded=is_padded),
        tables=constants.tables(),
        input_tokens=requests.input_tokens,
        output_tokens=requests.output_tokens,
        users_count=test.users_count,
        duration_seconds=test.test_seconds,
        draining_seconds=_DRAINING_SECONDS,
        order=test.request_number[np.argsort(test.send_seconds, kind="stable")],
        turnaround_seconds=turnaround_seconds + _BETWEEN_REPLY_AND_REQUEST_SECONDS,
    )
    return _latencies(
        arrival_seconds=records.send_seconds,
        input_tokens=records.input_tokens,
        output_tokens=records.output_tokens,
        token_starts=records.token_starts,
        token_seconds=records.token_seconds,
        requests=np.arange(len(records.send_seconds)),
        first=is_withheld[records.request_index].astype(np.int64),
        test_seconds=test.test_seconds,
    )


def withheld_first_tokens(tests: Iterable[LoadTest], requests: FixedList) -> npt.NDArray[np.bool_]:
    """Return of which requests of the list these tests show that the first token is withheld.

    A request that they do not have is taken to be as most of them are.
    """
    count = np.zeros(len(requests.input_tokens), np.int64)
    withheld = np.zeros(len(requests.input_tokens), np.int64)
    for test in tests:
        messages = np.diff(test.timeline.token_starts)
        several = test.timeline.is_ok & (test.timeline.output_tokens > 1)
        np.add.at(count, test.request_number[several], 1)
        np.add.at(withheld, test.request_number[several & (messages == test.timeline.output_tokens - 1)], 1)
    usual = 2 * withheld.sum() > count.sum()
    return np.where(count > 0, 2 * withheld > count, usual) & (requests.output_tokens > 1)


def _latencies(
    *,
    arrival_seconds: npt.NDArray[np.float64],
    input_tokens: npt.NDArray[np.int64],
    output_tokens: npt.NDArray[np.int64],
    token_starts: npt.NDArray[np.int64],
    token_seconds: npt.NDArray[np.float64],
    requests: npt.NDArray[np.intp],
    first: npt.NDArray[np.int64],
    test_seconds: float,
) -> Latencies:
    """Read latencies off token times; first: which token of each of the requests its user got first."""
    begin, end = token_starts[requests] + first, token_starts[requests + 1]
    ttft_ms = (token_seconds[begin] - arrival_seconds) * 1e3
    is_later = np.zeros(len(token_seconds) + 1, np.int64)
    np.add.at(is_later, begin + 1, 1)
    np.add.at(is_later, end, -1)
    later = np.flatnonzero(np.cumsum(is_later)[:-1] > 0)
    itl_ms = (token_seconds[later] - token_seconds[later - 1]) * 1e3
    return Latencies(
        throughput_tokens_per_second=float(output_tokens.sum() / test_seconds),
        ttft_ms=float(np.median(ttft_ms)),
        nttft_ms=float(np.median(ttft_ms / input_tokens)),
        itl_ms=float(np.median(itl_ms)) if len(itl_ms) else float("nan"),
    )
