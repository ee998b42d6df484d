"""The true write time of every token, for load testers to compare theirs with.

Invariant: `written_nanos` is read just before the system call that hands the token to the kernel, so no client can
have received it earlier; it is CLOCK_REALTIME, the clock of the kernel's receive timestamps.

A file is the magic line, then blocks: two little-endian 32-bit counts (bytes of names, rows), the names as a JSON array
of [request id, choice, arrival], the rows as five 64-bit integers each.
"""

import json
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation

_MAGIC = b"LLM-Pilot write log 1\n"
_COUNTS = struct.Struct("<II")
_COLUMN_COUNT = 5
_ROW_BYTES = 8 * _COLUMN_COUNT

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writes:
    """The columns of a write log. Every array but the first three has one row per token, in the order of writing."""

    request_ids: tuple[str, ...]
    """By reply: the x-request-id of its HTTP response or gRPC call."""
    choices: Integers
    """By reply: its index among the choices of the same response."""
    arrival_nanos: Integers
    """By reply: when the request was taken in."""
    reply: Integers
    """Row of the three columns above."""
    token_index: Integers
    due_nanos: Integers
    """When the model says that the token leaves."""
    written_nanos: Integers
    chunk_tokens: Integers
    """How many tokens left in the same frame."""

    @property
    def lateness_nanos(self) -> Integers:
        """By token: how long after its time it left."""
        return self.written_nanos - self.due_nanos

    def of(self, request_id: str, choice: int = 0) -> npt.NDArray[np.bool_]:
        """Return which rows are of one reply."""
        replies = [
            index
            for index, name in enumerate(self.request_ids)
            if name == request_id and int(self.choices[index]) == choice
        ]
        return np.isin(self.reply, replies)


class WriteLog:
    """Rows in memory; `flush` moves them to the file, if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self._names: list[tuple[str, int, int]] = []
        self._reply_count = 0
        self._rows = array("q")
        self.extend = self._rows.extend
        """Adds one row or more: reply, token index, due, written, tokens in the chunk. The array's own method, as this
        is called for every token."""
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = path.open("wb", buffering=0)
                self.write_block(_MAGIC)
            except OSError as error:
                raise PreconditionError(
                    f"cannot write {path}: {error.strerror}; give the write log another path"
                ) from error

    def register(self, request_id: str, choice: int, arrival_nanos: int) -> int:
        """Name a reply; returns the number that its rows start with."""
        self._names.append((request_id, choice, arrival_nanos))
        self._reply_count += 1
        return self._reply_count - 1

    def take_block(self) -> bytes:
        """Remove what is in memory and return it as a block of the file; b"" when there is nothing."""
        if not self._names and not self._rows:
            return b""
        names = json.dumps(self._names).encode()
        block = _COUNTS.pack(len(names), len(self._rows) // _COLUMN_COUNT) + names + _little_endian(self._rows)
        self._names.clear()
        del self._rows[:]
        return block

    def write_block(self, block: bytes) -> None:
        """Append a block to the file; may be called from another thread, one call at a time.

        The first OSError ends the file: what was whole stays readable, and later blocks are dropped.
        """
        if self._file is None:
            return
        view = memoryview(block)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._file.close()
            self._file = None
            raise

    def close(self) -> None:
        """Write what is left and close the file."""
        self.write_block(self.take_block())
        if self._file is not None:
            self._file.close()
            self._file = None

    def writes(self) -> Writes:
        """Return what is in memory."""
        return _columns([(self._names, _little_endian(self._rows))])


def read_write_log(path: Path) -> Writes:
    """Read a file; the unfinished last block of a process that was killed is left out.

    Raises InvalidInputError for a file of another kind.
    """
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise InvalidInputError([Violation(str(path), "is not a write log; make one with --write-log")])
    return _columns(list(_blocks(content)))


def _blocks(content: bytes) -> Iterator[tuple[list[tuple[str, int, int]], bytes]]:
    at = len(_MAGIC)
    while at + _COUNTS.size <= len(content):
        name_bytes, row_count = _COUNTS.unpack_from(content, at)
        names_at = at + _COUNTS.size
        rows_at = names_at + name_bytes
        at = rows_at + row_count * _ROW_BYTES
        if at <= len(content):
            yield json.loads(content[names_at:rows_at]), content[rows_at:at]


def _columns(blocks: list[tuple[list[tuple[str, int, int]], bytes]]) -> Writes:
    names = [name for block, _ in blocks for name in block]
    rows = np.frombuffer(b"".join(rows for _, rows in blocks), dtype="<i8").reshape(-1, _COLUMN_COUNT).astype(np.int64)
    reply, token_index, due_nanos, written_nanos, chunk_tokens = rows.T.copy()
    return Writes(
        request_ids=tuple(name for name, _, _ in names),
        choices=np.array([choice for _, choice, _ in names], dtype=np.int64),
        arrival_nanos=np.array([arrival for _, _, arrival in names], dtype=np.int64),
        reply=reply,
        token_index=token_index,
        due_nanos=due_nanos,
        written_nanos=written_nanos,
        chunk_tokens=chunk_tokens,
    )


def _little_endian(rows: "array[int]") -> bytes:
    if sys.byteorder == "big":
        rows = rows[:]
        rows.byteswap()
    return rows.tobytes()
