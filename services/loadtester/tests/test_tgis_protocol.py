"""What is made of the messages of TGIS. Expected counts are by hand; the peer is grpcio."""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import grpc
import pytest
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from fmaas import generation_pb2 as pb
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for
from llmpilot_loadtester.protocols.bodies import body_for
from llmpilot_loadtester.protocols.http2 import Stream
from llmpilot_loadtester.protocols.reply import ProtocolAdapter, Received, Reply
from llmpilot_loadtester.wire_tgis import decode_generation_response, single_requests, write_single_request

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

HEADERS = [(":status", "200"), ("content-type", "application/grpc+proto")]


def frame(kind: int, flags: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + (1).to_bytes(4, "big") + payload


def head(headers: Sequence[tuple[str, str]] = HEADERS, *, is_last: bool = False) -> bytes:
    return frame(1, 5 if is_last else 4, Encoder().encode(headers))


def message(tokens: int, text: str = "", reason: Any = 0, *, input_tokens: int = 0) -> bytes:
    content = pb.GenerationResponse(
        input_token_count=input_tokens, generated_token_count=tokens, text=text, stop_reason=reason
    ).SerializeToString()
    return frame(0, 0, b"\0" + len(content).to_bytes(4, "big") + content)


def trailers(code: int = 0, text: str = "") -> bytes:
    return head([("grpc-status", str(code)), ("grpc-message", text)], is_last=True)


def new_adapter(**changes: object) -> ProtocolAdapter:
    target = Target(url="grpc://x", protocol=Protocol.TGIS, **changes)  # type: ignore[arg-type]
    return adapter_for(target, count_tokens=None, decode_tgis=decode_generation_response)


def read(*parts: bytes, is_closed: bool = False) -> Reply:
    """Each part with a stamp: 0, 1, 2 ..."""
    adapter = new_adapter()
    adapter.write(b"", "r")
    exchange = adapter.exchange()
    for part in parts:
        exchange.feed(part)
    stamps = list(range(len(parts)))
    return adapter.read(Received(parts=parts, stamps=stamps, is_closed=is_closed, exchange=exchange))


FIRST = message(0, input_tokens=7)


def test_messages_say_how_many_tokens_they_have() -> None:
    """The third message's token has no text yet; the last one's never has."""
    reply = read(
        head(), FIRST, message(1, "a"), message(2), message(5, "bcd"), message(6, "", pb.EOS_TOKEN), trailers()
    )
    assert list(zip(reply.chunk_stamps, reply.chunk_tokens, strict=True)) == [(2, 1), (4, 4), (5, 1)]
    assert (reply.status, reply.token_count_source, reply.input_tokens) == ("ok", "server", 7)
    assert (reply.text, reply.finish_reason, reply.coalesced_count) == ("abcd", "stop", 0)
    assert reply.keeps_connection


def test_the_prompt_in_the_first_message_is_no_token() -> None:
    assert read(head(), message(0, "prompt", input_tokens=7), message(1, "a", 1), trailers()).text == "a"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (pb.MAX_TOKENS, "length"),
        (pb.TOKEN_LIMIT, "length"),
        (pb.EOS_TOKEN, "stop"),
        (pb.STOP_SEQUENCE, "stop"),
        (pb.TIME_LIMIT, "other"),
        (pb.CANCELLED, "other"),
        (99, "other"),
    ],
)
def test_stop_reasons_are_those_of_the_records(reason: int, expected: str) -> None:
    assert read(head(), FIRST, message(1, "a", reason), trailers()).finish_reason == expected


