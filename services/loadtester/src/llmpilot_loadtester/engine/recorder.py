"""Turns replies into records while the load goes on: parses when the event loop has nothing else to do.

Invariant: every request that is added becomes exactly one row, in which `record_schema.problems` finds nothing; times
that the clocks put out of order are moved to the one before.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gevent
import numpy as np
from gevent.event import Event
from gevent.hub import get_hub

from llmpilot_contracts.record_schema import FINISH_REASONS, STAMP_SOURCES, STATUSES, TOKEN_COUNT_SOURCES
from llmpilot_loadtester.domain.record_frames import pack_records
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, UNKNOWN, RecordBatch
from llmpilot_loadtester.engine.client import Generation

BACKLOG_BYTES = 16 * 1024 * 1024
"""Of replies that wait; more than that is parsed at once."""
_LONGEST_WAIT_SECONDS = 0.5
_CATCH_UP_SECONDS = 0.005
_STATUS_CODES = {name: code for code, name in enumerate(STATUSES)}
_FINISH_CODES = {None: UNKNOWN} | {name: code for code, name in enumerate(FINISH_REASONS)}
_STAMP_CODES = {name: code for code, name in enumerate(STAMP_SOURCES)}
_COUNT_CODES = {name: code for code, name in enumerate(TOKEN_COUNT_SOURCES)}


@dataclass(slots=True, kw_only=True)
class EndedRequest:
    """A request that ended, and what the load test knows of it."""

    request_index: int
    user_index: int
    """-1: nobody's."""
    scheduled_nanos: int
    input_tokens: int
    """-1: unknown."""
    generation: Generation
    context: Any = None
    """Of whoever wants to know when it was parsed."""
    added_seconds: float = 0.0
    """Of time.monotonic."""
    size_bytes: int = 0


class Recorder:
    """Takes requests that ended; gives their records away as packed frames."""

    def __init__(
        self,
        sink: Callable[[bytes, int], None] | None,
        *,
        on_parsed: Callable[[EndedRequest], None] | None = None,
        asked_model: str = "",
        without_secrets: Callable[[str], str] = str,
    ) -> None:
        """sink: takes a frame and the number of its records; None: records are not wanted.

        asked_model: the model that replies should be of; empty: any. without_secrets: makes an error fit to be shown.
        """
        self.coalesced_read_count = 0
        """Reads that brought several parts with tokens of one reply."""
        self.other_model = ""
        """The model that a reply was of instead; empty: none was."""
        self.other_model_count = 0
        """Replies of other models."""
        self._sink = sink
        self._asked_model = asked_model
        self._on_parsed = on_parsed
        self._without_secrets = without_secrets
        self._backlog: deque[EndedRequest] = deque()
        self._backlog_bytes = 0
        self._has_backlog = Event()
        self._rows = _Rows()
        self._hub = get_hub()
        self._idle = self._hub.loop.idle()
        self._greenlet = gevent.spawn(self._parse_when_idle)

    @property
    def backlog_count(self) -> int:
        """Replies that wait to be parsed."""
        return len(self._backlog)

    def add(self, ended: EndedRequest) -> None:
        """Take a request that ended."""
        ended.added_seconds = time.monotonic()
        ended.size_bytes = sum(map(len, ended.generation.raw.parts))
        self._backlog.append(ended)
        self._backlog_bytes += ended.size_bytes
        while self._backlog_bytes > BACKLOG_BYTES:
            self._parse_next()
        self._has_backlog.set()

    def flush(self) -> None:
        """Give away the records there are. Where the loop is never idle, what waits too long is parsed first."""
        until = time.monotonic() + _CATCH_UP_SECONDS
        while self._backlog and time.monotonic() < until:
            if self._backlog[0].added_seconds > until - _LONGEST_WAIT_SECONDS:
                break
            self._parse_next()
        if self._sink is not None and len(self._rows):
            rows, self._rows = self._rows, _Rows()
            batch = rows.batch()
            self.coalesced_read_count += coalesced_count(batch)
            self._sink(pack_records(batch), len(batch))

    def drain(self) -> None:
        """Parse and give away everything."""
        while self._backlog:
            self._parse_next()
        self.flush()

    def close(self) -> None:
        """Parse nothing more."""
        self._greenlet.kill()
        self._idle.close()

    def _parse_when_idle(self) -> None:
        while True:
            self._has_backlog.wait()
            self._wait_until_idle()
            if self._backlog:
                first = self._backlog[0]
                first.generation.parse(self._wait_until_idle)
                if self._backlog and self._backlog[0] is first:  # nobody was in a hurry
                    self._parse_next()
            if not self._backlog:
                self._has_backlog.clear()

    def _wait_until_idle(self) -> None:
        # A sleep(0) would not do: gevent runs callbacks for milliseconds before it looks at sockets again.
        self._hub.wait(self._idle)

    def _parse_next(self) -> None:
        ended = self._backlog.popleft()
        self._backlog_bytes -= ended.size_bytes
        model = ended.generation.reply.served_model
        if model and self._asked_model and model != self._asked_model:
            self.other_model = model
            self.other_model_count += 1
        if self._sink is not None:
            self._rows.add(ended, self._without_secrets(ended.generation.error))
        if self._on_parsed is not None:
            self._on_parsed(ended)


