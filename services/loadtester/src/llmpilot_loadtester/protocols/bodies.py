"""The JSON of a request for one prompt.

Invariant: every request streams and asks for token counts; of TGIS, whose requests are protobuf, see `wire_tgis`.
Source: vllm/entrypoints/openai; text-generation-inference, router/src/lib.rs.
"""

import json

from llmpilot_loadtester.domain.spec import Protocol


def body_for(
    protocol: Protocol, *, prompt: str, served_model: str, output_tokens: int, fixed_output_length: bool
) -> bytes:
    """Return a request's body, greedy. fixed_output_length: replies do not end before; TGI cannot be told so.

    Raises ValueError for TGIS.
    """
    if protocol is Protocol.TGIS:
        raise ValueError("a request of TGIS is written by wire_tgis.write_single_request")
    if protocol is Protocol.TGI:
        return _packed({"inputs": prompt, "parameters": {"max_new_tokens": output_tokens, "details": True}})
    fields: dict[str, object] = {"model": served_model}
    if protocol is Protocol.OPENAI_CHAT:
        fields["messages"] = [{"role": "user", "content": prompt}]
    else:
        fields["prompt"] = prompt
    fields["max_tokens"] = output_tokens
    if fixed_output_length:
        fields |= {"min_tokens": output_tokens, "ignore_eos": True}
    return _packed(fields | {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}})


def _packed(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
