"""What is made of the events of TGI. Expected counts are by hand."""

import json

import pytest

from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for
from llmpilot_loadtester.protocols.reply import Received, Reply

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def token(text: str, *, special: bool = False, details: object = None, whole: str | None = None) -> bytes:
    content = {"token": {"text": text, "special": special}, "generated_text": whole, "details": details}
    return b"data:" + json.dumps(content).encode() + b"\n\n"


def read(*parts: bytes, is_whole: bool = True) -> Reply:
    """Each part with a stamp: 1, 2, 3 ..."""
    sent = [HEAD, *(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)] + ([b"0\r\n\r\n"] if is_whole else [])
    received = Received(parts=sent, stamps=list(range(len(sent))), is_closed=not is_whole)
    return adapter_for(Target(url="http://x", protocol=Protocol.TGI), count_tokens=None).read(received)


def details(reason: str, tokens: int, **more: object) -> dict[str, object]:
    return {"finish_reason": reason, "generated_tokens": tokens, **more}


def test_the_end_of_the_text_is_a_token_without_text() -> None:
    reply = read(
        token("a"),
        token(" b"),
        token("</s>", special=True, whole="a b", details=details("eos_token", 3, input_length=9)),
    )
    assert (list(reply.chunk_stamps), list(reply.chunk_tokens)) == ([1, 2, 3], [1, 1, 1])
    assert (reply.text, reply.finish_reason, reply.input_tokens) == ("a b", "stop", 9)
    assert (reply.status, reply.token_count_source) == ("ok", "server")


def test_a_part_of_a_character_counts_with_the_character() -> None:
    reply = read(
        token("a"), token(""), token("é"), token("b", whole="aéb", details=details("length", 4, prefill=[{}, {}]))
    )
    assert (list(reply.chunk_stamps), list(reply.chunk_tokens)) == ([1, 3, 4], [1, 2, 1])
    assert (reply.finish_reason, reply.input_tokens) == ("length", 2)


def test_a_reply_without_details_is_whole_all_the_same() -> None:
    reply = read(token("a"), token("b", whole="ab"))
    assert (reply.status, reply.finish_reason, sum(reply.chunk_tokens)) == ("ok", None, 2)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"error": "Model is overloaded", "error_type": "overloaded"}, "rejected"),
        ({"error": "unhealthy", "error_type": "unhealthy"}, "rejected"),
        ({"error": "Input validation error: x", "error_type": "validation"}, "invalid"),
        (
            {"error": "Request failed during generation: CUDA out of memory", "error_type": "generation"},
            "out_of_memory",
        ),
        ({"error": "Request failed during generation: x", "error_type": "generation"}, "server_error"),
        ({"error": "Incomplete generation", "error_type": "incomplete_generation"}, "server_error"),
    ],
)
@pytest.mark.parametrize("name", [b"", b"event: error\n"])
def test_an_error_event_means_what_its_type_says(error: dict[str, str], status: str, name: bytes) -> None:
    reply = read(token("a"), name + b"data:" + json.dumps(error).encode() + b"\n\n")
    assert (reply.status, reply.error) == (status, error["error"])
    assert list(reply.chunk_tokens) == [1]


def test_a_reply_that_breaks_off_is_disconnected() -> None:
    assert read(token("a"), is_whole=False).status == "disconnected"
    assert read(token("a")).status == "disconnected"


@pytest.mark.parametrize("content", [b'{"token": {"text": 5}}', b'{"token": "a"}', b"nothing"])
def test_events_of_another_kind_are_malformed(content: bytes) -> None:
    assert read(b"data:" + content + b"\n\n").status == "malformed"
