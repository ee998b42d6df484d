"""What a user sends requests with: one connection, and replies that nobody parses before they are needed.

Invariant: whatever ends a request, be it the kill of its greenlet, it is recorded once, with what came of its reply.
"""

import time
from collections.abc import Callable, Mapping

import msgspec

from llmpilot_contracts.record_schema import OK
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.engine.connection import Connection, RawReply
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.protocols.reply import ProtocolAdapter, Received, Reply, go_on

_NANOS = 1_000_000_000
_SAID_BY_SERVER = frozenset({"out_of_memory", "invalid", "rejected", "server_error"})
_CUT_OFF = "cut off by the load tester before it was sent"

_encode = msgspec.json.Encoder().encode


class Generation:
    """What came of one request. Parsed when first looked at, and only then."""

    __slots__ = ("_adapter", "_reply", "raw")

    def __init__(self, raw: RawReply, adapter: ProtocolAdapter) -> None:
        self.raw = raw
        self._adapter = adapter
        self._reply: Reply | None = None

    @property
    def reply(self) -> Reply:
        """What the protocol makes of it."""
        if self._reply is None:
            self._reply = self._read(go_on)
        return self._reply

    def parse(self, pause: Callable[[], None]) -> None:
        """Parse it already, with pauses in which others may run; who looks at it meanwhile parses it for himself."""
        if self._reply is None:
            self._reply = self._read(pause)

    def _read(self, pause: Callable[[], None]) -> Reply:
        raw = self.raw
        received = Received(
            parts=raw.parts, stamps=raw.stamps, is_closed=raw.is_closed, exchange=raw.exchange, pause=pause
        )
        try:
            return self._adapter.read(received)
        except Exception as error:  # noqa: BLE001 a mistake in an adapter must not cost the record
            said = f"the load tester cannot read the reply ({type(error).__name__}: {error}); please report it"
            return Reply(status="malformed", error=said)

    @property
    def status(self) -> str:
        """Of record_schema.STATUSES. What the server said went wrong counts more than how the connection ended."""
        said = self.reply.status
        if self.raw.failure:
            return said if said in _SAID_BY_SERVER and self.raw.failure == "disconnected" else self.raw.failure
        return "malformed" if said == OK and not self.reply.chunk_stamps else said

    @property
    def error(self) -> str:
        """What went wrong, in a sentence; empty if nothing."""
        status = self.status
        if status == OK:
            return ""
        said = self.raw.error if status == self.raw.failure else self.reply.error
        return said or ("the reply has no tokens" if status == "malformed" else status)

    @property
    def text(self) -> str:
        """The answer, without what was reasoned before it."""
        return self.reply.text

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(self.reply.chunk_tokens)

    @property
    def ttft_seconds(self) -> float | None:
        """From sending to the first token; None: none came."""
        stamps = self.reply.chunk_stamps
        return (stamps[0] - self.raw.send_nanos) / _NANOS if stamps else None

    @property
    def itl_seconds(self) -> float | None:
        """Mean time between two tokens, those of the first part excluded; None: all came in one part."""
        stamps, counts = self.reply.chunk_stamps, self.reply.chunk_tokens
        return (stamps[-1] - stamps[0]) / sum(counts[1:]) / _NANOS if len(stamps) > 1 else None

    @property
    def end_to_end_seconds(self) -> float:
        """From sending to the end of the reply."""
        return (self.raw.end_nanos - self.raw.send_nanos) / _NANOS


Record = Callable[[Generation], None]
"""Takes a generation when its request has ended; must not block."""


class LlmClient:
    """Sends one request at a time."""

    def __init__(self, target: Target, adapter: ProtocolAdapter, reader: Reader) -> None:
        self._adapter = adapter
        self._connection = Connection(target, adapter, reader)

    @property
    def is_busy(self) -> bool:
        """Whether a request was sent and its reply is not whole."""
        return self._connection.is_busy

    @property
    def send_nanos(self) -> int:
        """When the last request was sent; 0: it was not, or not yet."""
        reply = self._connection.last_reply
        return reply.send_nanos if reply is not None else 0

    def send(self, body: bytes, request_id: str, record: Record) -> Generation:
        """Send a request; returns when it has ended, however it did, and was given to `record`. Blocks the greenlet."""
        connection = self._connection
        try:
            raw = connection.request(body, request_id)
        except BaseException:  # its greenlet was killed: what came until then counts
            record(Generation(_cut_off(connection.last_reply), self._adapter))
            raise
        generation = Generation(raw, self._adapter)
        record(generation)
        return generation

    def close(self) -> None:
        """Give the socket back."""
        self._connection.close()


def _cut_off(raw: RawReply | None) -> RawReply:
    raw = raw or RawReply()
    if not raw.send_nanos:
        raw.send_nanos = raw.end_nanos = time.time_ns()
        raw.failure, raw.error = "cancelled", _CUT_OFF
    return raw


def request_body(target: Target, fields: Mapping[str, object]) -> bytes:
    """Return the JSON of a request with what a load test needs filled in: model, streaming, the count of tokens.

    Raises TypeError for TGIS, whose requests are protobuf.
    """
    if target.protocol is Protocol.TGIS:
        raise TypeError("a request of tgis is bytes: llmpilot_loadtester.wire_tgis.write_single_request makes one")
    if target.protocol is Protocol.TGI:
        parameters = fields.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters: must be a mapping, is {parameters!r}")
        return _encode({**fields, "parameters": {"details": True, **parameters}})
    model = {"model": target.served_model} if target.served_model else {}
    return _encode({**model, "stream": True, "stream_options": {"include_usage": True}, **fields})
