"""TGIS over gRPC: fmaas.GenerationService/GenerateStream.

Invariant: the first message has the input's token count and is no token; every later one says how many tokens there
are so far, so the tokens of each message are exact. Messages are decoded by a function that is given, as protobuf stays
outside.
Source: proto/fmaas/generation.proto; IBM/text-generation-inference; vllm-tgis-adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from urllib.parse import urlsplit

import numpy as np

from llmpilot_contracts.record_schema import OK
from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.protocols.grpc_messages import Messages, pack_message, read_messages, read_status
from llmpilot_loadtester.protocols.http1 import USER_AGENT, endpoint_path, sent_headers
from llmpilot_loadtester.protocols.http2 import PREFACE, Connection, Stream, pack_headers
from llmpilot_loadtester.protocols.reply import CountTokens, Exchange, Received, Reply, paced
from llmpilot_loadtester.protocols.server_errors import DISCONNECTED, MALFORMED, SERVER_ERROR, failed
from llmpilot_loadtester.protocols.token_counts import End, Pieces, count

GENERATE_STREAM_PATH = "/fmaas.GenerationService/GenerateStream"
MODEL_INFO_PATH = "/fmaas.GenerationService/ModelInfo"


class StopReason(IntEnum):
    """As fmaas.StopReason."""

    NOT_FINISHED = 0
    MAX_TOKENS = 1
    EOS_TOKEN = 2
    CANCELLED = 3
    TIME_LIMIT = 4
    STOP_SEQUENCE = 5
    TOKEN_LIMIT = 6
    ERROR = 7


_FINISH_REASONS: dict[int, str] = {
    StopReason.MAX_TOKENS: "length",
    StopReason.TOKEN_LIMIT: "length",
    StopReason.EOS_TOKEN: "stop",
    StopReason.STOP_SEQUENCE: "stop",
    StopReason.ERROR: "error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TgisMessage:
    """What counts of a fmaas.GenerationResponse."""

    input_token_count: int
    """0 but in the first message."""
    generated_token_count: int
    """So far."""
    text: str
    stop_reason: int


DecodeResponse = Callable[[bytes], TgisMessage]
"""Raises ValueError for bytes that are no fmaas.GenerationResponse."""


class TgisAdapter:
    """A ProtocolAdapter."""

    preface = PREFACE

    def __init__(
        self,
        target: Target,
        count_tokens: CountTokens | None,
        decode: DecodeResponse,
        *,
        path: str = GENERATE_STREAM_PATH,
    ) -> None:
        split = urlsplit(target.url)
        own = [(name.lower(), value) for name, value in sent_headers(target)]
        self._packed_headers = pack_headers(
            [
                (":method", "POST"),
                (":scheme", "https" if split.scheme in ("grpcs", "https") else "http"),
                (":path", endpoint_path(target.url, path)),
                (":authority", split.netloc.rpartition("@")[2]),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("grpc-accept-encoding", "identity"),
                ("user-agent", USER_AGENT),
                *(header for header in own if header[0] not in ("te", "content-type", "host", "user-agent")),
            ]
        )
        self._count_tokens = count_tokens
        self._decode = decode
        self._connection = Connection()

    def renew(self) -> None:
        """Begin anew, with a connection that nothing was said on."""
        self._connection = Connection()

    def write(self, body: bytes, request_id: str) -> Sequence[bytes]:
        """Return the frames of a call; body: a serialized fmaas.SingleGenerationRequest."""
        packed = self._packed_headers + pack_headers([("x-request-id", request_id)])
        return self._connection.open(packed, pack_message(body))

    def exchange(self) -> Exchange:
        """Begin to watch the call that was written last."""
        return self._connection.stream()

    def between(self, part: bytes) -> bytes | None:
        """Answer what a server says of the connection."""
        return self._connection.between(part)

    def read(self, received: Received) -> Reply:
        """Parse a reply; TypeError without its exchange."""
        if not received.parts:
            return failed(DISCONNECTED, "the connection ended before the reply began")
        stream = received.exchange
        if not isinstance(stream, Stream):
            raise TypeError("a reply of HTTP/2 is read with its exchange: set Received.exchange")
        messages = read_messages(received, stream)
        try:
            decoded = [self._decode(content) for content in paced(messages.contents, received.pause)]
        except ValueError as error:
            return failed(MALFORMED, f"a message is no fmaas.GenerationResponse: {error}")
        return self._reply(decoded, messages, received, stream)

    def _reply(self, decoded: Sequence[TgisMessage], messages: Messages, received: Received, stream: Stream) -> Reply:
        pieces = read_pieces(decoded)
        reported = [message.generated_token_count for message in decoded]
        counts = count(pieces, total=max(reported, default=0) or None, count_tokens=self._count_tokens)
        reason = next((message.stop_reason for message in reversed(decoded) if message.stop_reason), 0)
        finish_reason = _FINISH_REASONS.get(reason, "other") if reason else None
        status, error = read_status(stream) or (OK, "")
        if status == OK:
            status, error = _judge(messages, has_tokens=bool(counts.events), finish_reason=finish_reason)
        parts = [messages.parts[index] for index in counts.events]
        return Reply(
            status=status,
            error=error,
            chunk_stamps=[received.stamps[part] for part in parts],
            chunk_tokens=counts.tokens,
            token_count_source=counts.source,
            input_tokens=next((each.input_token_count for each in decoded if each.input_token_count), None),
            finish_reason=finish_reason,
            text="".join([message.text for message in decoded if message.generated_token_count]),
            keeps_connection=stream.keeps_connection and stream.is_ended,
            coalesced_count=int(np.count_nonzero(np.diff(parts) == 0)),
        )


def _judge(messages: Messages, *, has_tokens: bool, finish_reason: str | None) -> tuple[str, str]:
    """Return what is wrong with a call that gRPC says is right."""
    if messages.problem:
        return MALFORMED, messages.problem
    if finish_reason == "error":
        return SERVER_ERROR, "the server ended the reply with an error that it does not name"
    return (OK, "") if has_tokens else (MALFORMED, "the reply has no token")


def read_pieces(messages: Sequence[TgisMessage]) -> Pieces:
    """Return the texts of messages that have new tokens, and the end that has a token and no text."""
    pieces = Pieces()
    before = 0
    for index, message in enumerate(messages):
        reported = message.generated_token_count
        if reported <= before:  # the input's message, or text that was held back of tokens that were told
            continue
        if message.text:
            before = reported
            pieces.events.append(index)
            pieces.texts.append(message.text)
            pieces.owners.append(0)
            pieces.reported.append(reported)
        elif message.stop_reason:
            pieces.ends.append(End(event=index, owner=0, reported=reported, is_stop=True))
    return pieces
