"""Real sockets on both sides: the connection under test in gevent's hub, servers in threads of their own."""

import _socket
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
import trustme

from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.engine import reader as reader_module
from llmpilot_loadtester.engine.connection import Connection
from llmpilot_loadtester.engine.pacer import Pacer
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.sockets import Dialer, OpenSocket, ask_for_stamps
from llmpilot_loadtester.protocols.adapters import adapter_for
from llmpilot_loadtester.protocols.http1 import HttpAdapter
from llmpilot_loadtester.protocols.http2 import ACK, DATA, PING, frames, pack_frame
from llmpilot_loadtester.protocols.reply import Exchange, Reply
from llmpilot_loadtester.wire_tgis import decode_generation_response

LIMIT_SECONDS = 10.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MAGIC_BYTES = 24
"""What a connection of HTTP/2 begins with."""
END = b"0\r\n\r\n"

Talk = Callable[[socket.socket], None]


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


def read_request(peer: socket.socket) -> bytes:
    """Reads one request whole; b"" when the client has closed."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = peer.recv(65536)
        if not data:
            return b""
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
    while len(body) < length:
        body += peer.recv(1 << 20)
    return body


@contextmanager
def serving(*talks: Talk, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Gives the port of a server that talks to its first client as the first function says, and so on."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LIMIT_SECONDS)

    def serve() -> None:
        for talk in talks:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            peer.settimeout(LIMIT_SECONDS)
            try:
                with context.wrap_socket(peer, server_side=True) if context else peer as wrapped:
                    talk(wrapped)
            except OSError:
                pass  # the client went away, which some facts here are about

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT_SECONDS)
        listener.close()


@pytest.fixture(scope="module")
def stamping() -> Iterator[None]:
    """The kernel stamps what arrives, which it begins to do a moment after it was asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as own:
        ask_for_stamps(own)
        own.connect(listener.getsockname())
        own.settimeout(LIMIT_SECONDS)
        peer, _ = listener.accept()
        with peer:
            deadline = time.monotonic() + LIMIT_SECONDS
            ancillary: list[tuple[int, int, bytes]] = []
            while not ancillary:
                assert time.monotonic() < deadline, "this kernel stamps nothing"
                peer.send(b"x")
                _, ancillary, _, _ = own.recvmsg(1, 64)
            yield


@pytest.fixture
def reader(stamping: None) -> Iterator[Reader]:  # noqa: ARG001 it goes on while the socket is open
    """What watches the sockets."""
    made = Reader()
    yield made
    made.close()


@contextmanager
def connection_to(url: str, reader: Reader, **fields: object) -> Iterator[Connection]:
    target = Target(url=url, served_model="m", **fields)  # type: ignore[arg-type]
    made = Connection(target, adapter_for(target, count_tokens=None), reader)
    yield made
    made.close()


def stream(*texts: bytes) -> Talk:
    def talk(peer: socket.socket) -> None:
        if read_request(peer):
            peer.sendall(HEAD)
            for text in texts:
                peer.sendall(chunk(text))
            peer.sendall(END)

    return talk


def test_every_part_has_the_time_at_which_the_kernel_got_it(reader: Reader) -> None:
    with serving(stream(b"data: a\n\n")) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        reply = connection.request(b"{}", "r1")
    assert reply.is_whole
    assert reply.stamp_source == "kernel"
    assert b"data: a" in b"".join(reply.parts)
    assert reply.send_nanos <= reply.stamps[0] <= reply.stamps[-1] == reply.end_nanos <= time.time_ns()


def test_the_time_is_that_of_arrival_though_the_client_was_busy(reader: Reader) -> None:
    """The hub is blocked while the reply arrives; a stamp taken when it is read would be 100 ms late."""
    sent_nanos: list[int] = []
    blocked = threading.Event()

    def talk(peer: socket.socket) -> None:
        read_request(peer)
        blocked.wait(LIMIT_SECONDS)
        sent_nanos.append(time.time_ns())
        peer.sendall(HEAD + chunk(b"data: a\n\n") + END)

    def block(connection: Connection) -> None:
        while not connection.is_busy:
            gevent.sleep(0.001)
        blocked.set()
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline or not sent_nanos:
            pass  # as a client that is busy with something else

    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        blocker = gevent.spawn(block, connection)
        reply = connection.request(b"{}", "r1")
        blocker.join()
    assert reply.stamp_source == "kernel"
    assert reply.stamps[0] - sent_nanos[0] < 50_000_000