@pytest.mark.parametrize(
    ("code", "text", "status", "error"),
    [
        (1, "", "disconnected", "CANCELLED"),
        (3, "bad%20%C3%A9", "invalid", "INVALID_ARGUMENT: bad é"),
        (4, "", "timeout", "DEADLINE_EXCEEDED"),
        (8, "Model is overloaded", "rejected", "RESOURCE_EXHAUSTED: Model is overloaded"),
        (8, "CUDA out of memory", "out_of_memory", "RESOURCE_EXHAUSTED: CUDA out of memory"),
        (13, "boom", "server_error", "INTERNAL: boom"),
        (14, "", "rejected", "UNAVAILABLE"),
        (16, "", "invalid", "UNAUTHENTICATED"),
        (99, "x", "server_error", "grpc-status 99: x"),
        (10**400, "x", "server_error", "grpc-status 10000000000000000000: x"),
    ],
)
def test_grpc_statuses_are_those_of_the_records(code: int, text: str, status: str, error: str) -> None:
    reply = read(head(), FIRST, message(1, "a"), trailers(code, text))
    assert (reply.status, reply.error) == (status, error)
    assert list(reply.chunk_tokens) == [1]
    alone = read(head([*HEADERS, ("grpc-status", str(code)), ("grpc-message", text)], is_last=True))
    assert (alone.status, alone.error) == (status, error)


@pytest.mark.parametrize(
    ("parts", "status", "error"),
    [
        ([], "disconnected", "the connection ended before the reply began"),
        ([head(), FIRST, message(1, "a")], "disconnected", "the connection ended before the call ended"),
        ([head([(":status", "503")], is_last=True)], "rejected", "HTTP 503 where gRPC was expected"),
        ([head([(":status", "404")])], "invalid", "HTTP 404 where gRPC was expected"),
        (
            [head([(":status", "200"), ("content-type", "text/html")])],
            "malformed",
            "no gRPC: content-type 'text/html'",
        ),
        ([head(), frame(0, 1, b"")], "malformed", "the call ended without a grpc-status"),
        ([head(), FIRST, trailers()], "malformed", "the reply has no token"),
        ([head(), frame(0, 0, b"\1\0\0\0\1x"), trailers()], "malformed", "a packed message, which was not asked for"),
        ([head(), FIRST, message(1, "a", pb.ERROR), trailers()], "server_error", "the server ended the reply with"),
        ([head(), frame(3, 0, (8).to_bytes(4, "big"))], "disconnected", "the server reset the call (HTTP/2 code 8)"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "malformed", "no HTTP/2: b'HTTP/1.1 400"),
        ([head(), frame(0, 0, b"\0\0\0\0\2\xff\xff"), trailers()], "malformed", "a message is no fmaas.GenerationRes"),
    ],
)
def test_what_goes_wrong_has_a_status(parts: list[bytes], status: str, error: str) -> None:
    reply = read(*parts, is_closed=True)
    assert reply.status == status
    assert reply.error.startswith(error)


WHOLE = (
    head()
    + FIRST
    + message(1, "a")
    + frame(0, 8, b"\x04" + message(3, "é" * 40)[9:30] + bytes(4))
    + frame(0, 0, message(3, "é" * 40)[30:] + message(4, "", pb.EOS_TOKEN)[9:])
    + trailers()
)
"""The third message is cut over two frames, one padded; the second of them has the fourth message too."""


@given(st.lists(st.integers(1, len(WHOLE) - 1), unique=True))
def test_any_cut_of_the_bytes_gives_the_same_reply_and_the_stamps_of_the_parts(places: list[int]) -> None:
    bounds = [0, *sorted(places), len(WHOLE)]
    parts = [WHOLE[start:end] for start, end in pairwise(bounds)]
    adapter = new_adapter()
    adapter.write(b"", "r")
    exchange = adapter.exchange()
    assert [exchange.feed(part) for part in parts] == [False] * (len(parts) - 1) + [True]
    reply = adapter.read(Received(parts=parts, stamps=bounds[1:], exchange=exchange))

    first_end = len(head() + FIRST + message(1, "a"))
    last_end = len(WHOLE) - len(trailers())
    middle_end = last_end - len(message(4, "", pb.EOS_TOKEN)[9:])
    assert (reply.status, list(reply.chunk_tokens), reply.text) == ("ok", [1, 2, 1], "a" + "é" * 40)
    expected = [min(bound for bound in bounds if bound >= end) for end in (first_end, middle_end, last_end)]
    assert list(reply.chunk_stamps) == expected


