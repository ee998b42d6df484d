"""Load tests in the public raw records as a server saw them: when every token arrived.

The times in `latency_ms_per_token` add up from the start of a request: its first entry is the server's word that the
request is in the queue, every further one a message with a token.
Invariant: no request is left out; one that failed keeps the tokens that it got.
Source: IBM/LLM-performance-prediction (Lazuka et al., 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.steps.iterations import TokenTimeline
from llmpilot_recommender.aggregation import parse_lists
from llmpilot_recommender.raw_records import RawFile, parse_raw_file, read_columns, read_numbers
from llmpilot_recommender.raw_source import raw_csvs

_OK = 200
_COLUMNS = ("smpnum", "start_timestamp", "end_timestamp")
_SECONDS_PER_MS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """One load test of the raw records; the arrays have an entry per request, in the order of the file."""

    llm: str
    gpu_profile: str
    users_count: int
    test_seconds: int
    """Users sent no request later than that; the replies to those they had sent were waited for."""
    request_number: npt.NDArray[np.int64]
    """Which request of the fixed list it was."""
    send_seconds: npt.NDArray[np.float64]
    """Since the first request of the test."""
    timeline: TokenTimeline

    @property
    def error_rate(self) -> float:
        """Share of the requests that failed."""
        return float(1 - self.timeline.is_ok.mean())

    @property
    def turnaround_seconds(self) -> float:
        """Median time from the sending of a request to its place in the server's queue."""
        return float(np.median((self.timeline.arrival_seconds - self.send_seconds)[self.timeline.is_ok]))


def load_tests(path: Path) -> Iterator[LoadTest]:
    """Yield the load tests in a folder of CSVs or a tar archive. Raises InvalidInputError at the first bad file."""
    for name, content in raw_csvs(path)[0]:
        yield parse_load_test(name, content)


def parse_load_test(name: str, content: bytes) -> LoadTest:
    """Read one CSV. Raises InvalidInputError that lists every bad column and row."""
    raw = parse_raw_file(name, content)
    table = read_columns(name, content, _COLUMNS)
    violations: list[Violation] = []
    number, start, end = (read_numbers(name, table[column], column, violations) for column in _COLUMNS)
    if not violations:
        violations += _empty(name, "smpnum", number) + _empty(name, "start_timestamp", start)
    if violations:
        raise InvalidInputError(violations)
    begin = start.min()
    send_seconds = (start - begin) * _SECONDS_PER_MS
    return LoadTest(
        llm=raw.llm,
        gpu_profile=raw.gpu_profile,
        users_count=raw.users_count,
        test_seconds=raw.test_seconds,
        request_number=number.astype(np.int64),
        send_seconds=send_seconds,
        timeline=_timeline(raw, send_seconds, (end - begin) * _SECONDS_PER_MS),
    )


def _empty(name: str, column: str, numbers: npt.NDArray[np.float64]) -> list[Violation]:
    return [
        Violation(f"{name} row {row + 1}, column {column}", "must not be empty")
        for row in np.flatnonzero(~np.isfinite(numbers))
    ]


def _timeline(
    raw: RawFile, send_seconds: npt.NDArray[np.float64], end_seconds: npt.NDArray[np.float64]
) -> TokenTimeline:
    entries, starts = parse_lists(raw.name, raw.latency_text, raw.latency_offsets)
    counts = np.diff(starts)
    total = np.concatenate([[0], np.cumsum(entries)])
    owner = np.repeat(np.arange(len(counts)), counts)
    seconds = send_seconds[owner] + (total[1:] - total[starts[:-1]][owner]) * _SECONDS_PER_MS
    is_queued = counts > 0
    arrival = send_seconds.copy()
    arrival[is_queued] = seconds[starts[:-1][is_queued]]
    is_token = np.ones(len(seconds), np.bool_)
    is_token[starts[:-1][is_queued]] = False
    return TokenTimeline(
        arrival_seconds=arrival,
        end_seconds=end_seconds,
        input_tokens=np.nan_to_num(raw.input_tokens).astype(np.int64),
        output_tokens=np.nan_to_num(raw.output_tokens).astype(np.int64),
        is_ok=raw.status == _OK,
        token_starts=np.concatenate([[0], np.cumsum(np.maximum(counts - 1, 0))]),
        token_seconds=seconds[is_token],
    )
