"""Looks at a target before it is put under load: whether it can be reached, lets us in, and what it serves.

Invariant: whatever is wrong becomes one sentence that says what to do, within the limits of the target's timeouts.
"""

from collections.abc import Sequence
from dataclasses import replace

from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.engine.connection import Connection, RawReply
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.protocols.adapters import (
    ServedModels,
    model_info_adapter,
    models_exchange,
    models_request,
    read_model_info,
    read_models,
)
from llmpilot_loadtester.protocols.http_reply import read_http
from llmpilot_loadtester.protocols.reply import Exchange, ProtocolAdapter, Received, Reply
from llmpilot_loadtester.worker_messages import Probed

_LIMIT_SECONDS = 15.0
_OK_HTTP = 200


_NOT_LET_IN = {401, 403}
_NOT_ITS_BUSINESS = {404, 405, 501}
_PORT_HINT = ": check scheme, host and port of the URL"


class _ModelsAdapter:
    """A ProtocolAdapter of one request, which asks what a server serves."""

    preface = b""

    def renew(self) -> None:
        """Forget nothing."""

    def write(self, body: bytes, request_id: str) -> Sequence[bytes]:  # noqa: ARG002 it has no id
        """Return the request as it is."""
        return (body,)

    def exchange(self) -> Exchange:
        """Watch for the end of the reply."""
        return models_exchange()

    def between(self, part: bytes) -> bytes | None:  # noqa: ARG002 whatever it is
        """Expect nothing."""
        return None

    def read(self, received: Received) -> Reply:  # noqa: ARG002 see `read_models`
        """Say nothing: it is no reply with tokens."""
        return Reply()


def probe(target: Target, reader: Reader) -> Probed:
    """Connect, and ask what is served. Blocks the greenlet."""
    request = models_request(target)
    if request is None:
        return _judge_tgis(target, _ask(target, reader, model_info_adapter(target), b""))
    return _judge(target, _ask(target, reader, _ModelsAdapter(), request))


def _ask(target: Target, reader: Reader, adapter: ProtocolAdapter, request: bytes) -> RawReply:
    limit_seconds = min(target.request_timeout_seconds, _LIMIT_SECONDS)
    connection = Connection(replace(target, request_timeout_seconds=limit_seconds), adapter, reader)
    try:
        return connection.request(request, "probe")
    finally:
        connection.close()


def _judge_tgis(target: Target, reply: RawReply) -> Probed:
    """TGIS has one model and does not name it; a server without ModelInfo can still be put under load."""
    known = (target.served_model,) if target.served_model else ()
    call = read_model_info(reply.exchange)
    if call is None:
        hint = _PORT_HINT if reply.parts else ""
        return Probed(problem=f"{reply.error or f'{target.url} does not answer in HTTP/2'}{hint}")
    if call.is_let_in:
        return Probed(served_models=known, simulated=call.is_simulated)
    told = "does not accept the API key" if target.api_key else "wants an API key"
    return Probed(problem=f"{target.url} {told} ({call.problem}): give the right one with --api-key")


def _judge(target: Target, reply: RawReply) -> Probed:
    received = Received(parts=reply.parts, stamps=reply.stamps, is_closed=reply.is_closed)
    head = read_http(received).head
    if reply.failure and head is None:
        return Probed(problem=f"{reply.error}{_PORT_HINT if reply.exchange else ''}")
    if head is None:
        return Probed(problem=f"{target.url} does not answer in HTTP/1.1{_PORT_HINT}")
    if head.status in _NOT_LET_IN:
        told = "does not accept the API key" if target.api_key else "wants an API key"
        return Probed(problem=f"{target.url} {told} (HTTP {head.status}): give the right one with --api-key")
    return _choose(target, read_models(received), head.status)


def _choose(target: Target, served: ServedModels, http_status: int) -> Probed:
    """A server that does not list its models can still be put under load, if we are told the name."""
    known = (target.served_model,) if target.served_model else ()
    if served.problem and http_status in _NOT_ITS_BUSINESS | {_OK_HTTP}:
        if known or target.protocol is Protocol.TGI:
            return Probed(served_models=known, simulated=served.is_simulated)
        where = "is the path in the URL right? If it does not list its models" if http_status != _OK_HTTP else "if not"
        return Probed(
            problem=f"{target.url} gives no list of models ({served.problem}): {where}, name one with --served-model"
        )
    if served.problem:
        return Probed(problem=f"{target.url} is not ready ({served.problem}): wait until it serves, then try again")
    if not (served.names or known):
        return Probed(problem=f"{target.url} serves no model: load one, or name one with --served-model")
    return Probed(served_models=served.names or known, simulated=served.is_simulated)