def test_a_frame_that_began_before_the_call_is_not_read_as_its_own() -> None:
    adapter = new_adapter()
    adapter.write(b"", "r")
    ping = b"\0\0\x08\6\0\0\0\0\0" + b"12345678"
    assert adapter.between(ping[:11]) == b""
    exchange = adapter.exchange()
    parts = [ping[11:] + head(), message(1, "a", 1), trailers()]
    assert [exchange.feed(part) for part in parts] == [False, False, True]
    reply = adapter.read(Received(parts=parts, stamps=[5, 6, 7], exchange=exchange))
    assert (reply.status, reply.chunk_stamps) == ("ok", [6])
    assert exchange.outgoing[9:] == b"12345678"


def test_a_reply_without_its_exchange_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match=r"set Received.exchange"):
        new_adapter().read(Received(parts=[b"x"], stamps=[1]))


def test_a_new_connection_begins_with_the_first_call() -> None:
    adapter = new_adapter()
    numbers = []
    for is_new in (False, False, True):
        if is_new:
            adapter.renew()
        adapter.write(b"", "r")
        exchange = adapter.exchange()
        assert isinstance(exchange, Stream)
        numbers.append(exchange.id)
    assert numbers == [1, 3, 1]


class Recorder(grpc.GenericRpcHandler):
    """Notes what a peer sees of a call, and answers with one message."""

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Take every call."""
        self.method = details.method
        self.metadata = dict(details.invocation_metadata or ())
        return grpc.unary_stream_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:  # noqa: ARG002
        self.request = request
        content = pb.GenerationResponse(generated_token_count=1, text="a", stop_reason=pb.MAX_TOKENS)
        yield content.SerializeToString()


def test_grpcio_sees_the_key_the_headers_and_a_request_of_a_megabyte() -> None:
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((recorder,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        adapter = new_adapter(api_key="k", headers=(("X-Team", "a"),))
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            request = write_single_request("word " * 200_000, output_tokens=1, fixed_output_length=False)
            connection.sendall(adapter.preface + b"".join(adapter.write(request, "run-1")))
            exchange = adapter.exchange()
            parts = [connection.recv(65536)]
            while not exchange.feed(parts[-1]):
                connection.sendall(exchange.outgoing)
                exchange.outgoing = b""
                parts.append(connection.recv(65536))
                assert parts[-1]
        reply = adapter.read(Received(parts=parts, stamps=list(range(len(parts))), exchange=exchange))
    finally:
        server.stop(0).wait(30)
    assert (reply.status, reply.text) == ("ok", "a")
    assert recorder.method == "/fmaas.GenerationService/GenerateStream"
    assert recorder.request == request
    assert recorder.metadata["authorization"] == "Bearer k"
    assert (recorder.metadata["x-team"], recorder.metadata["x-request-id"]) == ("a", "run-1")


def test_a_batch_becomes_a_request_per_text_with_all_its_parameters() -> None:
    params = pb.Parameters(method=pb.SAMPLE, stopping=pb.StoppingCriteria(max_new_tokens=9))
    batch = pb.BatchedGenerationRequest(
        model_id="m", adapter_id="a", params=params, requests=[pb.GenerationRequest(text=text) for text in ("x", "y")]
    )
    singles = [pb.SingleGenerationRequest.FromString(each) for each in single_requests(batch.SerializeToString())]
    assert singles == [
        pb.SingleGenerationRequest(model_id="m", adapter_id="a", params=params, request=pb.GenerationRequest(text=text))
        for text in ("x", "y")
    ]
    assert single_requests(b"") == []
    with pytest.raises(ValueError, match=r"no fmaas.BatchedGenerationRequest"):
        single_requests(b"\xff\xff")


def test_json_is_not_written_for_tgis() -> None:
    with pytest.raises(ValueError, match="wire_tgis"):
        body_for(Protocol.TGIS, prompt="", served_model="", output_tokens=1, fixed_output_length=True)
