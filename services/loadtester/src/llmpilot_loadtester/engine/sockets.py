"""Opens sockets to a target, with or without TLS, and says in a sentence why one cannot be opened.

Invariant: an open socket is non-blocking and asks the kernel for the time of every packet.
"""

import _socket
import contextlib
import errno
import ssl
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

import gevent
from gevent import socket

from llmpilot_loadtester.domain.spec import Target

SO_TIMESTAMPNS = getattr(socket, "SO_TIMESTAMPNS", 35)
"""Linux' number on all but a few architectures; Python has no name for it. Source: asm-generic/socket.h."""

_ACKED_AT, _TCP_INFO_BYTES = 120, 128
"""tcpi_bytes_acked of struct tcp_info, and where it ends. Source: linux/tcp.h."""
_acked = struct.Struct("Q")
_PORTS = {"http": 80, "https": 443, "grpc": 80, "grpcs": 443}
_SECURE = ("https", "grpcs")


class ConnectError(Exception):
    """No connection. `status` is of record_schema, the message says what to do."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsLayer:
    """TLS between a socket and what is sent over it."""

    session: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSocket:
    """A connected socket."""

    raw: _socket.socket
    """Python's own, as gevent's would block greenlets."""
    tls: TlsLayer | None


class Dialer:
    """Opens sockets to one target."""

    def __init__(self, target: Target) -> None:
        parts = urlsplit(target.url)
        self._target = target
        self._host = parts.hostname or ""
        self._port = parts.port or _PORTS[parts.scheme]
        self._context = _tls_context(target) if parts.scheme in _SECURE else None

    def open(self) -> OpenSocket:
        """Return a new connected socket; blocks the greenlet at most the connect timeout. Raises ConnectError."""
        limit = self._target.connect_timeout_seconds
        try:
            with gevent.Timeout(limit, TimeoutError("timed out")):
                return self._open()
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error

    def _open(self) -> OpenSocket:
        connected = socket.create_connection((self._host, self._port))
        raw = _socket.socket(fileno=connected.detach())
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask_for_stamps(raw)
            tls = self._shake_hands(raw) if self._context else None
        except BaseException:
            raw.close()
            raise
        return OpenSocket(raw=raw, tls=tls)

    def _shake_hands(self, raw: _socket.socket) -> TlsLayer:
        assert self._context is not None, "asked for"  # noqa: S101
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = self._context.wrap_bio(incoming, outgoing, server_hostname=self._host)
        while True:
            try:
                session.do_handshake()
            except ssl.SSLWantReadError:
                _send_all(raw, outgoing.read())
                data = _receive(raw)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "closed during the TLS handshake") from None
                incoming.write(data)
            else:
                _send_all(raw, outgoing.read())
                return TlsLayer(session=session, incoming=incoming, outgoing=outgoing)

    def _refusal(self, error: Exception) -> ConnectError:
        where = f"{self._host}:{self._port}"
        if isinstance(error, socket.gaierror):
            return ConnectError("disconnected", f"cannot find the host {self._host} ({error.strerror}): check the URL")
        if isinstance(error, ssl.SSLCertVerificationError):
            return ConnectError(
                "disconnected",
                f"{where} shows a certificate that is not trusted ({error.verify_message}): "
                "name its authority with --ca-certificates, or accept any with --insecure",
            )
        if isinstance(error, ssl.SSLError):
            return ConnectError(
                "disconnected", f"no TLS with {where} ({error.reason or error}): is it an http:// address?"
            )
        if isinstance(error, TimeoutError):
            limit = self._target.connect_timeout_seconds
            return ConnectError("timeout", f"{where} does not answer within {limit:g} s: check address and firewall")
        if isinstance(error, ConnectionRefusedError):
            return ConnectError("disconnected", f"{where} refuses connections: does the server run there?")
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ConnectError("disconnected", f"no connection to {where}: {reason}")


def ask_for_stamps(raw: _socket.socket) -> None:
    """Ask the kernel for the time of every packet; one that has none leaves it to who reads."""
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def keep_stamping() -> _socket.socket:
    """Return a socket for as long as the kernel shall stamp; it needs a moment to begin when the first one asks."""
    raw = _socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ask_for_stamps(raw)
    return raw


def acknowledged_bytes(raw: _socket.socket) -> int:
    """Return how much the peer's kernel has taken of what was sent; -1 where ours does not say."""
    try:
        told = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except (OSError, AttributeError):
        return -1
    return int(_acked.unpack_from(told, _ACKED_AT)[0]) if len(told) >= _TCP_INFO_BYTES else -1


def _send_all(raw: _socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[raw.send(view) :]
        except BlockingIOError:
            socket.wait_write(raw.fileno())


def _receive(raw: _socket.socket) -> bytes:
    while True:
        try:
            return raw.recv(65536)
        except BlockingIOError:
            socket.wait_read(raw.fileno())


def _tls_context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=target.ca_certificates_pem or None)
    if target.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if urlsplit(target.url).scheme == "grpcs":
        context.set_alpn_protocols(["h2"])
    return context
