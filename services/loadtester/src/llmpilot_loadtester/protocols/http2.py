"""The client's side of an HTTP/2 connection that carries one call at a time.

Invariant: no frame is lost or read twice however the parts are cut, between two calls too; the server never waits for
flow control, and ours never sends more than the server has room for. Of a part that is one whole frame with data, the
common case, only the nine bytes of its header are looked at.
Source: RFC 9113, RFC 7541.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

from hpack import Decoder, Encoder, HPACKError
from hpack.struct import NeverIndexedHeaderTuple

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, *range(3, 10)
END_STREAM, END_HEADERS, PADDED, PRIORITY, ACK = 0x1, 0x4, 0x8, 0x20, 0x1
NO_ERROR, CANCEL = 0, 8
FRAME_HEAD_BYTES = 9
LARGEST_FRAME_BYTES = 16384
"""Of its payload; larger ones are sent to those only who ask for them."""
LARGEST_HEADER_BLOCK_BYTES = 64 * 1024
_LARGEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65535
_WINDOW_SHARE = 2**30
"""After so many bytes the connection's window is filled up again."""
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 2, 4, 5
_STREAM_MASK = 2**31 - 1
_frame_head = struct.Struct(">HBBBI")
_setting = struct.Struct(">HI")

Headers = Sequence[tuple[str, str]]


def pack_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    size = len(payload)
    return _frame_head.pack(size >> 8, size & 255, kind, flags, stream_id) + payload


def frames(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield kind, flags, stream, and where the payload begins and ends, of every frame that is whole."""
    at, length = 0, len(data)
    unpack = _frame_head.unpack_from
    while at + FRAME_HEAD_BYTES <= length:
        high, low, kind, flags, stream_id = unpack(data, at)
        at += FRAME_HEAD_BYTES
        end = at + (high << 8) + low
        if end > length:
            return
        yield kind, flags, stream_id & _STREAM_MASK, at, end
        at = end


def content(data: bytes, flags: int, start: int, end: int) -> tuple[int, int]:
    """Return where the content of a frame begins and ends, without its padding."""
    if flags & PADDED and start < end:
        return start + 1, max(end - data[start], start + 1)
    return start, end


PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + pack_frame(SETTINGS, 0, 0, _setting.pack(_ENABLE_PUSH, 0) + _setting.pack(_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW))
    + pack_frame(WINDOW_UPDATE, 0, 0, (_LARGEST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big"))
)


def pack_headers(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return headers that no table needs to remember, so that every request may have the same bytes."""
    packed: bytes = Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in headers])
    return packed


class Stream:
    """An Exchange: one call, watched while its reply comes."""

    __slots__ = (
        *("_buffered", "_connection", "_data_head", "carried", "headers", "id", "is_ended", "keeps_connection"),
        *("outgoing", "problem", "received_bytes", "reset_code", "trailers"),
    )

    def __init__(self, connection: "Connection", stream_id: int) -> None:
        self.id = stream_id
        self.outgoing = b""
        self.keeps_connection = True
        self.carried = self._buffered = connection.buffered
        """The beginning of a frame, from before this call."""
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        """Also those of a reply that has nothing else."""
        self.is_ended = False
        """Whether the server said that this was all."""
        self.reset_code: int | None = None
        self.problem = ""
        """What the server did that HTTP/2 does not know, or why it left."""
        self.received_bytes = 0
        self._connection = connection
        self._data_head = struct.pack(">BBI", DATA, 0, stream_id)

    def feed(self, part: bytes) -> bool:
        """Take the next part; returns whether the reply is whole, or cannot become so."""
        if (
            part[3:9] == self._data_head
            and not self._buffered
            and (part[0] << 16) + (part[1] << 8) + part[2] + FRAME_HEAD_BYTES == len(part)
        ):
            self.received_bytes += len(part) - FRAME_HEAD_BYTES
            return False
        self._buffered = self._connection.receive(self._buffered + part, self)
        return self.is_ended or self.reset_code is not None or bool(self.problem)


