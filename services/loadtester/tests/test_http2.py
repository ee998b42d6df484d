"""HTTP/2 as bytes. The server's frames are made here by hand, its headers by hpack with a table that remembers."""

import struct
from itertools import pairwise

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_loadtester.protocols.http2 import PREFACE, Connection, Stream, pack_headers

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, HAS_PRIORITY, ACK = 1, 4, 8, 32, 1
REQUEST_HEADERS = pack_headers([(":method", "POST"), (":path", "/x")])


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def cut_into_frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        size = int.from_bytes(data[:3], "big")
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def opened(body: bytes = b"ask") -> tuple[Connection, Stream, list[bytes]]:
    connection = Connection()
    sent = connection.open(REQUEST_HEADERS, body)
    return connection, connection.stream(), sent


def test_a_connection_begins_with_large_windows_and_without_pushes() -> None:
    magic = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert PREFACE.startswith(magic)
    settings_frame, window = cut_into_frames(PREFACE.removeprefix(magic))
    assert settings_frame[:3] == (SETTINGS, 0, 0)
    assert dict(struct.iter_unpack(">HI", settings_frame[3])) == {2: 0, 4: 2**31 - 1}
    assert window == (WINDOW_UPDATE, 0, 0, (2**31 - 1 - 65535).to_bytes(4, "big"))


def test_calls_have_odd_numbers_and_headers_that_no_table_remembers() -> None:
    connection = Connection()
    decoder = Decoder()
    for number in (1, 3, 5):
        head, data = cut_into_frames(b"".join(connection.open(REQUEST_HEADERS, b"ask")))
        assert head[:3] == (HEADERS, END_HEADERS, number)
        assert [(str(name), str(value)) for name, value in decoder.decode(head[3])] == [
            (":method", "POST"),
            (":path", "/x"),
        ]
        assert data == (DATA, END_STREAM, number, b"ask")
    assert len(decoder.header_table.dynamic_entries) == 0


def test_a_request_larger_than_the_windows_goes_out_as_they_open() -> None:
    body = bytes(range(256)) * 800  # 204,800
    _, stream, sent = opened(body)
    got = b"".join(payload for kind, _, _, payload in cut_into_frames(b"".join(sent)) if kind == DATA)
    assert len(got) == 65535
    window = (100_000).to_bytes(4, "big")

    assert not stream.feed(frame(WINDOW_UPDATE, 0, 1, window))
    assert stream.outgoing == b""  # the connection's own window is still closed
    assert not stream.feed(frame(WINDOW_UPDATE, 0, 0, window))
    first, stream.outgoing = stream.outgoing, b""
    got += b"".join(payload for _, _, _, payload in cut_into_frames(first))
    assert len(got) == 165_535
    larger = struct.pack(">HI", 4, 65535 + 39_265) + struct.pack(">HI", 5, 20_000)
    stream.feed(frame(SETTINGS, 0, 0, larger) + frame(WINDOW_UPDATE, 0, 0, window))
    frames = cut_into_frames(stream.outgoing)
    got += b"".join(payload for kind, _, _, payload in frames if kind == DATA)

    assert got == body
    assert frames[0] == (SETTINGS, ACK, 0, b"")
    data = [(flags, len(payload)) for kind, flags, _, payload in frames if kind == DATA]
    assert [flags for flags, _ in data] == [0] * (len(data) - 1) + [END_STREAM]
    assert max(size for _, size in data) == 20_000
    assert all(len(payload) <= 16384 for _, _, _, payload in cut_into_frames(b"".join(sent) + first))


def test_a_window_that_shrinks_below_nothing_must_open_again_first() -> None:
    _, stream, _ = opened(b"x" * 70_000)
    stream.feed(
        frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + frame(WINDOW_UPDATE, 0, 0, (10**6).to_bytes(4, "big"))
    )
    assert cut_into_frames(stream.outgoing) == [(SETTINGS, ACK, 0, b"")]
    stream.outgoing = b""
    stream.feed(frame(WINDOW_UPDATE, 0, 1, (65535 + 4465).to_bytes(4, "big")))
    assert [(flags, len(payload)) for _, flags, _, payload in cut_into_frames(stream.outgoing)] == [(END_STREAM, 4465)]


def test_an_answer_before_the_whole_request_has_left_ends_it() -> None:
    connection, stream, _ = opened(b"x" * 100_000)
    assert stream.feed(frame(HEADERS, END_HEADERS | END_STREAM, 1, Encoder().encode([(":status", "413")])))
    assert cut_into_frames(stream.outgoing) == [(RST_STREAM, 0, 1, (8).to_bytes(4, "big"))]
    assert stream.keeps_connection
    connection.between(frame(WINDOW_UPDATE, 0, 0, (65535).to_bytes(4, "big")))
    assert cut_into_frames(b"".join(connection.open(REQUEST_HEADERS, b"y")))[1] == (DATA, END_STREAM, 3, b"y")


