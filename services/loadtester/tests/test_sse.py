"""Server-sent events."""

import time
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_loadtester.protocols import sse
from llmpilot_loadtester.protocols.sse import LARGEST_LINE_BYTES, cut_events

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

STREAM = "data: one\n\n: a comment\n\ndata:two\ndata: lines\nid: 7\n\nevent: error\ndata: {}\n\n\ndata\n\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_ends_lines(line_end: str) -> None:
    body = STREAM.replace("\n", line_end).encode()
    events = cut_events(body, is_whole=True)
    data = [(index, each.strip()) for index, each in enumerate(events.data) if each]
    assert [each for _, each in data] == [b"one", b"two\nlines", b"{}"]
    assert events.names == {data[2][0]: "error"}
    blank = line_end.encode() * 2
    assert events.ends[0] == len("data: one") + len(blank)
    assert events.ends[data[1][0]] == body.index(b"event")


def test_an_event_without_an_empty_line_is_one_only_in_a_whole_body() -> None:
    assert list(cut_events(b"data: a\n\ndata: [DONE]", is_whole=True).data) == [b" a", b" [DONE]"]
    assert list(cut_events(b"data: a\n\ndata: [DONE]", is_whole=False).data) == [b" a"]
    assert list(cut_events(b"data: a\r\n\r\ndata: b\r\n", is_whole=False).data) == [b"a"]


LINES = st.lists(
    st.sampled_from(["data: x", "data:y", "data:  z", ":c", "", "event: e", "data", "id: 1", "data: {a: b}"])
)


@given(LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([1, 9, 1000]))
def test_events_are_those_of_a_reader_line_by_line(lines: list[str], line_end: str, slab_bytes: int) -> None:
    """The standard's algorithm, line by line. slab_bytes: what is read without a pause."""
    expected: list[tuple[str, str]] = []
    data: list[str] = []
    name = ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data and "\n".join(data):
                expected.append(("\n".join(data), name))
            data, name = [], ""
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
    body = "".join(line + line_end for line in lines).encode()
    with mock.patch.object(sse, "_SLAB_BYTES", slab_bytes):
        events = cut_events(body, is_whole=False)
    got = [
        (each.decode().removeprefix(" "), events.names.get(index, "")) for index, each in enumerate(events.data) if each
    ]
    assert [(text.strip(), name) for text, name in got] == [(text.strip(), name) for text, name in expected]
    assert list(events.ends) == sorted(set(events.ends))
    assert all(body[:end].endswith(2 * line_end.encode()) for end in events.ends)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_ten_megabytes_in_a_line_are_read_in_linear_time(line_end: bytes) -> None:
    """It takes some 50 ms; a reader that looks at the line again for every part takes minutes."""
    long = b"data: " + b"x" * 10_000_000 + 2 * line_end
    start = time.perf_counter()
    events = cut_events(long, is_whole=True)
    assert time.perf_counter() - start < 5
    assert len(events.data[0].strip()) == 10_000_000
    assert not events.problem


def test_a_line_of_more_than_16_mb_is_refused() -> None:
    assert cut_events(b"data: " + b"x" * LARGEST_LINE_BYTES + b"\n\n", is_whole=True).problem
    two_lines = b"data: " + b"x" * (LARGEST_LINE_BYTES - 10) + b"\n"
    assert not cut_events(2 * two_lines + b"\n", is_whole=True).problem
