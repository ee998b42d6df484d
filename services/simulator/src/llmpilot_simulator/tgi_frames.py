"""The frames and bodies of TGI replies.

Invariant: one event per token, whatever it is sent with; an error is an event too, inside a stream whose status is 200.
Source: text-generation-inference, router/src/{lib,server,infer/mod}.rs.
"""

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted

from llmpilot_simulator.generation import Generation

ERROR_TYPES = {
    422: "validation",
    424: "generation",
    429: "overloaded",
    503: "unhealthy",
}
_FINISH_REASONS = {"length": "length", "eos": "eos_token", "stop": "stop_sequence"}
_TOKEN_ID = 0
"""No vocabulary stands behind a simulated token, nor a probability: `logprob` is null."""


def error_body(status: int, message: str) -> dict[str, object]:
    """Return the body of an error."""
    return {"error": message, "error_type": ERROR_TYPES.get(status, "generation")}


def generation_failure(message: str) -> str:
    """Return TGI's words for a failure of the model server."""
    return f"Request failed during generation: Server error: {message}"


class TgiStream:
    """The frames of a streamed reply: a ChoiceFrames and a ReplyFrames."""

    def __init__(
        self, *, texts: Sequence[str], generation: Generation, prompt: str, has_details: bool, seed: int | None
    ) -> None:
        self._texts = texts
        self._last_index = len(texts) - 1
        ending: dict[str, object] = {"generated_text": prompt + "".join(texts), "details": None}
        if has_details:
            ending["details"] = details(generation, seed) | {"input_length": generation.input_tokens}
        special = json.dumps(generation.finish_reason == "eos")  # the token that ends a text has none itself
        self._end = f'"logprob":null,"special":{special}}},{json.dumps(ending, separators=(",", ":"))[1:]}'

    def tokens(self, first_index: int, count: int) -> str:
        """Return the events of some tokens."""
        if count == 1:
            return self._event(first_index)
        return "".join(map(self._event, range(first_index, first_index + count)))

    def _event(self, index: int) -> str:
        ending = '"logprob":null,"special":false},"generated_text":null,"details":null}'
        if index == self._last_index:
            ending = self._end
        return f'data:{{"index":{index + 1},"token":{{"id":{_TOKEN_ID},"text":{quoted(self._texts[index])},{ending}\n\n'

    def opening(self) -> str:
        """Return nothing: the first event is the first token."""
        return ""

    def closing(self) -> str:
        """Return nothing: the last event is the last token."""
        return ""

    def failure(self, message: str) -> str:
        """Return an error in the middle of a stream."""
        return error_event(424, generation_failure(message))


def error_event(status: int, message: str) -> str:
    """Return an error as an event."""
    return f"data:{json.dumps(error_body(status, message), separators=(',', ':'))}\n\n"


def details(generation: Generation, seed: int | None) -> dict[str, object]:
    """Return what a client learns of a reply when it asks for details."""
    return {
        "finish_reason": _FINISH_REASONS[generation.finish_reason],
        "generated_tokens": len(generation.pieces),
        "seed": seed,
    }


def whole_body(
    *, texts: Sequence[str], generation: Generation, prompt: str, has_details: bool, seed: int | None
) -> dict[str, object]:
    """Return the body of a reply that is sent whole."""
    body: dict[str, object] = {"generated_text": prompt + "".join(texts)}
    if has_details:
        tokens = [{"id": _TOKEN_ID, "text": text, "logprob": None, "special": False} for text in texts]
        body["details"] = details(generation, seed) | {"prefill": [], "tokens": tokens}
    return body