def reply_bytes(encoder: Encoder, stream_id: int) -> bytes:
    """Everything that HTTP/2 allows in a reply: padding, priority, continuation, frames of the connection between."""
    head = encoder.encode([(":status", "200"), ("content-type", "application/grpc"), ("x-custom", "remembered")])
    tail = encoder.encode([("grpc-status", "0"), ("x-custom", "remembered")])
    padded_head = b"\x02" + b"\0\0\0\0\7" + head[:3] + b"\0\0"
    return (
        frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 100))
        + frame(SETTINGS, ACK, 0)
        + frame(HEADERS, PADDED | HAS_PRIORITY, stream_id, padded_head)
        + frame(CONTINUATION, 0, stream_id, head[3:7])
        + frame(CONTINUATION, END_HEADERS, stream_id, head[7:])
        + frame(DATA, 0, stream_id, b"hello")
        + frame(PING, 0, 0, b"12345678")
        + frame(DATA, PADDED, stream_id, b"\x03 wor\0\0\0")
        + frame(0xBB, 0, 0, b"unknown kinds are ignored")
        + frame(DATA, 0, stream_id, b"")
        + frame(DATA, 0, stream_id, b"ld")
        + frame(HEADERS, END_HEADERS | END_STREAM, stream_id, tail)
        + frame(RST_STREAM, 0, stream_id, bytes(4))
        + frame(WINDOW_UPDATE, 0, 0, bytes([0, 0, 0, 9]))
        + frame(PING, 0, 0, b"abcdefgh")
    )


@given(st.lists(st.integers(1, 10_000)))
def test_two_replies_are_read_whole_however_they_are_cut(places: list[int]) -> None:
    """The frames after the end of a call come between two calls or with the next one, cut anywhere."""
    encoder = Encoder()
    first, second = reply_bytes(encoder, 1), reply_bytes(encoder, 3)
    everything = first + second
    bounds = sorted({place % len(everything) for place in places} | {0, len(first), len(everything)})
    connection, stream, _ = opened()
    answered = b""
    ended = []
    for start, end in pairwise(bounds):
        if (start < len(first) or stream.id == 3) and stream.is_ended:
            sent = connection.between(everything[start:end])
            assert sent is not None
            answered += sent
            continue
        if start == len(first) and stream.id == 1:
            connection.open(REQUEST_HEADERS, b"again")
            ended.append(stream)
            stream = connection.stream()
        stream.feed(everything[start:end])
        answered += stream.outgoing
        stream.outgoing = b""
    ended.append(stream)

    pings = [payload for kind, flags, _, payload in cut_into_frames(answered) if (kind, flags) == (PING, ACK)]
    assert pings == [b"12345678", b"abcdefgh"] * 2
    for each in ended:
        assert (each.is_ended, each.keeps_connection, each.problem, each.reset_code) == (True, True, "", None)
        assert dict(each.headers or ())["x-custom"] == "remembered"
        assert dict(each.trailers or ()) == {"grpc-status": "0", "x-custom": "remembered"}


def test_a_call_that_is_reset_is_over() -> None:
    _, stream, _ = opened()
    assert stream.feed(frame(RST_STREAM, 0, 1, (7).to_bytes(4, "big")))
    assert stream.reset_code == 7
    assert stream.keeps_connection


@pytest.mark.parametrize(("last_id", "is_over"), [(0, True), (1, False)])
def test_a_server_that_leaves_ends_the_calls_that_it_has_not_begun(last_id: int, is_over: bool) -> None:
    connection, stream, _ = opened()
    goaway = frame(GOAWAY, 0, 0, last_id.to_bytes(4, "big") + (11).to_bytes(4, "big") + b"calm down")
    assert stream.feed(goaway) is is_over
    assert not stream.keeps_connection
    assert bool(stream.problem) is is_over
    if is_over:
        assert stream.problem == "the server leaves (HTTP/2 code 11: calm down)"
    else:
        assert stream.feed(frame(DATA, END_STREAM, 1, b""))
        assert not stream.keeps_connection
    assert connection.between(frame(PING, 0, 0, bytes(8))) is None


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no HTTP/2: b'HTTP/1.1 400"),
        (frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2"), "HTTP/2: the server pushes"),
        (frame(CONTINUATION, END_HEADERS, 1, b""), "HTTP/2: a continuation of nothing"),
        (frame(HEADERS, 0, 1, b"\x88") + frame(PING, 0, 0, bytes(8)), "HTTP/2: headers without their continuation"),
        (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"), "HTTP/2: headers that cannot be unpacked"),
        (
            frame(HEADERS, 0, 1) + 5 * frame(CONTINUATION, 0, 1, bytes(16384)),
            "HTTP/2: headers of more than 65,536 bytes",
        ),
    ],
)
def test_what_is_no_http2_ends_the_call_at_once(data: bytes, problem: str) -> None:
    _, stream, _ = opened()
    assert stream.feed(data)
    assert stream.problem.startswith(problem)
    assert not stream.keeps_connection


def test_a_gigabyte_opens_the_window_again_by_what_was_read() -> None:
    _, stream, _ = opened()
    part = frame(DATA, 0, 1, bytes(16384))
    count = 2**30 // 16384 + 1
    for _ in range(count):
        stream.feed(part)
    stream.feed(frame(PING, ACK, 0, bytes(8)))
    assert cut_into_frames(stream.outgoing) == [(WINDOW_UPDATE, 0, 0, (count * 16384).to_bytes(4, "big"))]


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_no_bytes_raise(parts: list[bytes]) -> None:
    _, stream, _ = opened()
    for part in parts:
        if stream.feed(part):
            break
    connection, _, _ = opened()
    for part in parts:
        connection.between(part)


@given(st.integers(0, 9), st.integers(0, 255), st.sampled_from([0, 1, 3]), st.binary(max_size=40))
def test_no_frame_raises(kind: int, flags: int, stream_id: int, payload: bytes) -> None:
    _, stream, _ = opened()
    stream.feed(frame(kind, flags, stream_id, payload))
