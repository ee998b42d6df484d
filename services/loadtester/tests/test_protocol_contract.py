"""What every protocol adapter says of a golden server that knows its tokens and logs when it wrote each of them."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest

from fmaas import generation_pb2 as pb
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for, models_exchange, models_request, read_models
from llmpilot_loadtester.protocols.bodies import body_for
from llmpilot_loadtester.protocols.reply import Exchange, ProtocolAdapter, Received, Reply
from llmpilot_loadtester.wire_tgis import decode_generation_response, write_single_request
from llmpilot_simulator.write_log import Writes, read_write_log

DEADLINE_SECONDS = 30
TTFT_NANOS, ITL_NANOS = 50_000_000, 5_000_000
MODEL = "meta-llama/Llama-3.1-8B"
TOKENS = 12
LATE_NANOS = 40_000_000
"""How late a busy machine may stamp a token; the kernel's stamps are tested with the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The golden server."""

    http: str
    grpc: str
    log: Path

    def truth(self, request_id: str, token_count: int) -> Writes:
        """Wait until so many tokens of a request are in the log, and return the log."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (writes := read_write_log(self.log)).of(request_id).sum() < token_count:
            assert time.monotonic() < deadline, "the log never had the tokens"
            time.sleep(0.02)
        return writes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("golden") / "writes"
    command = [sys.executable, "-u", "-c", "from llmpilot_simulator.cli_simulate import simulate; simulate()", "serve"]
    options = ["--llm", "llama-3.1-8b", "--fixed-ttft-ms", "50", "--fixed-itl-ms", "5", "--endless"]
    options += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--write-log", str(log)]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"http://([0-9.:]+), TGIS at ([0-9.:]+)", line):
                    yield Server(http=found.group(1), grpc=found.group(2), log=log)
                    break
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_SECONDS)
        finally:
            process.kill()


@dataclass(slots=True, kw_only=True)
class Client:
    """One connection, read by a plain loop that stamps what it reads."""

    protocol: Protocol
    adapter: ProtocolAdapter
    connection: socket.socket
    send_nanos: int = 0

    def ask(self, body: bytes, request_id: str) -> Received:
        """Send a request and read its reply to the end."""
        self.send_nanos = time.time_ns()
        pieces = self.adapter.write(body, request_id)
        exchange = self.adapter.exchange()
        return receive(self.connection, pieces, exchange)


def receive(connection: socket.socket, pieces: Sequence[bytes], exchange: Exchange) -> Received:
    parts, stamps, is_closed = [], [], False
    connection.sendall(b"".join(pieces))
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            is_closed = True
            break
        stamps.append(time.time_ns())
        parts.append(part)
        is_whole = exchange.feed(part)
        connection.sendall(exchange.outgoing)
        exchange.outgoing = b""
        if is_whole:
            break
    return Received(parts=parts, stamps=stamps, is_closed=is_closed, exchange=exchange)


class Connect:
    """Opens clients, and closes them all."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._opened: list[socket.socket] = []

    def __call__(self, protocol: Protocol, headers: Mapping[str, str] | None = None) -> Client:
        """Open one."""
        address = self._server.grpc if protocol is Protocol.TGIS else self._server.http
        scheme = "grpc" if protocol is Protocol.TGIS else "http"
        target = Target(
            url=f"{scheme}://{address}",
            protocol=protocol,
            served_model=MODEL,
            headers=tuple((headers or {}).items()),
        )
        adapter = adapter_for(target, count_tokens=None, decode_tgis=decode_generation_response)
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), DEADLINE_SECONDS)
        self._opened.append(connection)
        connection.sendall(adapter.preface)
        return Client(protocol=protocol, adapter=adapter, connection=connection)

    def close(self) -> None:
        """Close all."""
        for connection in self._opened:
            connection.close()


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    connect = Connect(server)
    yield connect
    connect.close()


def body(protocol: Protocol, *, prompt: str = "Tell me a story.", tokens: int = TOKENS) -> bytes:
    if protocol is Protocol.TGIS:
        return write_single_request(prompt, output_tokens=tokens, fixed_output_length=True)
    return body_for(protocol, prompt=prompt, served_model=MODEL, output_tokens=tokens, fixed_output_length=True)


IDS = map("r{}".format, count())


def ask(connect: Connect, protocol: Protocol, fault: str = "", **changes: object) -> tuple[Reply, str, Client]:
    client = connect(protocol, {"x-simulate-fault": fault} if fault else None)
    request_id = next(IDS)
    received = client.ask(body(protocol, **changes), request_id)  # type: ignore[arg-type]
    return client.adapter.read(received), request_id, client