class _Rows:
    """Records, not yet packed."""

    def __init__(self) -> None:
        self._numbers: list[tuple[int, ...]] = []
        self._errors: list[str] = []
        self._starts = [0]
        self._stamps: list[int] = []
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, ended: EndedRequest, error: str) -> None:
        """Append a row."""
        generation = ended.generation
        raw, reply = generation.raw, generation.reply
        send_nanos = max(raw.send_nanos, 0)
        first_nanos = max(raw.stamps[0], send_nanos) if raw.stamps else UNKNOWN
        at = len(self._stamps)
        self._stamps.extend(accumulate(reply.chunk_stamps, max, initial=max(first_nanos, send_nanos)))
        del self._stamps[at]  # where it began
        self._tokens.extend(reply.chunk_tokens)
        latest_nanos = self._stamps[-1] if reply.chunk_stamps else max(first_nanos, send_nanos)
        numbers = {
            "request_index": ended.request_index,
            "user_index": ended.user_index,
            "scheduled_nanos": min(ended.scheduled_nanos, send_nanos),
            "send_nanos": send_nanos,
            "first_byte_nanos": first_nanos,
            "end_nanos": max(raw.end_nanos, latest_nanos),
            "input_tokens": ended.input_tokens if reply.input_tokens is None else reply.input_tokens,
            "reasoning_tokens": UNKNOWN if reply.reasoning_tokens is None else reply.reasoning_tokens,
            "token_count_source": _COUNT_CODES[reply.token_count_source],
            "status": _STATUS_CODES[generation.status],
            "finish_reason": _FINISH_CODES[reply.finish_reason],
            "stamp_source": _STAMP_CODES[raw.stamp_source],
        }
        self._numbers.append(tuple(numbers[name] for name in REQUEST_COLUMNS))
        self._errors.append(error)
        self._starts.append(len(self._stamps))

    def batch(self) -> RecordBatch:
        """Return all rows."""
        table = np.array(self._numbers, np.int64).reshape(-1, len(REQUEST_COLUMNS)).T
        return RecordBatch(
            **dict(zip(REQUEST_COLUMNS, np.ascontiguousarray(table), strict=True)),
            errors=tuple(self._errors),
            chunk_starts=np.array(self._starts, np.int64),
            chunk_nanos=np.array(self._stamps, np.int64),
            chunk_tokens=np.array(self._tokens, np.int64),
        )


def coalesced_count(batch: RecordBatch) -> int:
    """Return how many reads brought several parts with tokens: parts of one reply with one time, counted once."""
    same = np.diff(batch.chunk_nanos) == 0
    inner_starts = batch.chunk_starts[1:-1]
    same[inner_starts[(inner_starts > 0) & (inner_starts < len(batch.chunk_nanos))] - 1] = False
    return int(np.count_nonzero(same & ~np.concatenate([[False], same[:-1]])))
