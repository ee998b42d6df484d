"""HTTP/1.1 as bytes: what is sent, and where a reply ends however it is cut."""

from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for, models_request, read_models
from llmpilot_loadtester.protocols.http1 import HttpExchange
from llmpilot_loadtester.protocols.http_reply import read_http
from llmpilot_loadtester.protocols.reply import Received

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def cut_up(data: bytes, places: list[int]) -> list[bytes]:
    bounds = sorted({place % len(data) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(bounds)]


def fed(parts: list[bytes]) -> tuple[int | None, HttpExchange]:
    """After how many parts an exchange says that the reply is whole; None: it never does."""
    exchange = HttpExchange()
    for number, part in enumerate(parts, 1):
        if exchange.feed(part):
            return number, exchange
    return None, exchange


def received(parts: list[bytes], *, is_closed: bool = False) -> Received:
    return Received(parts=parts, stamps=list(range(len(parts))), is_closed=is_closed)


def written_by_h11(contents: list[bytes], trailers: list[tuple[str, str]]) -> bytes:
    """A chunked reply as a peer library writes it."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    while server.next_event() is not h11.PAUSED and server.their_state is not h11.DONE:
        pass
    data = server.send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")])) or b""
    for content in contents:
        data += server.send(h11.Data(data=content)) or b""
    return data + (server.send(h11.EndOfMessage(headers=trailers)) or b"")


CONTENTS = st.lists(st.one_of(st.binary(min_size=1, max_size=30), st.sampled_from([b"0\r\n\r\n", b"\r\n0\r\n\r\n"])))


@given(CONTENTS, st.sampled_from([[], [("x-a", "b")]]), st.lists(st.integers(0, 10_000)))
def test_a_chunked_reply_ends_with_its_last_byte_however_it_is_cut(
    contents: list[bytes], trailers: list[tuple[str, str]], places: list[int]
) -> None:
    data = written_by_h11(contents, trailers)
    parts = cut_up(data, places)

    number, exchange = fed(parts)
    reply = read_http(received(parts))

    assert number == len(parts)
    assert exchange.keeps_connection
    assert (reply.body, reply.is_whole, reply.keeps_connection) == (b"".join(contents), True, True)


@given(CONTENTS, st.lists(st.integers(0, 10_000)))
def test_the_part_that_brought_a_byte_is_found_however_the_reply_is_cut(
    contents: list[bytes], places: list[int]
) -> None:
    data = written_by_h11(contents, [])
    parts = cut_up(data, places)
    body_ends: list[int] = []
    brought: list[int] = []
    at = data.index(b"\r\n\r\n") + 4
    part_of_byte = [number for number, part in enumerate(parts) for _ in part]
    for content in contents:
        at = data.index(b"\r\n", at) + 2
        for offset in range(len(content)):
            body_ends.append(len(body_ends) + 1)
            brought.append(part_of_byte[at + offset])
        at += len(content) + 2

    assert read_http(received(parts)).parts_of(body_ends).tolist() == brought


@pytest.mark.parametrize("cut_bytes", [1, 2, 3, 7])
def test_extensions_trailers_and_interim_responses_are_skipped(cut_bytes: int) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"3;a=b\r\nabc\r\n2 \r\nde\r\n0;x\r\nExpires: never\r\n\r\n"
    parts = [data[at : at + cut_bytes] for at in range(0, len(data), cut_bytes)]
    assert fed(parts)[0] == len(parts)
    assert read_http(received(parts)).body == b"abcde"


@pytest.mark.parametrize("cut_bytes", [1, 5, 1000])
def test_a_reply_of_known_length_ends_after_so_many_bytes(cut_bytes: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde"
    parts = [data[at : at + cut_bytes] for at in range(0, len(data), cut_bytes)]
    number, exchange = fed(parts)
    assert number == len(parts)
    assert exchange.keeps_connection
    assert fed([data + b"HTTP"])[1].keeps_connection is False
    assert read_http(received(parts)).body == b"abcde"


def test_a_reply_without_a_length_ends_with_the_connection() -> None:
    parts = [b"HTTP/1.1 200 OK\r\n\r\nab", b"cd"]
    assert fed(parts)[0] is None
    assert not read_http(received(parts)).is_whole
    assert read_http(received(parts, is_closed=True)).is_whole
    assert not read_http(received(parts, is_closed=True)).keeps_connection


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", True),
    ],
)
def test_the_version_and_the_connection_header_say_whether_a_connection_is_kept(head: bytes, keeps: bool) -> None:
    data = head + b"Content-Length: 0\r\n\r\n"
    assert fed([data])[1].keeps_connection is keeps
    assert read_http(received([data])).keeps_connection is keeps


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([b"SSH-2.0-OpenSSH\r\n"], "no HTTP response: b'SSH-2.0"),
        ([b"HTTP/1.1 abc\r\n\r\n"], "no HTTP status"),
        ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], "no HTTP status"),
        ([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], "no HTTP header"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], "no Content-Length"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"], "no Content-Length"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 66_000], "a response head of more than 65,536 bytes"),
        ([CHUNKED + b"xyz\r\n\r\n"], "a chunk of size b'xyz'"),
        ([CHUNKED + b"-5\r\n\r\n"], "a chunk of size b'-5'"),
        ([CHUNKED + b"1\r\nabcd\r\n\r\n"], "a chunk that is not as long as it says"),
        ([CHUNKED + b"1" * 5000 + b"\r\n\r\n"], "a chunk without a size"),
        ([CHUNKED + b"0\r\n" + b"x: y\r\n" * 20_000, b"\r", b"\n"], ""),
    ],
)
def test_what_is_no_http_ends_the_exchange_at_once(parts: list[bytes], problem: str) -> None:
    number, exchange = fed(parts)
    assert number is not None
    if problem:
        assert number == 1
        assert not exchange.keeps_connection
    assert read_http(received(parts)).problem.startswith(problem)


def test_a_large_chunk_is_not_looked_at_for_every_part() -> None:
    """10 MB of lines that look like the end, in 64 KB parts: linear, or this takes minutes."""
    content = b"\r\n\r\n" * (10 * 2**18)
    data = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    parts = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    assert fed(parts)[0] == len(parts)
    assert read_http(received(parts)).body == content


def test_a_request_has_the_target_s_headers_and_key() -> None:
    target = Target(
        url="https://user:pw@[::1]:8443/llm",
        api_key="k",
        headers=(("user-agent", "mine"), ("X-Team", "a b")),
    )
    (data,) = adapter_for(target, count_tokens=None).write(b'{"a":1}', "run-7")

    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    request, content = server.next_event(), server.next_event()
    assert isinstance(request, h11.Request)
    assert isinstance(content, h11.Data)
    assert (request.method, request.target) == (b"POST", b"/llm/v1/completions")
    assert dict(request.headers) == {
        b"host": b"[::1]:8443",
        b"user-agent": b"mine",
        b"accept": b"text/event-stream",
        b"content-type": b"application/json",
        b"authorization": b"Bearer k",
        b"x-team": b"a b",
        b"x-request-id": b"run-7",
        b"content-length": b"7",
    }
    assert content.data == b'{"a":1}'


def test_an_authorization_of_the_target_s_headers_takes_the_place_of_the_key() -> None:
    target = Target(url="http://x", api_key="k", headers=(("authorization", "Basic abc"),))
    (data,) = adapter_for(target, count_tokens=None).write(b"", "r")
    assert data.lower().count(b"authorization") == 1
    assert b"authorization: Basic abc\r\n" in data


@pytest.mark.parametrize(
    ("url", "protocol", "path", "models"),
    [
        ("http://h", Protocol.OPENAI_COMPLETIONS, "/v1/completions", "/v1/models"),
        ("http://h/", Protocol.OPENAI_CHAT, "/v1/chat/completions", "/v1/models"),
        ("http://h/a b", Protocol.OPENAI_CHAT, "/a%20b/v1/chat/completions", "/a%20b/v1/models"),
        ("http://h/v1/", Protocol.OPENAI_COMPLETIONS, "/v1/completions", "/v1/models"),
        ("http://h/x/v1/chat/completions", Protocol.OPENAI_CHAT, "/x/v1/chat/completions", "/x/v1/models"),
        ("http://h/d/chat/completions?v=1", Protocol.OPENAI_CHAT, "/d/chat/completions?v=1", "/d/models?v=1"),
        ("http://h/p", Protocol.TGI, "/p/generate_stream", "/p/info"),
        ("http://h/generate_stream", Protocol.TGI, "/generate_stream", "/info"),
    ],
)
def test_a_url_may_have_a_prefix_or_be_the_endpoint(url: str, protocol: Protocol, path: str, models: str) -> None:
    target = Target(url=url, protocol=protocol)
    (data,) = adapter_for(target, count_tokens=None).write(b"", "r")
    asked = models_request(target)
    assert data.startswith(f"POST {path} HTTP/1.1\r\n".encode())
    assert asked is not None
    assert asked.startswith(f"GET {models} HTTP/1.1\r\n".encode())


def test_headers_that_cannot_be_sent_are_refused_all_at_once() -> None:
    target = Target(url="http://x", headers=(("a\r\nb", "c"), ("ok", "a\nb"), ("Content-Length", "3"), ("é", "x")))
    with pytest.raises(InvalidInputError) as caught:
        adapter_for(target, count_tokens=None)
    assert len(caught.value.violations) == 4


@pytest.mark.parametrize(
    ("reply", "status", "problem"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "invalid", "HTTP 401 Unauthorized"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "malformed", "no list of models: 'hi'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nh", "disconnected", "the connection ended before the reply did"),
        (b"garbage", "disconnected", "no HTTP response: b'garbage'"),
    ],
)
def test_a_server_that_cannot_say_what_it_serves_is_told(reply: bytes, status: str, problem: str) -> None:
    models = read_models(received([reply], is_closed=True))
    assert (models.status, models.problem) == (status, problem)