every_protocol = pytest.mark.parametrize("protocol", list(Protocol), ids=str)


@every_protocol
def test_every_token_is_counted_and_stamped_when_it_was_written(
    server: Server, connect: Connect, protocol: Protocol
) -> None:
    reply, request_id, client = ask(connect, protocol)

    writes = server.truth(request_id, TOKENS)
    written = writes.written_nanos[writes.of(request_id)].tolist()
    assert (reply.status, reply.error) == ("ok", "")
    assert sum(reply.chunk_tokens) == TOKENS == len(reply.chunk_stamps)
    assert reply.token_count_source == "server"  # noqa: S105 tokens of text
    assert reply.finish_reason == "length"
    assert reply.input_tokens is not None
    assert reply.input_tokens >= 4
    assert reply.text
    lateness = [stamp - truth for stamp, truth in zip(reply.chunk_stamps, written, strict=True)]
    assert all(0 <= late < LATE_NANOS for late in lateness), lateness
    assert reply.chunk_stamps[0] - client.send_nanos >= TTFT_NANOS


@every_protocol
def test_a_connection_carries_one_call_after_the_other(connect: Connect, protocol: Protocol) -> None:
    client = connect(protocol)
    received = [client.ask(body(protocol, tokens=number), next(IDS)) for number in (1, 2, 3)]
    replies = [client.adapter.read(each) for each in reversed(received)]
    assert [sum(reply.chunk_tokens) for reply in replies] == [3, 2, 1]
    assert all(reply.keeps_connection for reply in replies)
    assert all(each.exchange is not None and each.exchange.keeps_connection for each in received)


@every_protocol
def test_a_prompt_larger_than_every_window_gets_through(connect: Connect, protocol: Protocol) -> None:
    reply, _, _ = ask(connect, protocol, prompt="word " * 60_000, tokens=2)
    assert reply.status == "ok"
    assert reply.input_tokens is not None
    assert reply.input_tokens > 50_000


@every_protocol
def test_several_tokens_in_a_chunk_have_the_time_of_the_chunk(
    server: Server, connect: Connect, protocol: Protocol
) -> None:
    reply, request_id, _ = ask(connect, protocol, "stream-interval=4")
    writes = server.truth(request_id, TOKENS)
    written = writes.written_nanos[writes.of(request_id)].tolist()
    stamps = [
        stamp for stamp, tokens in zip(reply.chunk_stamps, reply.chunk_tokens, strict=True) for _ in range(tokens)
    ]
    assert sum(reply.chunk_tokens) == TOKENS
    if protocol in (Protocol.TGI, Protocol.TGIS):  # that say how many tokens a message has
        assert all(0 <= stamp - truth < LATE_NANOS for stamp, truth in zip(stamps, written, strict=True))
    else:
        assert len(reply.chunk_stamps) == 4
        assert reply.chunk_tokens[0] <= 2  # the first leaves alone: by its length it may seem two
    assert reply.coalesced_count == (8 if protocol is Protocol.TGI else 0)


@every_protocol
def test_tokens_without_text_count_with_the_text_that_they_begin(connect: Connect, protocol: Protocol) -> None:
    reply, _, _ = ask(connect, protocol, "empty-every=3")
    assert reply.status == "ok"
    assert sum(reply.chunk_tokens) == TOKENS
    assert len(reply.chunk_tokens) == TOKENS - 3
    if protocol in (Protocol.TGI, Protocol.TGIS):
        assert reply.chunk_tokens == [1, 1, 2, 1, 2, 1, 2, 1, 1]


def test_a_role_chunk_before_the_first_token_is_no_token(connect: Connect) -> None:
    reply, _, client = ask(connect, Protocol.OPENAI_CHAT, "role-chunk=early")
    assert sum(reply.chunk_tokens) == TOKENS == len(reply.chunk_stamps)
    assert reply.chunk_stamps[0] - client.send_nanos >= TTFT_NANOS


@every_protocol
@pytest.mark.parametrize("fault", ["drop-after", "reset-after"])
def test_a_reply_that_breaks_off_keeps_what_had_come(connect: Connect, protocol: Protocol, fault: str) -> None:
    """TGIS has no way to be dropped but to say that it is not available."""
    reply, _, _ = ask(connect, protocol, f"{fault}=3")
    assert reply.status == ("rejected" if protocol is Protocol.TGIS else "disconnected")
    assert list(reply.chunk_tokens) == [1, 1, 1]
    assert not reply.keeps_connection or protocol is Protocol.TGIS


