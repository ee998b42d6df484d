"""From a reply over HTTP to a Reply, for protocols whose tokens come as server-sent events.

Invariant: what a protocol reads out of the events decides tokens and finish; this module decides what else can be
wrong, in this order: no reply, a refusal, an error among the events, what is no event of the protocol, a reply that
broke off, a reply without a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime

import numpy as np

from llmpilot_contracts.record_schema import OK
from llmpilot_loadtester.protocols.http_reply import HttpReply, read_http
from llmpilot_loadtester.protocols.reply import CountTokens, Received, Reply
from llmpilot_loadtester.protocols.server_errors import (
    DISCONNECTED,
    MALFORMED,
    SERVER_ERROR,
    failed,
    meant_status,
    quoted,
    read_error,
    refusal,
    shortened,
)
from llmpilot_loadtester.protocols.sse import Events, cut_events
from llmpilot_loadtester.protocols.token_counts import Pieces, count

_OK_HTTP = 200


@dataclass(slots=True, kw_only=True)
class Story:
    """What the events of a reply say, in a protocol's words translated into the records'."""

    pieces: Pieces = field(default_factory=Pieces)
    text: list[str] = field(default_factory=list)
    reasoning_text: list[str] = field(default_factory=list)
    total: int | None = None
    """Output tokens of the whole reply, as the server counts."""
    input_tokens: int | None = None
    reasoning_tokens: int | None = None
    finish_reason: str | None = None
    served_model: str | None = None
    is_finished: bool = False
    """Whether the server said that this was all."""
    status: str = OK
    """Or what an error among the events means."""
    error: str = ""

    def fail(self, status: str, error: str) -> None:
        """Note what is wrong; the first problem counts."""
        if self.status == OK:
            self.status, self.error = status, shortened(error)

    def fail_as_told(self, data: bytes) -> None:
        """Note an event that the server calls an error."""
        self.fail(*(read_error(data) or (meant_status(SERVER_ERROR, quoted(data)), quoted(data))))

    def fail_undecoded(self, index: int, data: bytes, error: Exception) -> None:
        """Note an event that cannot be decoded: an error in other words, or nothing of the protocol."""
        problem = f"event {index + 1} is not of the protocol: {error}: {quoted(data)}"
        self.fail(*(read_error(data) or (MALFORMED, problem)))


TellStory = Callable[[Events, Callable[[], None]], Story]
"""Reads events; calls the second argument now and then, as `Received.pause`."""


def read_event_stream(received: Received, tell: TellStory, count_tokens: CountTokens | None) -> Reply:
    """Parse a reply; `tell` reads the events."""
    http = read_http(received)
    head = http.head
    if head is None:
        return _without_head(received, http)
    if head.status != _OK_HTTP:
        location = head.headers.get("location", "")
        reply = refusal(head.status, head.reason, http.body, location)
        return replace(reply, keeps_connection=http.keeps_connection, retry_after_seconds=_retry_after(http))
    if head.headers.get("content-encoding", "identity").lower() != "identity":
        encoding = head.headers["content-encoding"]
        return failed(MALFORMED, f"the body is packed ({encoding}), which was not asked for", http_status=head.status)
    events = cut_events(http.body, is_whole=http.is_whole, pause=received.pause)
    story = tell(events, received.pause)
    _judge(story, events, http)
    return _reply(story, events, http, received.stamps, count_tokens)


def _without_head(received: Received, http: HttpReply) -> Reply:
    if http.problem:
        return failed(MALFORMED, http.problem)
    if not any(received.parts):
        return failed(DISCONNECTED, "the connection ended before the reply began")
    return failed(DISCONNECTED, "the connection ended in the head of the reply")


def _judge(story: Story, events: Events, http: HttpReply) -> None:
    """Note what is wrong beyond what the events say."""
    if not any(events.data) and http.is_whole and story.status == OK:
        _judge_no_events(story, http.body)
    if http.problem or events.problem:
        story.fail(MALFORMED, http.problem or events.problem)
    if not story.is_finished:
        if http.is_whole:
            story.fail(DISCONNECTED, "the reply ended without a finish reason")
        else:
            story.fail(DISCONNECTED, f"the reply broke off after {len(story.pieces.events)} parts with tokens")


def _judge_no_events(story: Story, body: bytes) -> None:
    said = read_error(body)
    if said is not None:
        story.fail(*said)
    elif body.lstrip()[:1] in (b"{", b"["):
        story.fail(MALFORMED, 'the server ignored "stream": true and sent the reply as one JSON body')
    else:
        story.fail(MALFORMED, f"the body has no server-sent events: {quoted(body)}")


def _reply(
    story: Story, events: Events, http: HttpReply, stamps: Sequence[int], count_tokens: CountTokens | None
) -> Reply:
    counts = count(story.pieces, total=story.total, count_tokens=count_tokens)
    if not counts.events:
        story.fail(MALFORMED, "the reply has no token")
    parts = http.parts_of([events.ends[index] for index in counts.events])
    return Reply(
        status=story.status,
        error=story.error,
        http_status=http.head.status if http.head else None,
        chunk_stamps=[stamps[part] for part in parts.tolist()],
        chunk_tokens=counts.tokens,
        token_count_source=counts.source,
        input_tokens=story.input_tokens,
        reasoning_tokens=story.reasoning_tokens,
        finish_reason=story.finish_reason,
        served_model=story.served_model,
        text="".join(story.text),
        reasoning_text="".join(story.reasoning_text),
        keeps_connection=http.keeps_connection,
        coalesced_count=int(np.count_nonzero(np.diff(parts) == 0)),
    )


def _retry_after(http: HttpReply) -> float | None:
    """Return what a server asks to wait; a moment is told from the one that the server says it is now."""
    headers = {} if http.head is None else http.head.headers
    given = headers.get("retry-after", "")
    try:
        return max(float(int(given)), 0.0)
    except ValueError:
        pass
    except OverflowError:  # for ever
        return None
    try:
        wait = parsedate_to_datetime(given) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        return None
    return max(wait.total_seconds(), 0.0)
