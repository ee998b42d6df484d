"""The messages and the status of one gRPC reply, after the fact.

Invariant: a message has come with the part that brought its last byte, however frames and parts cut it.
Source: grpc/doc/PROTOCOL-HTTP2.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import unquote

import numpy as np

from llmpilot_loadtester.protocols.http2 import DATA, Stream, content, frames
from llmpilot_loadtester.protocols.reply import STEP_COUNT, Received, paced
from llmpilot_loadtester.protocols.server_errors import (
    DISCONNECTED,
    INVALID,
    MALFORMED,
    REJECTED,
    SERVER_ERROR,
    TIMEOUT,
    meant_status,
    shortened,
    status_of_code,
)

OK_CODE = 0
_PREFIX_BYTES = 5
_OK_HTTP = 200
_MOST_DIGITS = 3
"""Of a status; Python refuses to read thousands of them."""
_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
_STATUSES = {
    "CANCELLED": DISCONNECTED,
    "INVALID_ARGUMENT": INVALID,
    "NOT_FOUND": INVALID,
    "PERMISSION_DENIED": INVALID,
    "UNAUTHENTICATED": INVALID,
    "UNIMPLEMENTED": INVALID,
    "OUT_OF_RANGE": INVALID,
    "DEADLINE_EXCEEDED": TIMEOUT,
    "RESOURCE_EXHAUSTED": REJECTED,
    "UNAVAILABLE": REJECTED,
}
"""Of the records, by gRPC's; all others are errors of the server. The fourth to sixth are of a wrong target or key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """The messages of a reply."""

    contents: Sequence[bytes]
    parts: Sequence[int]
    """By message: the index of the part that completed it."""
    problem: str = ""


def read_messages(received: Received, stream: Stream) -> Messages:
    """Return the messages that came whole."""
    data = stream.carried + b"".join(received.parts)
    payload_starts, pieces = [], []
    for kind, flags, stream_id, start, end in paced(frames(data), received.pause):
        if kind == DATA and stream_id == stream.id:
            start, end = content(data, flags, start, end)  # noqa: PLW2901 without padding
            payload_starts.append(start)
            pieces.append(data[start:end])
    body = b"".join(pieces)
    contents, ends, problem = [], [], ""
    at, length = 0, len(body)
    while at + _PREFIX_BYTES <= length:
        end = at + _PREFIX_BYTES + int.from_bytes(body[at + 1 : at + _PREFIX_BYTES], "big")
        if body[at]:
            problem = "a packed message, which was not asked for"
            break
        if end > length:
            break
        contents.append(body[at + _PREFIX_BYTES : end])
        ends.append(end)
        at = end
        if not len(contents) % STEP_COUNT:
            received.pause()
    starts = np.asarray([0, *accumulate(map(len, pieces[:-1]))], dtype=np.int64)
    last = np.asarray(ends, dtype=np.int64) - 1
    frame = np.searchsorted(starts, last, side="right") - 1
    places = np.asarray(payload_starts or [0], dtype=np.int64)[frame] + last - starts[frame]
    part_ends = len(stream.carried) + np.cumsum([len(part) for part in received.parts], dtype=np.int64)
    parts = np.searchsorted(part_ends, places, side="right")
    return Messages(contents=contents, parts=parts.tolist(), problem=problem)


def read_status(stream: Stream) -> tuple[str, str] | None:
    """Return what is wrong with a call as status and text; None: it ended well."""
    if stream.problem:
        kind = DISCONNECTED if stream.problem.startswith("the server leaves") else MALFORMED
        return kind, shortened(stream.problem)
    if stream.reset_code is not None:
        return DISCONNECTED, f"the server reset the call (HTTP/2 code {stream.reset_code})"
    headers = dict(stream.headers or ())
    trailers = dict(stream.trailers or ())
    if stream.headers is not None and "grpc-status" not in trailers:
        wrong = _wrong_headers(headers)
        if wrong:
            return wrong
    if not stream.is_ended:
        began = "before the reply began" if stream.headers is None else "before the call ended"
        return DISCONNECTED, f"the connection ended {began}"
    return _trailing_status(trailers)


def _wrong_headers(headers: dict[str, str]) -> tuple[str, str] | None:
    code = headers.get(":status", "")
    if code.isdecimal() and len(code) <= _MOST_DIGITS and int(code) != _OK_HTTP:
        return status_of_code(int(code)), f"HTTP {code} where gRPC was expected"
    kind = headers.get("content-type", "")
    return None if kind.startswith("application/grpc") else (MALFORMED, f"no gRPC: content-type {kind[:60]!r}")


def _trailing_status(trailers: dict[str, str]) -> tuple[str, str] | None:
    given = trailers.get("grpc-status")
    if given is None:
        return MALFORMED, "the call ended without a grpc-status"
    code = int(given) if given.isdecimal() and given.isascii() and len(given) <= _MOST_DIGITS else -1
    if code == OK_CODE:
        return None
    name = _CODES[code] if 0 <= code < len(_CODES) else f"grpc-status {given[:20]}"
    message = unquote(trailers.get("grpc-message", ""), errors="replace")
    status = meant_status(_STATUSES.get(name, SERVER_ERROR), message)
    return status, shortened(f"{name}: {message}" if message else name)


def pack_message(message: bytes) -> bytes:
    """Return a message as it is sent."""
    return b"\0" + len(message).to_bytes(4, "big") + message