@every_protocol
@pytest.mark.parametrize("after", [0, 3])
def test_memory_that_runs_out_is_told_apart(connect: Connect, protocol: Protocol, after: int) -> None:
    reply, _, _ = ask(connect, protocol, f"out-of-memory-after={after}")
    assert reply.status == "out_of_memory"
    assert "CUDA out of memory (simulated)" in reply.error
    assert list(reply.chunk_tokens) == [1] * after


@every_protocol
@pytest.mark.parametrize("code", [429, 503])
def test_a_rejection_says_so_and_when_to_come_again(connect: Connect, protocol: Protocol, code: int) -> None:
    reply, _, client = ask(connect, protocol, f"reject={code}")
    assert reply.status == "rejected"
    assert reply.keeps_connection
    if protocol is not Protocol.TGIS:
        assert (reply.http_status, reply.retry_after_seconds) == (code, 1.0)
        assert reply.error.startswith(f"HTTP {code} ")
    again = client.adapter.read(client.ask(body(protocol), next(IDS)))
    assert again.status == "rejected"


def test_a_model_that_is_not_served_is_an_invalid_request(connect: Connect) -> None:
    client = connect(Protocol.OPENAI_CHAT)
    wrong = body_for(Protocol.OPENAI_CHAT, prompt="a", served_model="gpt-9", output_tokens=1, fixed_output_length=False)
    reply = client.adapter.read(client.ask(wrong, next(IDS)))
    assert reply.status == "invalid"
    assert reply.error == "HTTP 404 Not Found: The model `gpt-9` does not exist."


def test_an_empty_prompt_of_tgi_is_an_invalid_request(connect: Connect) -> None:
    reply, _, _ = ask(connect, Protocol.TGI, prompt="")
    assert (reply.status, reply.error) == ("invalid", "Input validation error: `inputs` cannot be empty")


def test_a_reply_says_who_it_is_from(connect: Connect) -> None:
    reply, _, _ = ask(connect, Protocol.OPENAI_COMPLETIONS)
    assert reply.served_model == f"{MODEL}-simulated"


def test_continuous_usage_gives_the_tokens_of_each_chunk(connect: Connect) -> None:
    for protocol in (Protocol.OPENAI_COMPLETIONS, Protocol.OPENAI_CHAT):
        client = connect(protocol, {"x-simulate-fault": "stream-interval=4, empty-every=3"})
        wish = body(protocol).replace(b'"include_usage":true', b'"include_usage":true,"continuous_usage_stats":true')
        reply = client.adapter.read(client.ask(wish, next(IDS)))
        assert (list(reply.chunk_tokens), reply.token_count_source) == ([1, 4, 4, 3], "server")


def test_a_server_says_what_it_serves_and_that_it_is_simulated(server: Server) -> None:
    for protocol in (Protocol.OPENAI_COMPLETIONS, Protocol.OPENAI_CHAT, Protocol.TGI):
        request = models_request(Target(url=f"http://{server.http}", protocol=protocol))
        assert request is not None
        host, _, port = server.http.rpartition(":")
        with socket.create_connection((host, int(port)), DEADLINE_SECONDS) as connection:
            models = read_models(receive(connection, [request], models_exchange()))
        assert (models.names, models.is_simulated, models.problem) == ((f"{MODEL}-simulated",), True, "")
    assert models_request(Target(url=f"grpc://{server.grpc}", protocol=Protocol.TGIS)) is None


@every_protocol
def test_what_was_cut_off_is_read_without_an_error(connect: Connect, protocol: Protocol) -> None:
    """Whatever is missing at the end: the tokens that are there are those of the whole reply."""
    client = connect(protocol)
    received = client.ask(body(protocol), next(IDS))
    whole = client.adapter.read(received)
    for end in range(len(received.parts)):
        adapter = adapter_for(
            Target(url="http://x", protocol=protocol), count_tokens=None, decode_tgis=decode_generation_response
        )
        adapter.write(b"{}", "x")
        exchange = adapter.exchange()
        parts = list(received.parts[:end])
        assert not any(exchange.feed(part) for part in parts)
        cut = replace(received, parts=parts, stamps=received.stamps[:end], is_closed=True, exchange=exchange)
        reply = client.adapter.read(cut)
        assert list(reply.chunk_stamps) == [stamp for stamp in whole.chunk_stamps if stamp in received.stamps[:end]]
        assert reply.status in ("disconnected", "ok")


def test_tgis_is_asked_in_its_own_words() -> None:
    message = pb.SingleGenerationRequest.FromString(
        write_single_request("a", output_tokens=7, fixed_output_length=True)
    )
    assert message.request.text == "a"
    assert message.params.stopping.max_new_tokens == message.params.stopping.min_new_tokens == 7
