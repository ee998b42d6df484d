"""One connection to a target: sends a request, collects the parts of the reply with the times at which they arrived.

Invariant: per part it costs a system call, a timestamp and a look for the end; nothing is parsed, no greenlet is woken
before the reply is whole or cannot become so. Times are CLOCK_REALTIME, the clock of the kernel's receive timestamps
(SO_TIMESTAMPNS, socket(7)).
"""

import _socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import gevent
from gevent import socket
from gevent.hub import Waiter, get_hub

from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.sockets import ConnectError, Dialer, OpenSocket, TlsLayer, send_all
from llmpilot_loadtester.protocols.reply import Exchange, ProtocolAdapter

_NANOS = 1_000_000_000
_WRITE = 2
_ANCILLARY_BYTES = 64
_unpack_timespec = struct.Struct("qq").unpack
_buffer = bytearray(256 * 1024)
_buffers = (_buffer,)
_MOST_LEFT_READS = 1000


@dataclass(slots=True, kw_only=True)
class RawReply:
    """What came of one request, not yet parsed. Grows while the reply arrives."""

    send_nanos: int = 0
    """Just before the request went to the kernel; if it never did, when that failed."""
    end_nanos: int = 0
    """Arrival of the last part, or when the request failed."""
    parts: list[bytes] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    """By part: when it arrived."""
    stamp_source: str = "user_space"
    """Of record_schema.STAMP_SOURCES: kernel only if every part has the kernel's time."""
    is_whole: bool = False
    is_closed: bool = False
    """Whether the server closed the connection."""
    failure: str = ""
    """Of record_schema.STATUSES, where the network or the client ended it; the parts before it stay."""
    error: str = ""
    """Why, in a sentence."""
    exchange: Exchange | None = None
    """Who watched it; None: it was never sent."""


