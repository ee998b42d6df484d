"""What happened to every request of a stage, in columns.

Invariant: the chunks of request i are entries `chunk_starts[i]` to `chunk_starts[i + 1]` of the chunk columns, in the
order of their arrival. All times are CLOCK_REALTIME nanoseconds since 1970 until `since` makes them relative to the
start of the stage; -1 in a column means that nobody reported it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.record_schema import (
    FINISH_REASONS,
    OK,
    STAMP_SOURCES,
    STATUSES,
    TOKEN_COUNT_SOURCES,
    RecordTable,
)

Integers = npt.NDArray[np.int64]
UNKNOWN = -1
OK_CODE = STATUSES.index(OK)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordBatch:
    """One entry per request that ended, in any order."""

    request_index: Integers
    user_index: Integers
    """-1: nobody's, it was sent by a schedule."""
    scheduled_nanos: Integers
    send_nanos: Integers
    first_byte_nanos: Integers
    """-1: none came."""
    end_nanos: Integers
    input_tokens: Integers
    """-1: unknown."""
    reasoning_tokens: Integers
    """Output tokens before the answer, as the server counts them; -1: it did not."""
    token_count_source: Integers
    """Index into TOKEN_COUNT_SOURCES."""
    status: Integers
    """Index into STATUSES."""
    finish_reason: Integers
    """Index into FINISH_REASONS; -1: none."""
    stamp_source: Integers
    """Index into STAMP_SOURCES."""
    errors: tuple[str, ...]
    """By request; empty if ok."""
    chunk_starts: Integers
    """One more entry, for where the chunks of the last request end."""
    chunk_nanos: Integers
    """By part of a reply that has output tokens: when it arrived."""
    chunk_tokens: Integers
    """By part: how many tokens, at least 1."""

    def __len__(self) -> int:
        return len(self.request_index)

    @property
    def is_ok(self) -> npt.NDArray[np.bool_]:
        """Whether each request succeeded."""
        return np.asarray(self.status == OK_CODE)

    @property
    def output_tokens(self) -> Integers:
        """Tokens that each request got."""
        sums = np.concatenate([[0], np.cumsum(self.chunk_tokens)])
        return np.asarray(sums[self.chunk_starts[1:]] - sums[self.chunk_starts[:-1]], dtype=np.int64)

    def since(self, start_nanos: int) -> "RecordBatch":
        """Return the same records with times relative to `start_nanos`."""
        known = self.first_byte_nanos != UNKNOWN
        return replace(
            self,
            scheduled_nanos=self.scheduled_nanos - start_nanos,
            send_nanos=self.send_nanos - start_nanos,
            first_byte_nanos=np.where(known, self.first_byte_nanos - start_nanos, UNKNOWN),
            end_nanos=self.end_nanos - start_nanos,
            chunk_nanos=self.chunk_nanos - start_nanos,
        )

    def take(self, rows: npt.NDArray[np.bool_] | Integers) -> "RecordBatch":
        """Return some requests: a mask, or row numbers in the wanted order."""
        indices = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        counts = np.diff(self.chunk_starts)[indices]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        chunks = np.repeat(self.chunk_starts[:-1][indices] - starts[:-1], counts) + np.arange(starts[-1])
        columns = {name: getattr(self, name)[indices] for name in REQUEST_COLUMNS}
        return RecordBatch(
            **columns,
            errors=tuple(self.errors[int(index)] for index in indices),
            chunk_starts=starts,
            chunk_nanos=self.chunk_nanos[chunks],
            chunk_tokens=self.chunk_tokens[chunks],
        )

    def table(self, *, origin: str) -> RecordTable:
        """Return the records in the schema of `record_schema`; times must be relative to the start (`since`)."""
        bounds = list(zip(self.chunk_starts[:-1].tolist(), self.chunk_starts[1:].tolist(), strict=True))
        return {
            "request_index": self.request_index.tolist(),
            "user_index": _nullable(self.user_index),
            "scheduled_time_nanos": self.scheduled_nanos.tolist(),
            "send_time_nanos": self.send_nanos.tolist(),
            "first_byte_time_nanos": _nullable(self.first_byte_nanos),
            "end_time_nanos": self.end_nanos.tolist(),
            "chunk_time_nanos": [self.chunk_nanos[start:end] for start, end in bounds],
            "chunk_token_counts": [self.chunk_tokens[start:end] for start, end in bounds],
            "input_token_count": _nullable(self.input_tokens),
            "output_token_count": self.output_tokens.tolist(),
            "token_count_source": [TOKEN_COUNT_SOURCES[code] for code in self.token_count_source.tolist()],
            "status": [STATUSES[code] for code in self.status.tolist()],
            "error": list(self.errors),
            "finish_reason": [None if code < 0 else FINISH_REASONS[code] for code in self.finish_reason.tolist()],
            "stamp_source": [STAMP_SOURCES[code] for code in self.stamp_source.tolist()],
            "origin": [origin] * len(self),
        }


REQUEST_COLUMNS = tuple(
    field.name
    for field in fields(RecordBatch)
    if field.name not in {"errors", "chunk_starts", "chunk_nanos", "chunk_tokens"}
)
"""The columns with one number per request."""


def empty_records() -> RecordBatch:
    """Return a batch without requests."""
    none = np.zeros(0, np.int64)
    columns = dict.fromkeys(REQUEST_COLUMNS, none)
    return RecordBatch(**columns, errors=(), chunk_starts=np.zeros(1, np.int64), chunk_nanos=none, chunk_tokens=none)


def joined(batches: Sequence[RecordBatch]) -> RecordBatch:
    """Return the requests of all batches, ordered by the time they were sent; exact, whoever recorded them."""
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        return empty_records()
    offsets = np.concatenate([[0], np.cumsum([len(batch.chunk_nanos) for batch in batches])])
    starts = [batch.chunk_starts[:-1] + offset for batch, offset in zip(batches, offsets[:-1], strict=True)]
    columns = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in REQUEST_COLUMNS}
    together = RecordBatch(
        **columns,
        errors=tuple(error for batch in batches for error in batch.errors),
        chunk_starts=np.concatenate([*starts, offsets[-1:]]).astype(np.int64),
        chunk_nanos=np.concatenate([batch.chunk_nanos for batch in batches]),
        chunk_tokens=np.concatenate([batch.chunk_tokens for batch in batches]),
    )
    return together.take(np.lexsort((together.request_index, together.send_nanos)))


def _nullable(values: Integers) -> list[int | None]:
    return [None if value == UNKNOWN else value for value in values.tolist()]
