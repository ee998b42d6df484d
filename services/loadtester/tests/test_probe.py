"""What is wrong with a target is told in a sentence, here by sockets that behave so."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hpack import Encoder

from llmpilot_loadtester.domain.spec import Load, LoadKind, Protocol, Target, UserStep
from llmpilot_loadtester.engine.load_shape import users_at
from llmpilot_loadtester.engine.probe import probe
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.protocols.http2 import END_HEADERS, END_STREAM, HEADERS, SETTINGS, pack_frame
from llmpilot_loadtester.worker_messages import Probed

LIMIT_SECONDS = 10.0
MODEL = "meta-llama/Llama-3.1-8B-simulated"


@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """Gives host and port of a server that says this to the first request; None: nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        peer.settimeout(LIMIT_SECONDS)
        with peer:
            peer.recv(65536)
            if answer is not None:
                peer.sendall(answer)
            else:
                asked.wait(LIMIT_SECONDS)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        asked.set()
        thread.join(LIMIT_SECONDS)
        listener.close()


@pytest.fixture
def reader() -> Iterator[Reader]:
    """What watches the sockets."""
    made = Reader()
    yield made
    made.close()


def reply(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "changes", "said"),
    [
        (reply("401 Unauthorized"), {}, "wants an API key (HTTP 401): give the right one with --api-key"),
        (reply("403 Forbidden"), {"api_key": "k"}, "does not accept the API key (HTTP 403)"),
        (reply("404 Not Found"), {}, "is the path in the URL right?"),
        (reply("200 OK", "hello"), {}, "name one with --served-model"),
        (reply("200 OK", '{"data": []}'), {}, "serves no model: load one"),
        (reply("503 Service Unavailable"), {"served_model": "m"}, "is not ready"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", {}, "check scheme, host and port"),
        (b"", {}, "check scheme, host and port"),
        (None, {"request_timeout_seconds": 0.2}, "no whole reply within 0.2 s"),
    ],
)
def test_what_a_server_says_becomes_a_sentence_that_says_what_to_do(
    reader: Any, answer: Any, changes: Any, said: Any
) -> None:
    with answering(answer) as address:
        assert said in probe(Target(url=f"http://{address}", **changes), reader).problem


def test_a_server_that_lists_no_models_is_taken_if_the_name_is_known(reader: Any) -> None:
    with answering(reply("404 Not Found")) as address:
        found = probe(Target(url=f"http://{address}", served_model="mine"), reader)
    assert found == Probed(served_models=("mine",))


def test_a_refused_connection_asks_whether_the_server_runs(reader: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "refuses connections: does the server run there?" in probe(
        Target(url=f"http://127.0.0.1:{port}"), reader
    ).problem  # fmt: skip
    assert "refuses" in probe(Target(url=f"grpc://127.0.0.1:{port}", protocol=Protocol.TGIS), reader).problem


def test_tls_with_a_server_that_speaks_none_says_so(reader: Any) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert "is it an http:// address?" in probe(Target(url=f"https://{address}"), reader).problem


def test_the_simulator_says_what_it_is(reader: Any, simulator: Any) -> None:
    for protocol in (Protocol.OPENAI_COMPLETIONS, Protocol.OPENAI_CHAT, Protocol.TGI):
        found = probe(Target(url=simulator.url, protocol=protocol), reader)
        assert found == Probed(served_models=(MODEL,), simulated=True)
    assert probe(Target(url=simulator.grpc_url, protocol=Protocol.TGIS), reader) == Probed(simulated=True)


@pytest.mark.parametrize(("key", "said"), [("", "wants an API key"), ("k", "does not accept the API key")])
def test_a_grpc_server_that_does_not_let_us_in_is_told(reader: Any, key: Any, said: Any) -> None:
    headers = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "16")]
    answer = pack_frame(SETTINGS, 0, 0) + pack_frame(HEADERS, END_STREAM | END_HEADERS, 1, Encoder().encode(headers))
    with answering(answer) as address:
        found = probe(Target(url=f"grpc://{address}", protocol=Protocol.TGIS, api_key=key), reader)
    assert f"{said} (UNAUTHENTICATED): give the right one with --api-key" in found.problem


def test_a_web_server_at_a_grpc_address_is_told(reader: Any) -> None:
    with answering(reply("404 Not Found")) as address:
        assert "HTTP/2" in probe(Target(url=f"grpc://{address}", protocol=Protocol.TGIS), reader).problem


def steps(*points: tuple[float, int], ramp: bool) -> Load:
    user_steps = tuple(UserStep(at_seconds=at, users_count=count) for at, count in points)
    return Load(kind=LoadKind.USERS, user_steps=user_steps, ramp=ramp)


@pytest.mark.parametrize(
    ("seconds", "in_steps", "in_a_ramp"),
    [(0, 2, 2), (4.9, 2, 6), (5, 2, 6), (10, 10, 10), (15, 10, 7), (20, 4, 4), (1000, 4, 4)],
)
def test_users_by_time(seconds: Any, in_steps: Any, in_a_ramp: Any) -> None:
    points = ((0.0, 2), (10.0, 10), (20.0, 4))
    assert users_at(steps(*points, ramp=False), seconds) == in_steps
    assert users_at(steps(*points, ramp=True), seconds) == in_a_ramp


def test_nobody_is_there_before_the_first_step() -> None:
    assert users_at(steps((1.0, 2), ramp=True), 0.5) == 0