class Connection:
    """What both sides have said so far on one connection."""

    def __init__(self) -> None:
        self.buffered = b""
        """The beginning of a frame, where no call is under way."""
        self.problem = ""
        """Why no further call may use the connection."""
        self._decoder = Decoder(max_header_list_size=LARGEST_HEADER_BLOCK_BYTES)
        self._last_id = -1
        self._unsent = b""
        self._window = self._first_stream_window = self._stream_window = _FIRST_WINDOW
        self._frame_bytes = LARGEST_FRAME_BYTES
        self._consumed_bytes = 0
        self._block: bytes | None = None
        """Of headers whose continuation is due."""
        self._block_flags = 0

    def open(self, packed_headers: bytes, body: bytes) -> list[bytes]:
        """Begin a call; returns what to send now. What the server has no room for goes out with `Stream.outgoing`."""
        self._last_id += 2
        self._stream_window = self._first_stream_window
        self._unsent = body
        head = pack_frame(HEADERS, END_HEADERS, self._last_id, packed_headers)
        return [head + self._send_data()]

    def stream(self) -> Stream:
        """Watch the call that was opened last."""
        return Stream(self, self._last_id)

    def between(self, part: bytes) -> bytes | None:
        """Take what came between two calls; returns what to send, None: the connection is of no use any more."""
        watcher = Stream(self, 0)
        watcher.feed(part)
        return None if self.problem or watcher.problem else watcher.outgoing

    def receive(self, data: bytes, stream: Stream) -> bytes:
        """Take whole frames; returns the beginning of the next one."""
        at = 0
        for kind, flags, stream_id, start, end in frames(data):
            if end - start > LARGEST_FRAME_BYTES:
                break
            if kind == DATA:
                stream.received_bytes += end - start
                if stream_id == stream.id and flags & END_STREAM:
                    stream.is_ended = True
            elif self._block is not None and kind != CONTINUATION:
                stream.problem = "HTTP/2: headers without their continuation"
            else:
                self._take(kind, flags, stream_id, data[start:end], stream)
            at = end
        rest = data[at:]
        if len(rest) >= FRAME_HEAD_BYTES and int.from_bytes(rest[:3], "big") > LARGEST_FRAME_BYTES:
            stream.problem = f"no HTTP/2: {rest[:60]!r}"
        self._settle(stream)
        self.buffered = rest
        return rest

    def _settle(self, stream: Stream) -> None:
        """Send what may be sent now, and say whether another call may follow."""
        self.problem = self.problem or stream.problem
        stream.keeps_connection = not self.problem
        if self._unsent and stream.id == self._last_id:
            if stream.is_ended or stream.reset_code is not None:  # the server has answered without it
                self._unsent = b""
                stream.outgoing += pack_frame(RST_STREAM, 0, stream.id, CANCEL.to_bytes(4, "big"))
            else:
                stream.outgoing += self._send_data()
        self._consumed_bytes += stream.received_bytes
        stream.received_bytes = 0
        if self._consumed_bytes > _WINDOW_SHARE:
            stream.outgoing += pack_frame(WINDOW_UPDATE, 0, 0, self._consumed_bytes.to_bytes(4, "big"))
            self._consumed_bytes = 0

    def _send_data(self) -> bytes:
        """Return frames with as much of the request as the server has room for."""
        room = max(min(self._window, self._stream_window, len(self._unsent)), 0)
        if not room and self._unsent:
            return b""
        sent, self._unsent = self._unsent[:room], self._unsent[room:]
        self._window -= room
        self._stream_window -= room
        packed = []
        for at in range(0, max(room, 1), self._frame_bytes):
            piece = sent[at : at + self._frame_bytes]
            is_last = not self._unsent and at + self._frame_bytes >= room
            packed.append(pack_frame(DATA, END_STREAM if is_last else 0, self._last_id, piece))
        return b"".join(packed)

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes, stream: Stream) -> None:
        if kind in (HEADERS, CONTINUATION):
            self._take_headers(kind, flags, stream_id, payload, stream)
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
            stream.outgoing += pack_frame(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            stream.outgoing += pack_frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload[:4], "big") & _STREAM_MASK
            if stream_id == 0:
                self._window += more
            elif stream_id == self._last_id:
                self._stream_window += more
        elif kind == RST_STREAM and stream_id == stream.id and not stream.is_ended:
            stream.reset_code = int.from_bytes(payload[:4], "big")
        elif kind == GOAWAY:
            self._take_goaway(payload, stream)
        elif kind == PUSH_PROMISE:
            stream.problem = "HTTP/2: the server pushes, which it was told not to"

    def _take_headers(self, kind: int, flags: int, stream_id: int, payload: bytes, stream: Stream) -> None:
        if kind == HEADERS:
            start, end = content(payload, flags, 0, len(payload))
            self._block, self._block_flags = payload[start + (5 if flags & PRIORITY else 0) : end], flags
        elif self._block is None:
            stream.problem = "HTTP/2: a continuation of nothing"
            return
        else:
            self._block += payload
        if len(self._block) > LARGEST_HEADER_BLOCK_BYTES:
            stream.problem = f"HTTP/2: headers of more than {LARGEST_HEADER_BLOCK_BYTES:,} bytes"
        if flags & END_HEADERS:
            block, self._block = self._block, None
            try:
                headers = [(str(name), str(value)) for name, value in self._decoder.decode(block)]
            except (HPACKError, IndexError) as error:
                stream.problem = f"HTTP/2: headers that cannot be unpacked: {error}"
                return
            if stream_id == stream.id:
                self._add_headers(stream, headers)

    def _add_headers(self, stream: Stream, headers: Headers) -> None:
        if stream.headers is None:
            if dict(headers).get(":status", "").startswith("1"):
                return
            stream.headers = headers
        if self._block_flags & END_STREAM:
            stream.trailers = headers
            stream.is_ended = True

    def _take_settings(self, payload: bytes) -> None:
        for name, value in _setting.iter_unpack(payload[: len(payload) // _setting.size * _setting.size]):
            if name == _INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._first_stream_window
                self._first_stream_window = value
            elif name == _MAX_FRAME_SIZE:
                self._frame_bytes = max(value, LARGEST_FRAME_BYTES)

    def _take_goaway(self, payload: bytes, stream: Stream) -> None:
        last_id, code = int.from_bytes(payload[:4], "big") & _STREAM_MASK, int.from_bytes(payload[4:8], "big")
        said = payload[8:].decode("utf-8", "replace")
        self.problem = f"the server leaves (HTTP/2 code {code}{': ' + said if said else ''})"
        if last_id < stream.id:
            stream.problem = self.problem
