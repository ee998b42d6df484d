"""TGI's /generate_stream: an event per token, the last one with the whole text and the details.

Invariant: every event with a `token` is one token, as TGI counts. A special one (the end of the text) adds no text,
yet it was generated and came at its time: it counts, as it does in TGI's `generated_tokens`. A token whose text is
empty, as it is part of a character, counts with the event that brings the character.
Source: text-generation-inference, router/src/{lib,server}.rs.
"""

from collections.abc import Callable
from functools import partial

import msgspec

from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.protocols.event_stream_reply import Story, read_event_stream
from llmpilot_loadtester.protocols.http1 import HttpAdapter, endpoint_path
from llmpilot_loadtester.protocols.reply import CountTokens, paced
from llmpilot_loadtester.protocols.server_errors import (
    DECODE_ERRORS,
    read_error,
)
from llmpilot_loadtester.protocols.sse import Events
from llmpilot_loadtester.protocols.token_counts import End

GENERATE_PATH = "/generate_stream"
INFO_PATH = "/info"
_FINISH_REASONS = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


class _Token(msgspec.Struct):
    text: str = ""
    special: bool = False


class _Details(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None
    input_length: int | None = None
    prefill: list[msgspec.Raw] | None = None
    """The input's tokens, of servers before `input_length`; empty: they were not asked for."""


class _Event(msgspec.Struct):
    token: _Token | None = None
    generated_text: str | None = None
    details: _Details | None = None


_decode = msgspec.json.Decoder(_Event).decode


def tgi(target: Target, count_tokens: CountTokens | None) -> HttpAdapter:
    """Return the adapter of /generate_stream."""
    read = partial(read_event_stream, tell=_tell, count_tokens=count_tokens)
    return HttpAdapter(target, endpoint_path(target.url, GENERATE_PATH), read)


def _tell(events: Events, pause: Callable[[], None]) -> Story:
    story = Story()
    token_count = 0
    for index, data in enumerate(paced(events.data, pause)):
        if not data:
            continue
        if events.names.get(index) == "error":
            story.fail_as_told(data)
            break
        try:
            event = _decode(data)
        except DECODE_ERRORS as error:
            story.fail_undecoded(index, data, error)
            break
        if event.token is not None:
            token_count += 1
            _add_token(story, index, event, event.token, token_count)
        elif said := read_error(data):
            story.fail(*said)
            break
        if event.generated_text is not None:
            _finish(story, event.details)
    return story


def _add_token(story: Story, index: int, event: _Event, token: _Token, token_count: int) -> None:
    pieces = story.pieces
    if token.text and not token.special:
        pieces.events.append(index)
        pieces.texts.append(token.text)
        pieces.owners.append(0)
        pieces.reported.append(token_count)
        story.text.append(token.text)
    elif event.generated_text is not None:
        pieces.ends.append(End(event=index, owner=0, reported=token_count, is_stop=True))


def _finish(story: Story, details: _Details | None) -> None:
    story.is_finished = True
    if details is None:
        return
    if details.finish_reason is not None:
        story.finish_reason = _FINISH_REASONS.get(details.finish_reason, "other")
    story.total = details.generated_tokens
    story.input_tokens = details.input_length
    if details.input_length is None and details.prefill:
        story.input_tokens = len(details.prefill)
