"""One connection to a target: sends a request, collects the parts of the reply with the times at which they arrived.

Invariant: per part it costs a system call, a timestamp and a look for the end; nothing is parsed, no greenlet is woken
before the reply is whole or cannot become so. Times are CLOCK_REALTIME, the clock of the kernel's receive timestamps
(SO_TIMESTAMPNS, socket(7)).
"""

import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.hub import Waiter, get_hub

from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.sockets import ConnectError, Dialer, OpenSocket, TlsLayer, acknowledged_bytes
from llmpilot_loadtester.protocols.reply import Exchange, ProtocolAdapter

_NANOS = 1_000_000_000
_WRITE = 2
_ANCILLARY_BYTES = 64
_unpack_timespec = struct.Struct("qq").unpack
_buffer = bytearray(256 * 1024)
_buffers = (_buffer,)
_view = memoryview(_buffer)
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
        self._acknowledged_bytes: int | None = None
        """Of what went over the socket before the request; None: it is a new one."""
        self._is_stale = False
        """Whether the last request went over a connection that its server had closed before."""
        self._reply: RawReply | None = None
        self.last_reply: RawReply | None = None
        """What came of the last request, also where the greenlet that sent it was killed."""
        self._exchange: Exchange
        self._waiter: Waiter | None = None
        """Of the greenlet that waits for the reply."""
        self._all_kernel = True
        self._unsent = bytearray()
        """What the kernel did not take yet; `_writer` watches for when it does."""
        self._writer: Any = None

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

        A connection that the server closed between two requests is opened anew, and the request sent once more if the
        server's kernel took nothing of it. A server that got the request and closed has failed it.
        """
        reply = self._try(body, request_id)
        return self._try(body, request_id) if self._is_stale else reply

    def cancel(self) -> None:
        """End the request that is under way, if there is one; may be called from anywhere."""
        self._fail("cancelled", "cut off by the load tester")

    def close(self) -> None:
        """Close the socket; a request under way ends as cancelled."""
        self.cancel()
        self._close()

    def _try(self, body: bytes, request_id: str) -> RawReply:
        reply = self.last_reply = RawReply()
        self._is_stale = False
        is_new = self._socket is None
        try:
            opened = self._socket or self._open()
        except ConnectError as error:
            reply.send_nanos = reply.end_nanos = time.time_ns()
            reply.failure, reply.error = error.status, str(error)
            return reply
        self._acknowledged_bytes = None if is_new else acknowledged_bytes(opened.raw)
        pieces = self._adapter.write(body, request_id)
        self._exchange = reply.exchange = self._adapter.exchange()
        self._waiter = Waiter()
        self._all_kernel = True
        self._reply = reply
        timer = get_hub().loop.timer(self._target.request_timeout_seconds)
        timer.start(self._on_timeout)
        reply.send_nanos = time.time_ns()
        try:
            self._send((self._adapter.preface, *pieces) if is_new else pieces)
            if self._reply is not None:
                self._waiter.get()
        finally:
            timer.close()
            if self._reply is not None:  # the greenlet was killed
                self._fail("cancelled", "cut off by the load tester")
            self._waiter = None
        return reply

    def _open(self) -> OpenSocket:
        opened = self._socket = self._dialer.open()
        self._recvmsg_into = opened.raw.recvmsg_into
        self._reader.add(opened.raw.fileno(), self._on_tls_readable if opened.tls else self._on_readable)
        self._adapter.renew()
        return opened

    def _send(self, pieces: Sequence[bytes]) -> None:
        """Give the kernel what it takes at once; the rest follows, in this order, when it takes more. Never waits."""
        opened = self._socket
        if opened is None:
            return
        try:
            if opened.tls is not None:
                pieces = (_encrypted(opened.tls, b"".join(pieces)),)
            sent_bytes = 0 if self._unsent else opened.raw.sendmsg(pieces)
        except BlockingIOError:
            sent_bytes = 0
        except OSError as error:
            get_hub().loop.run_callback(self._on_unsendable, opened, error)
            return
        if sent_bytes == sum(map(len, pieces)):
            return
        self._unsent += b"".join(pieces)[sent_bytes:]
        if self._writer is None:
            self._writer = get_hub().loop.io(opened.raw.fileno(), _WRITE)
            self._writer.start(self._on_writable)

    def _on_writable(self) -> None:
        opened = self._socket
        assert opened is not None, "watched"  # noqa: S101
        try:
            del self._unsent[: opened.raw.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            self._on_unsendable(opened, error)
            return
        if not self._unsent:
            self._stop_writing()

    def _stop_writing(self) -> None:
        self._unsent.clear()
        if self._writer is not None:
            self._writer.stop()
            self._writer.close()
            self._writer = None

    def _on_unsendable(self, opened: OpenSocket, error: OSError) -> None:
        """The server may have answered before it closed (413): what it said is still to be read."""
        if self._socket is opened:
            self._read_what_is_left()
        if self._socket is opened:
            self._on_broken(error, "the server closed the connection while the request was sent")

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
            self._take(bytes(_view[:size]), seconds * _NANOS + nanos)
        else:
            self._all_kernel = False
            self._take(bytes(_view[:size]), time.time_ns())

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
                self._all_kernel = False
                stamp = time.time_ns()
            if not size:
                self._on_closed()
                return
            tls.incoming.write(_view[:size])
            while part := tls.session.read(len(_buffer)):
                self._take(part, stamp)
                if not self._has(tls):
                    return
            self._on_closed()  # TLS said goodbye
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            if tls.outgoing.pending and self._has(tls):  # what TLS itself has to answer
                self._send(())
        except OSError as error:
            self._on_broken(error)

    def _has(self, tls: TlsLayer) -> bool:
        return self._socket is not None and self._socket.tls is tls

    def _take(self, part: bytes, stamp: int) -> None:
        reply = self._reply
        if reply is None:
            self._take_between(part)
            return
        reply.parts.append(part)
        reply.stamps.append(stamp)
        exchange = self._exchange
        try:
            is_whole = exchange.feed(part)
        except Exception as error:  # noqa: BLE001 gevent stops a watcher that raises, which is that of all connections
            self._fail("malformed", f"the load tester cannot read the reply ({error!r}); please report it")
            return
        if exchange.outgoing:
            outgoing, exchange.outgoing = exchange.outgoing, b""
            self._send((outgoing,))
        if is_whole and self._reply is reply:
            reply.is_whole = True
            if not exchange.keeps_connection:
                self._close()
            self._end(reply.stamps[-1])

    def _take_between(self, part: bytes) -> None:
        try:
            answer = self._adapter.between(part)
        except Exception:  # noqa: BLE001 as in `_take`
            answer = None
        if answer is None:
            self._close()
        elif answer:
            self._send((answer,))

    def _on_closed(self) -> None:
        reply = self._reply
        if reply is not None:
            reply.is_closed = True
        if reply is not None and not reply.parts:
            self._fail("disconnected", "the server closed the connection before its reply")
            return
        self._close()
        if reply is not None:
            self._end(time.time_ns())

    def _on_broken(self, error: OSError, what: str = "the connection broke off") -> None:
        if self._reply is None:
            self._close()
        else:
            self._fail("disconnected", f"{what}: {error.strerror or error}")

    def _on_timeout(self) -> None:
        self._fail("timeout", f"no whole reply within {self._target.request_timeout_seconds:g} s")

    def _fail(self, failure: str, error: str) -> None:
        reply = self._reply
        if reply is None:
            return
        reply.failure, reply.error = failure, error
        if failure == "disconnected" and not reply.parts and self._socket is not None:
            self._is_stale = self._acknowledged_bytes == acknowledged_bytes(self._socket.raw)
        self._close()
        self._end(time.time_ns())

    def _end(self, end_nanos: int) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None, "under way"  # noqa: S101
        reply.end_nanos = max(end_nanos, reply.send_nanos)
        reply.stamp_source = "kernel" if reply.parts and self._all_kernel else "user_space"
        if self._waiter is None:
            return
        hub = get_hub()
        if gevent.getcurrent() is hub:
            self._waiter.switch(None)
        else:
            hub.loop.run_callback(self._waiter.switch, None)

    def _close(self) -> None:
        opened, self._socket = self._socket, None
        if opened is not None:
            self._stop_writing()
            self._reader.remove(opened.raw.fileno())
            opened.raw.close()


def _encrypted(tls: TlsLayer, data: bytes) -> bytes:
    if data:
        tls.session.write(data)
    return tls.outgoing.read()
