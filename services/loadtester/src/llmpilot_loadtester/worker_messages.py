"""What the supervisor and a worker process say to each other over two pipes.

A message is a little-endian 32-bit length, a byte for its kind, and the payload: JSON of the dataclass of that kind, or
packed bytes. Invariant: both sides speak only the kinds of this module; a worker whose pipe ends stops by itself.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.domain.spec import Load, Target

_HEADER = struct.Struct("<IB")
_REQUEST = struct.Struct("<qqii")
LARGEST_MESSAGE_BYTES = 256 * 1024 * 1024


class Kind(IntEnum):
    """What a message is."""

    PROBE = 1
    """Down, `ProbeOrder`: look at the target."""
    STAGE = 2
    """Down, `StageOrder`: be ready to begin a stage at its start time."""
    REQUESTS = 3
    """Down, packed: requests to send, in order."""
    NO_MORE_REQUESTS = 4
    """Down, empty: the last ones were given."""
    END_STAGE = 5
    """Down, empty: send nothing more, cut off what is under way (`cancelled`), record all, say `STAGE_ENDED`."""
    PROBED = 11
    """Up, `Probed`."""
    RECORDS = 12
    """Up, `record_frames` bytes: requests that ended."""
    PULSE = 13
    """Up, `Pulse`: every 50 to 100 ms while a stage runs."""
    STAGE_ENDED = 14
    """Up, `WorkerHealth`: everything was recorded."""
    FAILED = 15
    """Up, `Failed`: the worker cannot go on, and exits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOrder:
    """Look at a target: connect, ask what it serves."""

    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a worker found at the target."""

    problem: str = ""
    """Empty: it can be put under load. Else what is wrong and what to do, in a sentence."""
    served_models: tuple[str, ...] = ()
    simulated: bool = False
    """Whether the server says of itself that it is a simulator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """A worker's share of a stage."""

    target: Target
    """With the served model filled in."""
    load: Load
    """With this worker's share of the users; scheduled arrivals come with the requests."""
    first_user_index: int
    start_nanos: int
    """CLOCK_REALTIME of time 0."""
    measure_from_nanos: int
    measure_until_nanos: int
    request_id_prefix: str
    """The x-request-id of a request is this and its index."""
    reply_tokenizer_json: str = ""
    """Empty: replies whose server reports no usage count a token a chunk."""
    spawn_per_second: float = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """How a worker does."""

    users_count: int
    in_flight_count: int
    measured_in_flight_count: int
    """Requests under way that were sent in the measured window."""
    sent_count: int
    queued_count: int
    """Requests given and not yet sent."""
    health: WorkerHealth


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why a worker cannot go on."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """A request to send."""

    index: int
    body: bytes
    input_tokens: int
    """-1: unknown."""
    scheduled_nanos: int
    """CLOCK_REALTIME at which to send it; -1: when a user is free."""


def pack_message(kind: Kind, payload: bytes = b"") -> bytes:
    """Return the bytes of a message."""
    return _HEADER.pack(len(payload), kind) + payload


def pack_json(kind: Kind, message: object) -> bytes:
    """Return the bytes of a message whose payload is a dataclass."""
    return pack_message(kind, msgspec.json.encode(message))


def pack_requests(requests: Sequence[QueuedRequest]) -> bytes:
    """Return the bytes of a REQUESTS message."""
    parts = []
    for request in requests:
        parts.append(_REQUEST.pack(request.index, request.scheduled_nanos, request.input_tokens, len(request.body)))
        parts.append(request.body)
    return pack_message(Kind.REQUESTS, b"".join(parts))


def unpack_requests(payload: bytes) -> Iterator[QueuedRequest]:
    """Yield the requests of a REQUESTS payload."""
    at = 0
    while at < len(payload):
        index, scheduled_nanos, input_tokens, size = _REQUEST.unpack_from(payload, at)
        at += _REQUEST.size
        yield QueuedRequest(
            index=index, body=payload[at : at + size], input_tokens=input_tokens, scheduled_nanos=scheduled_nanos
        )
        at += size


class MessageReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Take the next bytes; yields the messages that are whole. ValueError: not what this module writes."""
        self._pending += data
        while len(self._pending) >= _HEADER.size:
            size, kind = _HEADER.unpack_from(self._pending)
            if size > LARGEST_MESSAGE_BYTES:
                raise ValueError(f"a message of {size} bytes")
            end = _HEADER.size + size
            if len(self._pending) < end:
                return
            payload = bytes(self._pending[_HEADER.size : end])
            del self._pending[:end]
            yield Kind(kind), payload
