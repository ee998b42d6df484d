"""Which protocol speaks to a target, and how it is asked what it serves."""

from dataclasses import dataclass

import msgspec

from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.protocols.grpc_messages import read_status
from llmpilot_loadtester.protocols.http1 import HttpExchange, endpoint_path, request_head
from llmpilot_loadtester.protocols.http2 import Stream
from llmpilot_loadtester.protocols.http_reply import read_http
from llmpilot_loadtester.protocols.openai import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    MODELS_PATH,
    openai_chat,
    openai_completions,
)
from llmpilot_loadtester.protocols.reply import CountTokens, Exchange, ProtocolAdapter, Received
from llmpilot_loadtester.protocols.server_errors import DECODE_ERRORS, DISCONNECTED, quoted, refusal
from llmpilot_loadtester.protocols.tgi import GENERATE_PATH, INFO_PATH, tgi
from llmpilot_loadtester.protocols.tgis import MODEL_INFO_PATH, DecodeResponse, TgisAdapter, TgisMessage

SIMULATED_HEADER = "x-llm-pilot-simulated"
_OK_HTTP = 200
_ENDPOINTS = {
    Protocol.OPENAI_COMPLETIONS: (COMPLETIONS_PATH, MODELS_PATH),
    Protocol.OPENAI_CHAT: (CHAT_PATH, MODELS_PATH),
    Protocol.TGI: (GENERATE_PATH, INFO_PATH),
}


def adapter_for(
    target: Target, *, count_tokens: CountTokens | None, decode_tgis: DecodeResponse | None = None
) -> ProtocolAdapter:
    """Return the adapter of one connection.

    Raises InvalidInputError for headers that cannot be sent, ValueError for TGIS without `decode_tgis`.
    """
    match target.protocol:
        case Protocol.OPENAI_COMPLETIONS:
            return openai_completions(target, count_tokens)
        case Protocol.OPENAI_CHAT:
            return openai_chat(target, count_tokens)
        case Protocol.TGI:
            return tgi(target, count_tokens)
        case Protocol.TGIS:
            if decode_tgis is None:
                raise ValueError("TGIS needs wire_tgis.decode_generation_response")
            return TgisAdapter(target, count_tokens, decode_tgis)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModels:
    """What a server says that it serves."""

    names: tuple[str, ...] = ()
    is_simulated: bool = False
    """Whether it says of itself that it is a simulator."""
    problem: str = ""
    """Why it could not be asked; empty: it could."""
    status: str = "ok"
    """Of record_schema.STATUSES, with the problem."""


class _Model(msgspec.Struct):
    id: str = ""
    simulated: bool = False


class _Models(msgspec.Struct):
    data: list[_Model] = []
    model_id: str = ""
    """TGI's."""


_decode = msgspec.json.Decoder(_Models).decode


def models_request(target: Target) -> bytes | None:
    """Return the bytes that ask what a server serves; None: TGIS has one model and does not name it."""
    if target.protocol is Protocol.TGIS:
        return None
    generation, models = _ENDPOINTS[target.protocol]
    path, question_mark, query = endpoint_path(target.url, generation).partition("?")
    return request_head("GET", target, _beside(path, generation, models) + question_mark + query, accept="*/*")


def models_exchange() -> Exchange:
    """Begin to watch the reply to `models_request`."""
    return HttpExchange()


def read_models(received: Received) -> ServedModels:
    """Parse the reply to `models_request`."""
    http = read_http(received)
    if http.head is None or not http.is_whole:
        return ServedModels(status=DISCONNECTED, problem=http.problem or "the connection ended before the reply did")
    head = http.head
    is_simulated = head.headers.get(SIMULATED_HEADER) == "true"
    if head.status != _OK_HTTP:
        refused = refusal(head.status, head.reason, http.body, head.headers.get("location", ""))
        return ServedModels(is_simulated=is_simulated, status=refused.status, problem=refused.error)
    try:
        models = _decode(http.body)
    except DECODE_ERRORS:
        return ServedModels(
            is_simulated=is_simulated, status="malformed", problem=f"no list of models: {quoted(http.body)}"
        )
    names = [*(model.id for model in models.data), models.model_id]
    return ServedModels(
        names=tuple(name for name in names if name),
        is_simulated=is_simulated or any(model.simulated for model in models.data),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfoCall:
    """How a TGIS server took the call that asks about its model."""

    is_let_in: bool
    """Whether it did not refuse who asks."""
    is_simulated: bool
    problem: str
    """What gRPC says of the call; empty: it went well."""


def model_info_adapter(target: Target) -> ProtocolAdapter:
    """Return what asks a TGIS server about its model; the body of the request is empty."""
    return TgisAdapter(target, None, _no_message, path=MODEL_INFO_PATH)


def read_model_info(exchange: object) -> ModelInfoCall | None:
    """Read the call from its exchange; None: the server does not speak gRPC, or said nothing."""
    if not isinstance(exchange, Stream) or exchange.problem or not (exchange.headers or exchange.trailers):
        return None
    headers = dict(exchange.headers or ()) | dict(exchange.trailers or ())
    wrong = read_status(exchange)
    problem = wrong[1] if wrong else ""
    return ModelInfoCall(
        is_let_in=not problem.startswith(("UNAUTHENTICATED", "PERMISSION_DENIED", "HTTP 401", "HTTP 403")),
        is_simulated=headers.get(SIMULATED_HEADER) == "true",
        problem=problem,
    )


def _no_message(data: bytes) -> TgisMessage:
    raise ValueError(f"{len(data)} bytes of something else")


def _beside(path: str, generation: str, models: str) -> str:
    """Return the path of the list of models, next to that of the generation endpoint."""
    if path.endswith(generation):
        return path.removesuffix(generation) + models
    rest = "/" + generation.removeprefix("/").partition("/")[2]
    return path.removesuffix(rest) + "/models"
