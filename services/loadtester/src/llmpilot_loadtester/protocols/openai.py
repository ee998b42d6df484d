"""OpenAI's completions and chat completions, as vLLM, SGLang, llama.cpp and `transformers serve` stream them.

Invariant: a token counts when its text comes, through whatever channel: answer, reasoning or tool call. A chunk that
only names the role, a usage report, [DONE] and empty text are no tokens.
Source: https://platform.openai.com/docs/api-reference/chat-streaming; vllm/entrypoints/openai.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.protocols.event_stream_reply import Story, read_event_stream
from llmpilot_loadtester.protocols.http1 import HttpAdapter, endpoint_path
from llmpilot_loadtester.protocols.reply import CountTokens, paced
from llmpilot_loadtester.protocols.server_errors import (
    DECODE_ERRORS,
    SERVER_ERROR,
    read_error,
)
from llmpilot_loadtester.protocols.sse import Events
from llmpilot_loadtester.protocols.token_counts import End

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
_DONE = b"[DONE]"
_FINISH_REASONS = {"stop": "stop", "length": "length", "error": "error", "tool_calls": "stop", "function_call": "stop"}


class _TokenDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: _TokenDetails | None = None
    reasoning_tokens: int | None = None
    """SGLang's place for it."""


class _CompletionChoice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    index: int = 0

    def texts(self) -> tuple[str, str]:
        """Return what is new of the answer and of the reasoning before it."""
        return self.text or "", ""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _ChatChoice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None
    index: int = 0

    def texts(self) -> tuple[str, str]:
        """Return what is new of the answer, tool calls included, and of the reasoning before it."""
        delta = self.delta
        if delta is None:
            return "", ""
        answer = delta.content or ""
        if delta.tool_calls or delta.function_call:
            calls = [each.function for each in delta.tool_calls or ()] + [delta.function_call]
            answer += "".join((call.name or "") + (call.arguments or "") for call in calls if call is not None)
        return answer, delta.reasoning or delta.reasoning_content or ""


class _CompletionEvent(msgspec.Struct):
    choices: list[_CompletionChoice] | None = None
    usage: _Usage | None = None


class _ChatEvent(msgspec.Struct):
    choices: list[_ChatChoice] | None = None
    usage: _Usage | None = None


class _Identity(msgspec.Struct):
    model: str | None = None


_decode_identity = msgspec.json.Decoder(_Identity).decode
_COMPLETIONS = msgspec.json.Decoder(_CompletionEvent)
_CHAT = msgspec.json.Decoder(_ChatEvent)


def openai_completions(target: Target, count_tokens: CountTokens | None) -> HttpAdapter:
    """Return the adapter of /v1/completions."""
    return _adapter(target, COMPLETIONS_PATH, _COMPLETIONS, count_tokens)


def openai_chat(target: Target, count_tokens: CountTokens | None) -> HttpAdapter:
    """Return the adapter of /v1/chat/completions."""
    return _adapter(target, CHAT_PATH, _CHAT, count_tokens)


def _adapter(
    target: Target, endpoint: str, decoder: "msgspec.json.Decoder[Any]", count_tokens: CountTokens | None
) -> HttpAdapter:
    read = partial(read_event_stream, tell=partial(_tell, decoder=decoder), count_tokens=count_tokens)
    return HttpAdapter(target, endpoint_path(target.url, endpoint), read)


def _tell(events: Events, pause: Callable[[], None], *, decoder: "msgspec.json.Decoder[Any]") -> Story:
    """Read the events up to [DONE], or to the first that is an error or not of the protocol."""
    story = Story()
    decode = decoder.decode
    for index, data in enumerate(paced(events.data, pause)):
        if not data:
            continue
        if data.endswith(_DONE) and data.strip() == _DONE:
            story.is_finished = True
            break
        if events.names.get(index) == "error":
            story.fail_as_told(data)
            break
        try:
            event = decode(data)
        except DECODE_ERRORS as error:
            story.fail_undecoded(index, data, error)
            break
        if event.usage is not None:
            _add_usage(story, event.usage)
        if event.choices:
            _add_choices(story, index, event)
        elif event.usage is None and (said := read_error(data)):
            story.fail(*said)
            break
    story.served_model = _model(events)
    return story


def _add_choices(story: Story, index: int, event: _CompletionEvent | _ChatEvent) -> None:
    pieces = story.pieces
    reported = None if event.usage is None else event.usage.completion_tokens
    for choice in event.choices or ():
        answer, reasoning = choice.texts()
        if answer or reasoning:
            pieces.events.append(index)
            pieces.texts.append(reasoning + answer if reasoning else answer)
            pieces.owners.append(choice.index)
            pieces.reported.append(reported)
            if answer:
                story.text.append(answer)
            if reasoning:
                story.reasoning_text.append(reasoning)
        if choice.finish_reason is not None:
            story.finish_reason = _FINISH_REASONS.get(choice.finish_reason, "other")
            story.is_finished = True
            if story.finish_reason == "error":
                story.fail(SERVER_ERROR, "the server ended the reply with an error that it does not name")
            if not answer and not reasoning:
                is_stop = story.finish_reason == "stop"
                pieces.ends.append(End(event=index, owner=choice.index, reported=reported, is_stop=is_stop))


def _add_usage(story: Story, usage: _Usage) -> None:
    story.input_tokens = usage.prompt_tokens
    story.total = usage.completion_tokens
    details = usage.completion_tokens_details
    story.reasoning_tokens = usage.reasoning_tokens if details is None else details.reasoning_tokens


def _model(events: Events) -> str | None:
    """Return who the first event says it is from; it is not worth the time to ask every event."""
    for data in events.data:
        if data:
            try:
                return _decode_identity(data).model
            except DECODE_ERRORS:
                return None
    return None
