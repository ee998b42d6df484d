"""What is made of the events of OpenAI's endpoints. Expected counts are by hand."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for
from llmpilot_loadtester.protocols.reply import CountTokens, Received, Reply
from llmpilot_loadtester.protocols.reply_tokens import count_tokens_with
from llmpilot_loadtester.protocols.token_counts import spread

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

DONE = b"data: [DONE]\n\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Event = dict[str, object]


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(text: str | None, finish: str | None = None, *, tokens: int | None = None, index: int = 0) -> bytes:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 3, "completion_tokens": tokens}}
    choice = {"index": index, "text": text, "finish_reason": finish}
    return event({"model": "m", "choices": [choice], **usage})


def delta(finish: str | None = None, **fields: object) -> bytes:
    return event({"model": "m", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


def usage(tokens: int, **more: object) -> bytes:
    return event({"model": "m", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, **more}})


def chunks(parts: Sequence[bytes]) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]


def read(
    *parts: bytes,
    protocol: Protocol = Protocol.OPENAI_COMPLETIONS,
    count_tokens: CountTokens | None = None,
    is_whole: bool = True,
    head: bytes = CHUNKED,
) -> Reply:
    """Each part with a stamp: 1, 2, 3 ...; the head has 0."""
    sent = [head, *chunks(parts)] + ([b"0\r\n\r\n"] if is_whole else [])
    received = Received(parts=sent, stamps=list(range(len(sent))), is_closed=not is_whole)
    return adapter_for(Target(url="http://x", protocol=protocol), count_tokens=count_tokens).read(received)


def read_chat(*parts: bytes) -> Reply:
    return read(*parts, protocol=Protocol.OPENAI_CHAT)


def tokens_of(reply: Reply) -> list[tuple[int, int]]:
    return list(zip(reply.chunk_stamps, reply.chunk_tokens, strict=True))


def test_a_reply_with_a_token_a_chunk() -> None:
    reply = read(piece("a"), piece("b", "length"), usage(2), DONE)
    assert tokens_of(reply) == [(1, 1), (2, 1)]
    assert (reply.status, reply.token_count_source, reply.input_tokens) == ("ok", "server", 3)
    assert (reply.finish_reason, reply.served_model, reply.text) == ("length", "m", "ab")
    assert reply.keeps_connection
    assert reply.coalesced_count == 0


def test_roles_empty_text_usage_and_done_are_no_tokens() -> None:
    reply = read_chat(delta(role="assistant", content=""), delta(content="Hi"), delta("stop"), usage(1), DONE)
    assert tokens_of(reply) == [(2, 1)]


def test_the_first_token_is_of_whatever_channel() -> None:
    call = [{"index": 0, "function": {"name": "f", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": "{}"}}]
    reply = read_chat(
        delta(role="assistant"),
        delta(reasoning_content="hm"),
        delta(reasoning="so"),
        delta(content="ok"),
        delta(tool_calls=call),
        delta("tool_calls", tool_calls=more),
        usage(5, completion_tokens_details={"reasoning_tokens": 2}),
        DONE,
    )
    assert tokens_of(reply) == [(stamp, 1) for stamp in (2, 3, 4, 5, 6)]
    assert (reply.text, reply.reasoning_text, reply.reasoning_tokens) == ("okf{}", "hmso", 2)
    assert reply.finish_reason == "stop"


def test_continuous_usage_says_how_many_tokens_a_chunk_has() -> None:
    """The third chunk's two tokens have no text yet: they come with the fourth's."""
    reply = read(
        piece("a", tokens=1), piece("bcd", tokens=4), piece("", tokens=6), piece("é", tokens=7),
        piece("", "stop", tokens=8), usage(8), DONE,
    )  # fmt: skip
    assert tokens_of(reply) == [(1, 1), (2, 3), (4, 3), (5, 1)]
    assert reply.token_count_source == "server"  # noqa: S105 tokens of text


def test_continuous_usage_is_of_each_choice() -> None:
    """As vLLM: of the choice alone, and the sum at the end."""
    reply = read(
        piece("a", tokens=1), piece("x", tokens=1, index=1), piece("bc", "length", tokens=3),
        piece("yz", "length", tokens=3, index=1), usage(6), DONE,
    )  # fmt: skip
    assert tokens_of(reply) == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_tokens_beyond_the_chunks_go_to_them_by_length() -> None:
    """17 tokens of 85 characters: one for 5."""
    parts = [piece("a" * 5), *(piece("b" * 20) for _ in range(4))]
    reply = read(*parts, piece("", "length"), usage(17), DONE)
    assert list(reply.chunk_tokens) == [1, 4, 4, 4, 4]
    assert reply.token_count_source == "server"  # noqa: S105


def test_the_end_of_the_text_is_a_token_of_its_own_time_if_the_server_counts_it() -> None:
    assert tokens_of(read(piece("a"), piece("b"), piece("", "stop"), usage(3), DONE)) == [(1, 1), (2, 1), (3, 1)]
    assert tokens_of(read(piece("a"), piece("b"), piece("", "stop"), usage(2), DONE)) == [(1, 1), (2, 1)]
    assert tokens_of(read(piece("", "stop"), usage(1), DONE)) == [(1, 1)]


def test_tokens_that_never_have_a_text_come_with_the_end() -> None:
    """As seen of vLLM with random weights: parts of characters that never become one."""
    reply = read(piece(""), piece(""), piece("", "length"), usage(3), DONE)
    assert (reply.status, tokens_of(reply)) == ("ok", [(3, 3)])


def test_fewer_tokens_than_chunks_count_a_chunk_each() -> None:
    reply = read(piece("a"), piece("b"), piece("c", "length"), usage(2), DONE)
    assert (list(reply.chunk_tokens), reply.token_count_source) == ([1, 1, 1], "chunks")


def test_without_usage_a_chunk_counts_as_a_token_unless_a_tokenizer_is_given() -> None:
    parts = (piece("one two "), piece("three", "length"), DONE)
    plain = read(*parts)
    counted = read(*parts, count_tokens=lambda texts: [len(text.split()) for text in texts])
    assert (list(plain.chunk_tokens), plain.token_count_source) == ([1, 1], "chunks")
    assert (list(counted.chunk_tokens), counted.token_count_source) == ([2, 1], "tokenizer")


def test_a_tokenizer_divides_what_the_server_counts() -> None:
    """By length it would be 6 and 6."""
    parts = (piece("a b c d e "), piece("fffffffghi", "length"), usage(12), DONE)
    assert list(read(*parts, count_tokens=lambda _: [10, 2]).chunk_tokens) == [10, 2]
    assert list(read(*parts).chunk_tokens) == [6, 6]


def test_choices_are_texts_of_their_own_for_a_tokenizer() -> None:
    seen = []

    def one_each(texts: Sequence[str]) -> Sequence[int]:
        seen.append("".join(texts))
        return [len(text) for text in texts]

    reply = read(
        piece("ab"), piece("x", index=1), piece("c", "stop"), piece("y", "stop", index=1), DONE, count_tokens=one_each
    )
    assert sorted(seen) == ["abc", "xy"]
    assert list(reply.chunk_tokens) == [2, 1, 1, 1]


def test_tokens_that_came_in_one_part_are_told() -> None:
    reply = read(piece("a"), piece("b") + piece("c") + piece("d"), piece("e", "length"), DONE)
    assert tokens_of(reply) == [(1, 1), (2, 1), (2, 1), (2, 1), (3, 1)]
    assert reply.coalesced_count == 2


@pytest.mark.parametrize(
    ("given_reason", "reason"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("abort", "other"), ("content_filter", "other")],
)
def test_finish_reasons_are_those_of_the_records(given_reason: str, reason: str) -> None:
    assert read(piece("a", given_reason), DONE).finish_reason == reason


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (event({"error": {"message": "boom", "code": 500}}), "server_error", "boom"),
        (event({"error": {"message": "too long", "code": 400}}), "invalid", "too long"),
        (event({"error": "later"}), "server_error", "later"),
        (event({"object": "error", "message": "old vLLM", "code": 429}), "rejected", "old vLLM"),
        (event({"error": {"message": "CUDA out of memory. Tried"}}), "out_of_memory", "CUDA out of memory. Tried"),
        (b'event: error\ndata: "who knows"\n\n', "server_error", "'\"who knows\"'"),
        (b'error: {"code":500,"message":"llama"}\n\n', "server_error", "llama"),
        (piece("x", "error"), "server_error", "the server ended the reply with an error that it does not name"),
    ],
)
def test_an_error_in_the_stream_keeps_the_tokens_before_it(error: bytes, status: str, text: str) -> None:
    reply = read(piece("a"), error, DONE)
    assert (reply.status, reply.error) == (status, text)
    assert reply.chunk_stamps[0] == 1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("400 Bad Request", "invalid"), ("401 Unauthorized", "invalid"), ("403 Forbidden", "invalid"),
        ("404 Not Found", "invalid"), ("413 Content Too Large", "invalid"), ("422 x", "invalid"),
        ("408 Request Timeout", "timeout"), ("504 Gateway Timeout", "timeout"), ("429 Too Many Requests", "rejected"),
        ("503 Service Unavailable", "rejected"), ("500 Internal Server Error", "server_error"),
        ("502 Bad", "server_error"),
    ],
)  # fmt: skip
def test_http_statuses_are_those_of_the_records(line: str, status: str) -> None:
    body = b'{"error": {"message": "why"}}'
    head = f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    reply = read(head=head + body, is_whole=False)
    assert (reply.status, reply.error, reply.http_status) == (status, f"HTTP {line}: why", int(line[:3]))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ("Retry-After: 7", 7),
        ("Retry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\nDate: Fri, 31 Dec 1999 23:59:29 GMT", 30),
        ("Retry-After: Fri, 31 Dec 1999 23:59:59 GMT", None),
        ("Retry-After: soon", None),
        ("Retry-After: " + "9" * 400, None),
        ("Retry-After: " + "9" * 5000, None),
        ("X: y", None),
    ],
)
def test_retry_after_is_seconds_or_a_moment(headers: str, seconds: float | None) -> None:
    reply = read(head=f"HTTP/1.1 429 x\r\n{headers}\r\nContent-Length: 0\r\n\r\n".encode(), is_whole=False)
    assert reply.retry_after_seconds == seconds


def test_out_of_memory_is_told_apart_whatever_the_http_status() -> None:
    body = b'{"detail": "torch.OutOfMemoryError: no"}'
    reply = read(head=b"HTTP/1.1 500 x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), is_whole=False)
    assert reply.status == "out_of_memory"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"choices": [{"text": "a"}]}', 'the server ignored "stream": true and sent the reply as one JSON body'),
        (b"<html>hello</html>", "the body has no server-sent events: '<html>hello</html>'"),
        (b"", "the body has no server-sent events: ''"),
        (b"data: {\n\n", "event 1 is not of the protocol"),
        (event({"choices": [{"text": 5}]}), "event 1 is not of the protocol: Expected `str | null`, got `int`"),
        (event([1]), "event 1 is not of the protocol"),
        (b"data: \xff\xfe{\n\n", "event 1 is not of the protocol"),
        (piece("", "length") + DONE, "the reply has no token"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "event 1 is not of the protocol"),
    ],
)
def test_what_is_no_stream_of_tokens_is_malformed(body: bytes, problem: str) -> None:
    reply = read(head=b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), is_whole=False)
    assert reply.status == "malformed"
    assert reply.error.startswith(problem)
    assert len(reply.error) <= 300


def test_a_packed_body_is_malformed() -> None:
    reply = read(head=CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n")
    assert (reply.status, reply.error) == ("malformed", "the body is packed (gzip), which was not asked for")


def test_a_reply_that_ends_without_a_reason_is_disconnected() -> None:
    assert read(piece("a"), is_whole=False).error == "the reply broke off after 1 parts with tokens"
    assert read(piece("a"), is_whole=False).status == "disconnected"
    assert read(piece("a")).status == "disconnected"
    assert read(piece("a"), DONE, is_whole=False).status == "ok"
    assert read(piece("a", "length"), is_whole=False).status == "ok"
    assert read(head=b"", is_whole=False).error == "the connection ended before the reply began"
    assert read(head=b"HTTP/1.1 2", is_whole=False).error == "the connection ended in the head of the reply"


def test_a_redirect_says_where_to() -> None:
    reply = read(head=b"HTTP/1.1 307 x\r\nLocation: http://y/\r\nContent-Length: 0\r\n\r\n", is_whole=False)
    assert (reply.status, reply.error) == ("invalid", "HTTP 307 x: redirects to http://y/: give that URL as the target")


def test_a_long_reply_is_read_with_pauses_in_which_others_may_run() -> None:
    """Three times over the events, a pause after some hundred each; a short reply has none."""
    for token_count, least_count in ((200, 0), (5000, 3 * 5000 // 500)):
        pauses: list[None] = []
        content = b"".join(chunks([*[piece("a")] * (token_count - 1), piece("b", "length"), usage(token_count), DONE]))
        received = Received(
            parts=[CHUNKED, content, b"0\r\n\r\n"], stamps=[0, 1, 2], pause=partial(pauses.append, None)
        )
        reply = adapter_for(Target(url="http://x"), count_tokens=None).read(received)
        assert (reply.status, sum(reply.chunk_tokens)) == ("ok", token_count)
        assert len(pauses) >= least_count
        assert bool(pauses) == bool(least_count)


def test_an_event_of_ten_megabytes_is_read() -> None:
    reply = read(piece("x" * 10_000_000), piece("y", "length"), DONE)
    assert (reply.status, len(reply.text)) == ("ok", 10_000_001)


WHOLE = CHUNKED + b"".join(
    chunks([
        piece("a", tokens=1), piece("", tokens=2), piece("bc é", tokens=4) + piece("d", "stop", tokens=5),
        usage(5), DONE,
    ])
) + b"0\r\n\r\n"  # fmt: skip


@given(st.lists(st.integers(1, len(WHOLE) - 1), unique=True))
def test_any_cut_of_the_bytes_gives_the_same_reply_and_the_stamps_of_the_parts(places: list[int]) -> None:
    bounds = [0, *sorted(places), len(WHOLE)]
    parts = [WHOLE[start:end] for start, end in pairwise(bounds)]
    adapter = adapter_for(Target(url="http://x"), count_tokens=None)
    exchange = adapter.exchange()
    assert [exchange.feed(part) for part in parts] == [False] * (len(parts) - 1) + [True]
    reply = adapter.read(Received(parts=parts, stamps=bounds[1:]))
    ends = [WHOLE.index(b"\n\n", WHOLE.index(b'"text": "%b' % text)) + 2 for text in (b"a", b"bc", b"d")]
    assert (reply.status, list(reply.chunk_tokens), reply.text) == ("ok", [1, 3, 1], "abc éd")
    assert list(reply.chunk_stamps) == [min(bound for bound in bounds if bound >= end) for end in ends]


@given(st.binary(max_size=300), st.booleans(), st.sampled_from(list(Protocol)[:3]))
def test_no_bytes_raise(noise: bytes, is_framed: bool, protocol: Protocol) -> None:
    head = CHUNKED if is_framed else b""
    adapter = adapter_for(Target(url="http://x", protocol=protocol), count_tokens=None)
    exchange = adapter.exchange()
    exchange.feed(head + noise)
    reply = adapter.read(Received(parts=[head + noise], stamps=[1], is_closed=True))
    assert reply.status in STATUSES
    assert (reply.status == "ok") == (reply.error == "")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 200))
def test_shares_add_up_are_at_least_1_and_follow_the_weights(weights: list[int], more: int) -> None:
    total = len(weights) + more
    shares = spread(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 1
    order = sorted(range(len(weights)), key=lambda index: (weights[index], index))
    assert all(shares[small] <= shares[large] + 1 for small, large in pairwise(order))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_weights_that_add_up_to_the_total_are_the_shares(weights: list[int]) -> None:
    assert spread(sum(weights), weights) == weights


def word_tokenizer() -> str:
    """Words of letters and single signs; a [BOS] before every text."""
    vocabulary = {"[UNK]": 0, "[BOS]": 1, "hello": 2, "world": 3, "!": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 no secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer.enable_truncation(2)
    return str(tokenizer.to_str())


def test_a_word_over_two_parts_counts_once_and_the_beginning_of_text_never() -> None:
    count_tokens = count_tokens_with(word_tokenizer())
    assert list(count_tokens(["hel", "lo wor", "ld", "!", " "])) == [0, 1, 1, 1, 0]
    assert list(count_tokens(["", ""])) == [0, 0]
    assert list(count_tokens([])) == []


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"reply_tokenizer_json: is no tokenizer.json"):
        count_tokens_with("{}")