def test_a_connection_is_used_again(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        while read_request(peer):
            peer.sendall(HEAD + chunk(b"data: a\n\n") + END)

    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        assert all(connection.request(b"{}", f"r{number}").is_whole for number in range(5))


def test_a_connection_that_was_closed_between_two_requests_is_opened_again(reader: Reader) -> None:
    with (
        serving(stream(b"data: a\n\n"), stream(b"data: b\n\n")) as port,
        connection_to(f"http://127.0.0.1:{port}", reader) as connection,
    ):
        first = connection.request(b"{}", "r1")
        second = connection.request(b"{}", "r2")
    assert first.is_whole
    assert b"data: b" in b"".join(second.parts)
    assert not second.failure


def test_a_server_that_took_the_request_and_closed_has_failed_it(reader: Reader) -> None:
    """On a connection that was used before, too: sent again in silence, it would count as late, not as failed."""
    taken = []

    def talk(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(HEAD + chunk(b"data: a\n\n") + END)
        taken.append(read_request(peer))

    with (
        serving(talk, stream(b"data: b\n\n")) as port,
        connection_to(f"http://127.0.0.1:{port}", reader) as connection,
    ):
        assert connection.request(b"{}", "r1").is_whole
        failed = connection.request(b"{}", "r2")
        assert connection.request(b"{}", "r3").is_whole
    assert (failed.failure, failed.error) == ("disconnected", "the server closed the connection before its reply")
    assert taken == [b"{}"]


def test_a_server_that_says_close_gets_a_new_connection(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunk(b"data: a\n\n") + END)

    with serving(talk, talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        assert connection.request(b"{}", "r1").is_whole
        assert connection.request(b"{}", "r2").is_whole


def test_what_came_before_a_reset_is_kept(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(HEAD + chunk(b"data: a\n\n"))
        received.wait(LIMIT_SECONDS)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    received = threading.Event()
    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        waiting = gevent.spawn(connection.request, b"{}", "r1")
        while not reader.read_count:
            gevent.sleep(0.001)
        received.set()
        reply = waiting.get(timeout=LIMIT_SECONDS)
    assert reply.failure == "disconnected"
    assert "broke off" in reply.error
    assert b"data: a" in b"".join(reply.parts)


def test_a_server_that_closes_before_its_reply_is_disconnected(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        read_request(peer)

    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        reply = connection.request(b"{}", "r1")
    assert (reply.failure, reply.is_closed, reply.parts) == ("disconnected", True, [])


def test_a_reply_that_never_ends_times_out(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(HEAD + chunk(b"data: a\n\n"))
        peer.recv(1)

    with (
        serving(talk) as port,
        connection_to(f"http://127.0.0.1:{port}", reader, request_timeout_seconds=0.1) as connection,
    ):
        reply = connection.request(b"{}", "r1")
    assert (reply.failure, reply.error) == ("timeout", "no whole reply within 0.1 s")
    assert len(reply.parts) >= 1


def test_a_request_larger_than_every_buffer_is_sent_whole(reader: Reader) -> None:
    lengths = []

    def talk(peer: socket.socket) -> None:
        lengths.append(len(read_request(peer)))
        peer.sendall(HEAD + chunk(b"data: a\n\n") + END)

    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        assert connection.request(b"x" * 20_000_000, "r1").is_whole
    assert lengths == [20_000_000]


def test_an_answer_that_comes_before_the_request_was_taken_is_read(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(1 << 20):
            pass

    with serving(talk) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        reply = connection.request(b"x" * 20_000_000, "r1")
    assert reply.is_whole
    assert b"413" in reply.parts[0]


class SlowSocket(_socket.socket):
    """Takes a little of a request, and the rest only when something was read."""

    has_read = False

    def sendmsg(self, pieces: Sequence[bytes]) -> int:  # type: ignore[override]
        """Take a little."""
        return self.send(b"".join(pieces)) if self.has_read else super().send(pieces[0][:40])

    def send(self, data: bytes) -> int:  # type: ignore[override]
        """Take all or nothing."""
        if not self.has_read:
            raise BlockingIOError
        return super().send(data)

    def recvmsg_into(self, *arguments: Any) -> Any:
        """Read, which makes room."""
        self.has_read = True
        return super().recvmsg_into(*arguments)


def test_what_http2_must_answer_does_not_go_into_the_middle_of_a_request(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes a part of the request, then the server wants to be answered."""
    body = bytes(range(256)) * 200
    received = bytearray()

    def whole_frames() -> list[tuple[int, int, bytes]]:
        data = bytes(received[MAGIC_BYTES:])
        return [(kind, flags, data[start:end]) for kind, flags, _, start, end in frames(data)]

    def talk(peer: socket.socket) -> None:
        received.extend(peer.recv(MAGIC_BYTES))
        peer.sendall(pack_frame(PING, 0, 0, b"12345678"))
        while not any(kind == PING for kind, _, _ in whole_frames()):
            received.extend(peer.recv(4096))

    def open_slowly(dialer: Dialer) -> OpenSocket:
        return OpenSocket(raw=SlowSocket(fileno=original(dialer).raw.detach()), tls=None)

    original = Dialer.open
    monkeypatch.setattr(Dialer, "open", open_slowly)
    with serving(talk) as port:
        target = Target(url=f"grpc://127.0.0.1:{port}", protocol=Protocol.TGIS)
        adapter = adapter_for(target, count_tokens=None, decode_tgis=decode_generation_response)
        reply = Connection(target, adapter, reader).request(body, "r1")
    assert reply.is_closed
    sent = b"".join(content for kind, _, content in whole_frames() if kind == DATA)
    assert sent[5:] == body  # after the length of the message
    assert whole_frames()[-1] == (PING, ACK, b"12345678")


class MistakenAdapter(HttpAdapter):
    """An adapter with a mistake."""

    def exchange(self) -> Exchange:
        """Raise when the reply comes."""
        return MistakenExchange()

    def between(self, part: bytes) -> bytes | None:
        """Raise."""
        raise KeyError(part)


class MistakenExchange:
    """What it watches with."""

    outgoing = b""
    keeps_connection = True

    def feed(self, part: bytes) -> bool:
        """Raise."""
        raise KeyError(part)


def test_a_mistake_of_an_adapter_costs_its_own_request_only(reader: Reader) -> None:
    with serving(stream(b"data: a\n\n"), stream(b"data: b\n\n")) as port:
        target = Target(url=f"http://127.0.0.1:{port}")
        mistaken = Connection(target, MistakenAdapter(target, "/", lambda _: Reply()), reader)
        reply = mistaken.request(b"{}", "r1")
        assert (reply.failure, "please report it" in reply.error) == ("malformed", True)
        with connection_to(target.url, reader) as connection:
            assert connection.request(b"{}", "r2").is_whole


def test_whoever_raises_when_it_should_read_does_not_make_the_others_deaf(reader: Reader) -> None:
    def mistaken() -> None:
        reader.remove(own.fileno())
        raise KeyError("a mistake")

    own, peer = socket.socketpair()
    with own, peer:
        reader.add(own.fileno(), mistaken)
        peer.send(b"x")
        with serving(stream(b"data: a\n\n")) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
            gevent.sleep(0.01)
            assert connection.request(b"{}", "r1").is_whole


def test_a_line_of_ten_megabytes_is_received(reader: Reader) -> None:
    with (
        serving(stream(b"data: " + b"y" * 10_000_000 + b"\n\n")) as port,
        connection_to(f"http://127.0.0.1:{port}", reader) as connection,
    ):
        reply = connection.request(b"{}", "r1")
    assert reply.is_whole
    assert sum(map(len, reply.parts)) > 10_000_000


def test_a_request_can_be_cancelled_and_the_connection_used_again(reader: Reader) -> None:
    def stall(peer: socket.socket) -> None:
        read_request(peer)
        peer.recv(1)

    with (
        serving(stall, stream(b"data: b\n\n")) as port,
        connection_to(f"http://127.0.0.1:{port}", reader) as connection,
    ):
        waiting = gevent.spawn(connection.request, b"{}", "r1")
        while not connection.is_busy:
            gevent.sleep(0.001)
        connection.cancel()
        assert waiting.get(timeout=LIMIT_SECONDS).failure == "cancelled"
        assert connection.request(b"{}", "r2").is_whole


def test_a_killed_greenlet_leaves_nothing_under_way(reader: Reader) -> None:
    def stall(peer: socket.socket) -> None:
        read_request(peer)
        peer.recv(1)

    with serving(stall) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        waiting = gevent.spawn(connection.request, b"{}", "r1")
        while not connection.is_busy:
            gevent.sleep(0.001)
        waiting.kill()
        assert not connection.is_busy


def test_nobody_listening_is_told(reader: Reader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        reply = connection.request(b"{}", "r1")
    assert reply.failure == "disconnected"
    assert reply.error == f"127.0.0.1:{port} refuses connections: does the server run there?"
    assert reply.send_nanos == reply.end_nanos


def test_an_unknown_host_is_told(reader: Reader) -> None:
    with connection_to("http://no-such-host.invalid", reader) as connection:
        reply = connection.request(b"{}", "r1")
    assert reply.failure == "disconnected"
    assert reply.error.startswith("cannot find the host no-such-host.invalid")


def test_tls_replies_have_the_kernels_times(reader: Reader) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with (
        serving(stream(b"data: a\n\n"), context=context) as port,
        connection_to(
            f"https://localhost:{port}", reader, ca_certificates_pem=authority.cert_pem.bytes().decode()
        ) as connection,
    ):
        reply = connection.request(b"{}", "r1")
    assert reply.is_whole
    assert reply.stamp_source == "kernel"
    assert b"data: a" in b"".join(reply.parts)


def test_a_certificate_that_is_not_trusted_is_told(reader: Reader) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with (
        serving(stream(), context=context) as port,
        connection_to(f"https://localhost:{port}", reader) as connection,
    ):
        reply = connection.request(b"{}", "r1")
    assert reply.failure == "disconnected"
    assert "--ca-certificates" in reply.error
    assert "--insecure" in reply.error


def test_tls_with_a_server_that_has_none_is_told(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with serving(talk) as port, connection_to(f"https://127.0.0.1:{port}", reader) as connection:
        reply = connection.request(b"{}", "r1")
    assert reply.failure == "disconnected"
    assert "is it an http:// address?" in reply.error


def test_a_silent_handshake_ends_by_the_limit(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        while peer.recv(1000):
            pass

    with (
        serving(talk) as port,
        connection_to(f"https://127.0.0.1:{port}", reader, connect_timeout_seconds=0.2) as connection,
    ):
        reply = connection.request(b"{}", "r1")
    assert (reply.failure, "within 0.2 s" in reply.error) == ("timeout", True)


def test_it_reads_where_the_kernel_has_no_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_original_epoll", lambda: None)
    reader = Reader()
    with serving(stream(b"data: a\n\n")) as port, connection_to(f"http://127.0.0.1:{port}", reader) as connection:
        assert connection.request(b"{}", "r1").is_whole
    reader.close()


def test_a_reply_that_nobody_asked_for_closes_the_connection(reader: Reader) -> None:
    def talk(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(HEAD + chunk(b"data: a\n\n") + END)
        answered.wait(LIMIT_SECONDS)
        peer.sendall(b"more than asked for")
        while peer.recv(1000):
            pass

    answered = threading.Event()
    with (
        serving(talk, stream(b"data: b\n\n")) as port,
        connection_to(f"http://127.0.0.1:{port}", reader) as connection,
    ):
        connection.request(b"{}", "r1")
        answered.set()
        while connection.is_open:
            gevent.sleep(0.001)
        assert b"data: b" in b"".join(connection.request(b"{}", "r2").parts)


def test_the_pacer_never_wakes_early_and_can_wake_on_time() -> None:
    """The best of 50 sleeps, as a loaded machine delays most; libev's timers would be 700 us late at best."""
    pacer = Pacer()
    late_nanos = []
    for _ in range(50):
        due = time.time_ns() + 1_300_000
        pacer.sleep_until(due)
        late_nanos.append(time.time_ns() - due)
    pacer.close()
    assert 0 <= min(late_nanos) < 500_000
