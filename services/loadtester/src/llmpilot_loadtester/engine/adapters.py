"""Makes the adapters of a process's connections: what they share is made once.

Invariant: what a target does not need is not loaded, be it a tokenizer or the protobuf of TGIS.
"""

from collections.abc import Callable

from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.adapters import adapter_for
from llmpilot_loadtester.protocols.reply import CountTokens, ProtocolAdapter


def new_adapter_for(target: Target, reply_tokenizer_json: str = "") -> Callable[[], ProtocolAdapter]:
    """Return what makes the adapter of one more connection.

    reply_tokenizer_json: counts the tokens of replies whose server does not; empty: a token a part.
    """
    count_tokens: CountTokens | None = None
    if reply_tokenizer_json:
        from llmpilot_loadtester.protocols.reply_tokens import count_tokens_with  # noqa: PLC0415 rarely

        count_tokens = count_tokens_with(reply_tokenizer_json)
    if target.protocol is not Protocol.TGIS:
        return lambda: adapter_for(target, count_tokens=count_tokens)
    from llmpilot_loadtester.wire_tgis import decode_generation_response  # noqa: PLC0415

    return lambda: adapter_for(target, count_tokens=count_tokens, decode_tgis=decode_generation_response)
