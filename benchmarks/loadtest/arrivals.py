"""When requests reached the golden server's socket, by the kernel's clock.

The server's own stamp of a request's arrival is that of its event loop, 0.1 to 0.3 ms later, which would count as an
error of every client. A packet socket sees the request itself. It needs root; without it `Tap.open` returns None.
Invariant: a time is that of the last packet of a request, which is when the server could have known all of it.
"""

import ctypes
import socket
import struct
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_SO_TIMESTAMPNS = 35
_SO_ATTACH_FILTER = 26
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23
_IPV4 = 0x0800
_STAMP = struct.Struct("qq")
_BUFFER_BYTES = 32 << 20
_DRAIN_SECONDS = 0.1
_NEW_REQUEST_NANOS = 20_000_000
"""Packets of one connection that are closer are of one request: no reply is as short."""
_ID_HEADER = b"x-request-id:"


def _payload_to(port: int) -> bytes:
    """Return the classic BPF program for TCP packets to a port that carry bytes; offsets are from the IPv4 header."""
    program = (
        (0x30, 0, 0, 9),  # A = protocol
        (0x15, 0, 11, 6),  # TCP, else drop
        (0xB1, 0, 0, 0),  # X = bytes of the IP header
        (0x48, 0, 0, 2),  # A = destination port
        (0x15, 0, 8, port),
        (0x50, 0, 0, 12),  # A = data offset
        (0x54, 0, 0, 0xF0),
        (0x74, 0, 0, 2),  # in bytes
        (0x0C, 0, 0, 0),  # A += X: all headers
        (0x07, 0, 0, 0),  # X = A
        (0x28, 0, 0, 2),  # A = total length
        (0x1D, 1, 0, 0),  # equal: no payload
        (0x06, 0, 0, 0xFFFF),  # take
        (0x06, 0, 0, 0),  # drop
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


@dataclass(slots=True)
class _Request:
    last_nanos: int
    head: bytes


@dataclass(slots=True)
class Tap:
    """Packets to the server, collected by a thread that reads ten times a second."""

    connection: socket.socket
    requests: list[_Request] = field(default_factory=list)
    by_port: dict[int, _Request] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(cls, port: int) -> "Tap | None":
        """Begin to listen; None without the permission."""
        try:
            connection = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        except PermissionError:
            return None
        program = _payload_to(port)
        held = ctypes.create_string_buffer(program, len(program))
        filter_of = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
        connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_of)
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        connection.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        connection.bind(("lo", _IPV4))
        connection.setblocking(False)
        tap = cls(connection)
        threading.Thread(target=tap._run, daemon=True).start()
        return tap

    def close(self) -> None:
        """Stop and keep what was seen."""
        self.is_over.set()

    def _run(self) -> None:
        while not self.is_over.wait(_DRAIN_SECONDS):
            self._drain()
        self._drain()
        self.connection.close()

    def _drain(self) -> None:
        while True:
            try:
                packet, ancillary, _, _ = self.connection.recvmsg(65536, 64)
            except BlockingIOError:
                return
            seconds, nanos = _STAMP.unpack(ancillary[0][2])
            stamp = seconds * 1_000_000_000 + nanos
            start = (packet[0] & 0xF) * 4
            source_port = struct.unpack_from(">H", packet, start)[0]
            before = self.by_port.get(source_port)
            if before is not None and stamp - before.last_nanos < _NEW_REQUEST_NANOS:
                before.last_nanos = stamp
                continue
            request = _Request(stamp, packet[start + (packet[start + 12] >> 4) * 4 :][:2048])
            self.by_port[source_port] = request
            self.requests.append(request)

    def arrival_nanos(
        self, request_ids: tuple[str, ...], taken_in_nanos: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return when each request arrived; by its id, or the last unclaimed one before the server took it in."""
        by_id = {_request_id(request.head): request.last_nanos for request in self.requests}
        stamps = np.sort(np.array([request.last_nanos for request in self.requests], dtype=np.int64))
        arrivals = np.array([by_id.get(name, -1) for name in request_ids], dtype=np.int64)
        for row in np.flatnonzero(arrivals < 0)[::-1]:
            at = int(np.searchsorted(stamps, taken_in_nanos[row], side="right")) - 1
            arrivals[row] = stamps[at] if at >= 0 else taken_in_nanos[row]
            stamps = np.delete(stamps, at) if at >= 0 else stamps
        return arrivals


def _request_id(head: bytes) -> str:
    at = head.lower().find(_ID_HEADER)
    if at < 0:
        return ""
    return head[at + len(_ID_HEADER) :].split(b"\r\n", 1)[0].strip().decode("latin-1")
