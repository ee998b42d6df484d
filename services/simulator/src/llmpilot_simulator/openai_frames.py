"""The frames and bodies of OpenAI replies, as vLLM sends them.

Invariant: everything about a frame that does not change from token to token is made once per choice; all is ASCII.
Source: vllm/entrypoints/openai/{completion,chat_completion}/serving.py, the stream generators.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from json.encoder import encode_basestring_ascii as quoted

from llmpilot_simulator.generation import Generation

FINGERPRINT = "simulated"
_DONE = "data: [DONE]\n\n"
_ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, object]:
    """Return the body of an error."""
    kind = _ERROR_TYPES.get(status) or HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def finish_reason(generation: Generation) -> str:
    """Return why a reply ended, in OpenAI's words."""
    return "length" if generation.finish_reason == "length" else "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What all frames of a reply say about it."""

    id: str
    created_seconds: int
    model: str

    def head(self, kind: str) -> str:
        """Return the beginning of a frame's JSON object, without what follows `choices`."""
        return (
            f'{{"id":{quoted(self.id)},"object":"{kind}","created":{self.created_seconds},'
            f'"model":{quoted(self.model)},"system_fingerprint":"{FINGERPRINT}","choices":['
        )

    def body(self, kind: str, choices: Sequence[object], usage: object) -> dict[str, object]:
        """Return the body of a reply that is sent whole."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_seconds,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": usage,
        }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class OpenAiChoice:
    """The frames of one choice: a ChoiceFrames.

    before, after: the JSON around the text, inside the choice; they differ between the two endpoints.
    """

    def __init__(
        self,
        *,
        head: str,
        before: str,
        after: str,
        texts: Sequence[str],
        generation: Generation,
        has_continuous_usage: bool,
    ) -> None:
        self._texts = texts
        self._last_index = len(texts) - 1
        self._input_tokens = generation.input_tokens
        self._has_usage = has_continuous_usage
        self._head = f"data: {head}{before}"
        ending = "}\n\n" if not has_continuous_usage else ""
        self._middle = f'{after}null,"stop_reason":null}}]{ending}'
        stop_reason = json.dumps(generation.stop_sequence)
        self._end = f'{after}"{finish_reason(generation)}","stop_reason":{stop_reason}}}]{ending}'

    def tokens(self, first_index: int, count: int) -> str:
        """Return the frame of some tokens."""
        text = self._texts[first_index] if count == 1 else "".join(self._texts[first_index : first_index + count])
        sent = first_index + count
        tail = self._end if sent > self._last_index else self._middle
        if not self._has_usage:
            return f"{self._head}{quoted(text)}{tail}"
        prompt_tokens = self._input_tokens
        return (
            f'{self._head}{quoted(text)}{tail},"usage":{{"prompt_tokens":{prompt_tokens},'
            f'"total_tokens":{prompt_tokens + sent},"completion_tokens":{sent}}}}}\n\n'
        )


class OpenAiReply:
    """The frames that choices share: a ReplyFrames."""

    def __init__(self, *, head: str, opening: str, usage: dict[str, int] | None) -> None:
        self._head = head
        self._opening = opening
        self._usage = usage

    def opening(self) -> str:
        """Return the role chunks of a chat."""
        return self._opening

    def closing(self) -> str:
        """Return the token counts, if they were asked for, and the end mark."""
        if self._usage is None:
            return _DONE
        return f'data: {self._head}],"usage":{json.dumps(self._usage)}}}\n\n{_DONE}'

    def failure(self, message: str) -> str:
        """Return an error in the middle of a stream."""
        return f"data: {json.dumps(error_body(500, message))}\n\n{_DONE}"


def completion_choice(
    identity: Identity, index: int, texts: Sequence[str], generation: Generation, *, has_continuous_usage: bool
) -> OpenAiChoice:
    """Return the frames of a choice of /v1/completions."""
    return OpenAiChoice(
        head=identity.head("text_completion"),
        before=f'{{"index":{index},"text":',
        after=',"logprobs":null,"finish_reason":',
        texts=texts,
        generation=generation,
        has_continuous_usage=has_continuous_usage,
    )


def chat_choice(
    identity: Identity, index: int, texts: Sequence[str], generation: Generation, *, has_continuous_usage: bool
) -> OpenAiChoice:
    """Return the frames of a choice of /v1/chat/completions."""
    return OpenAiChoice(
        head=identity.head("chat.completion.chunk"),
        before=f'{{"index":{index},"delta":{{"content":',
        after='},"logprobs":null,"finish_reason":',
        texts=texts,
        generation=generation,
        has_continuous_usage=has_continuous_usage,
    )


def role_frames(identity: Identity, choice_count: int, *, prompt_tokens: int | None) -> str:
    """Return the chunks that say who speaks, before any token. prompt_tokens: for continuous usage, None without."""
    usage = "" if prompt_tokens is None else f',"usage":{json.dumps(usage_of(prompt_tokens, 0))}'
    head = identity.head("chat.completion.chunk")
    return "".join(
        f'data: {head}{{"index":{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,'
        f'"finish_reason":null}}]{usage}}}\n\n'
        for index in range(choice_count)
    )


def completion_body(
    identity: Identity, texts: Sequence[Sequence[str]], generations: Sequence[Generation], usage: dict[str, int]
) -> dict[str, object]:
    """Return the body of a whole reply of /v1/completions."""
    choices = [
        {
            "index": index,
            "text": "".join(pieces),
            "logprobs": None,
            "finish_reason": finish_reason(generation),
            "stop_reason": generation.stop_sequence,
        }
        for index, (pieces, generation) in enumerate(zip(texts, generations, strict=True))
    ]
    return identity.body("text_completion", choices, usage)


def chat_body(
    identity: Identity, texts: Sequence[Sequence[str]], generations: Sequence[Generation], usage: dict[str, int]
) -> dict[str, object]:
    """Return the body of a whole reply of /v1/chat/completions."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(pieces)},
            "logprobs": None,
            "finish_reason": finish_reason(generation),
            "stop_reason": generation.stop_sequence,
        }
        for index, (pieces, generation) in enumerate(zip(texts, generations, strict=True))
    ]
    return identity.body("chat.completion", choices, usage)