class Connection:
    """Carries one request at a time; opens its socket when needed, and again when the server closed it between two."""

    def __init__(self, target: Target, adapter: ProtocolAdapter, reader: Reader) -> None:
        self._target = target
        self._adapter = adapter
        self._reader = reader
        self._dialer = Dialer(target)
        self._socket: OpenSocket | None = None
        self._recvmsg_into: Callable[..., tuple[int, list[tuple[int, int, bytes]], int, object]]
        self._is_reused = False
        self._reply: RawReply | None = None
        self.last_reply: RawReply | None = None
        """What came of the last request, also where the greenlet that sent it was killed."""
        self._exchange: Exchange
        self._waiter: Waiter | None = None
        """Of the greenlet that waits for the reply."""
        self._sender: Waiter | None = None
        """Of the same greenlet while the kernel does not take more of its request."""
        self._all_kernel = True
        self._unsent = bytearray()

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return self._reply is not None

    @property
    def is_open(self) -> bool:
        """Whether there is a socket."""
        return self._socket is not None

    def request(self, body: bytes, request_id: str) -> RawReply:
        """Send a request and return its reply when it has ended, however it did. Blocks the greenlet.

        A connection that the server closed between two requests is opened anew, and the request sent once more if not
        a byte of its reply had come.
        """
        reply = self._try(body, request_id)
        if self._is_reused and reply.failure == "disconnected" and not reply.parts:
            self._is_reused = False
            reply = self._try(body, request_id)
        self._is_reused = self._socket is not None
        return reply

    def cancel(self) -> None:
        """End the request that is under way, if there is one; may be called from anywhere."""
        self._fail("cancelled", "cut off by the load tester")

    def close(self) -> None:
        """Close the socket; a request under way ends as cancelled."""
        self.cancel()
        self._close()

    def _try(self, body: bytes, request_id: str) -> RawReply:
        reply = self.last_reply = RawReply()
        try:
            self._ensure_open()
        except ConnectError as error:
            reply.send_nanos = reply.end_nanos = time.time_ns()
            reply.failure, reply.error = error.status, str(error)
            return reply
        pieces = self._adapter.write(body, request_id)
        self._exchange = reply.exchange = self._adapter.exchange()
        self._waiter = Waiter()
        self._all_kernel = True
        self._reply = reply
        self._reader.stream_count += 1
        timer = get_hub().loop.timer(self._target.request_timeout_seconds)
        timer.start(self._on_timeout)
        reply.send_nanos = time.time_ns()
        try:
            self._send(pieces)
            if self._reply is not None:
                self._waiter.get()
        finally:
            timer.close()
            if self._reply is not None:  # the greenlet was killed
                self._fail("cancelled", "cut off by the load tester")
            self._waiter = None
        return reply

    def _ensure_open(self) -> None:
        if self._socket is not None:
            return
        opened = self._dialer.open()
        self._socket = opened
        self._is_reused = False
        self._unsent.clear()
        self._recvmsg_into = opened.raw.recvmsg_into
        self._reader.add(opened.raw.fileno(), self._on_tls_readable if opened.tls else self._on_readable)
        self._adapter.renew()
        if self._adapter.preface:
            try:
                send_all(opened.raw, _encrypted(opened, self._adapter.preface))
            except OSError as error:
                self._close()
                raise ConnectError("disconnected", f"the server closed the new connection: {error}") from error

    def _send(self, pieces: Sequence[bytes]) -> None:
        """Send the request, until it is out or has ended otherwise."""
        opened = self._socket
        if opened is None:
            return
        try:
            if opened.tls is None:
                sent_bytes = self._send_at_once(opened.raw, pieces)
                if sent_bytes < sum(map(len, pieces)):
                    self._send_bit_by_bit(opened.raw, b"".join(pieces)[sent_bytes:])
            else:
                self._send_bit_by_bit(opened.raw, _encrypted(opened, b"".join(pieces)))
        except OSError as error:
            # The server may have answered before it closed (413): what it said is still to be read.
            self._read_what_is_left()
            self._fail("disconnected", f"the server closed the connection while the request was sent: {error}")

    def _send_at_once(self, raw: _socket.socket, pieces: Sequence[bytes]) -> int:
        try:
            return raw.sendmsg(pieces)
        except BlockingIOError:
            return 0

    def _send_bit_by_bit(self, raw: _socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view and self._reply is not None:
            try:
                view = view[raw.send(view) :]
            except BlockingIOError:
                self._wait_writable(raw)

    def _wait_writable(self, raw: _socket.socket) -> None:
        """Wait until the kernel takes more, or the request has ended."""
        watcher = get_hub().loop.io(raw.fileno(), _WRITE)
        self._sender = Waiter()
        watcher.start(self._sender.switch, None)
        try:
            self._sender.get()
        finally:
            watcher.stop()
            watcher.close()
            self._sender = None

    def _read_what_is_left(self) -> None:
        for _ in range(_MOST_LEFT_READS):
            reply, opened = self._reply, self._socket
            if reply is None or opened is None:
                return
            before = len(reply.parts)
            (self._on_tls_readable if opened.tls else self._on_readable)()
            if len(reply.parts) == before:
                return

    def _on_readable(self) -> None:
        try:
            size, ancillary, _, _ = self._recvmsg_into(_buffers, _ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._on_broken(error)
            return
        if not size:
            self._on_closed()
            return
        if ancillary:
            seconds, nanos = _unpack_timespec(ancillary[0][2])
            self._take(bytes(_buffer[:size]), seconds * _NANOS + nanos, is_kernel=True)
        else:
            self._take(bytes(_buffer[:size]), time.time_ns(), is_kernel=False)

    def _on_tls_readable(self) -> None:
        assert self._socket is not None, "watched"  # noqa: S101
        assert self._socket.tls is not None, "of TLS"  # noqa: S101
        tls = self._socket.tls
        try:
            size, ancillary, _, _ = self._recvmsg_into(_buffers, _ANCILLARY_BYTES)
            if ancillary:
                seconds, nanos = _unpack_timespec(ancillary[0][2])
                stamp = seconds * _NANOS + nanos
            else:
                stamp = time.time_ns()
            if not size:
                self._on_closed()
                return
            tls.incoming.write(memoryview(_buffer)[:size])
            while part := tls.session.read(len(_buffer)):
                self._take(part, stamp, is_kernel=bool(ancillary))
                if not self._has(tls):
                    return
            self._on_closed()  # TLS said goodbye
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._on_broken(error)

    def _has(self, tls: TlsLayer) -> bool:
        return self._socket is not None and self._socket.tls is tls

    def _take(self, part: bytes, stamp: int, *, is_kernel: bool) -> None:
        reply = self._reply
        if reply is None:
            self._take_between(part)
            return
        reader = self._reader
        reader.read_count += 1
        if is_kernel:
            reader.kernel_stamp_count += 1
        else:
            self._all_kernel = False
        reply.parts.append(part)
        reply.stamps.append(stamp)
        exchange = self._exchange
        is_whole = exchange.feed(part)
        if exchange.outgoing:
            outgoing, exchange.outgoing = exchange.outgoing, b""
            self._send_now(outgoing)
        if is_whole and self._reply is reply:
            reply.is_whole = True
            if not exchange.keeps_connection:
                self._close()
            self._end(reply.stamps[-1])

    def _take_between(self, part: bytes) -> None:
        answer = self._adapter.between(part)
        if answer is None:
            self._close()
        elif answer:
            self._send_now(answer)

    def _send_now(self, data: bytes) -> None:
        """Send from the hub, where nothing may wait: what the kernel does not take at once goes with a greenlet."""
        opened = self._socket
        if opened is None:
            return
        data = _encrypted(opened, data)
        if self._unsent:
            self._unsent += data
            return
        try:
            sent_bytes = opened.raw.send(data)
        except BlockingIOError:
            sent_bytes = 0
        except OSError as error:
            self._on_broken(error)
            return
        if sent_bytes < len(data):
            self._unsent += data[sent_bytes:]
            gevent.spawn(self._send_unsent, opened)

    def _send_unsent(self, opened: OpenSocket) -> None:
        while self._unsent and self._socket is opened:
            try:
                del self._unsent[: opened.raw.send(self._unsent)]
            except BlockingIOError:
                socket.wait_write(opened.raw.fileno())
            except OSError:
                return  # the reader hears of it

    def _on_closed(self) -> None:
        self._close()
        if self._reply is None:
            return
        self._reply.is_closed = True
        if self._reply.parts:
            self._end(time.time_ns())
        else:
            self._fail("disconnected", "the server closed the connection before its reply")

    def _on_broken(self, error: OSError) -> None:
        self._fail("disconnected", f"the connection broke off: {error.strerror or error}")
        self._close()

    def _on_timeout(self) -> None:
        self._fail("timeout", f"no whole reply within {self._target.request_timeout_seconds:g} s")

    def _fail(self, failure: str, error: str) -> None:
        if self._reply is None:
            return
        self._reply.failure, self._reply.error = failure, error
        self._close()
        self._end(time.time_ns())

    def _end(self, end_nanos: int) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None, "under way"  # noqa: S101
        self._reader.stream_count -= 1
        reply.end_nanos = max(end_nanos, reply.send_nanos)
        reply.stamp_source = "kernel" if reply.parts and self._all_kernel else "user_space"
        hub = get_hub()
        for waiter in (self._sender, self._waiter):
            if waiter is None:
                continue
            if gevent.getcurrent() is hub:
                waiter.switch(None)
            else:
                hub.loop.run_callback(waiter.switch, None)

    def _close(self) -> None:
        opened, self._socket = self._socket, None
        if opened is not None:
            self._reader.remove(opened.raw.fileno())
            opened.raw.close()


def _encrypted(opened: OpenSocket, data: bytes) -> bytes:
    if opened.tls is None:
        return data
    opened.tls.session.write(data)
    return opened.tls.outgoing.read()
