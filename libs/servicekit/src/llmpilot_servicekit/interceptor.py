"""The one interceptor of every server: errors to statuses, a deadline for calls without one, request metrics.

Invariant: a caller learns of an unexpected exception only an incident id; the log has the traceback under that id.
Servicers are asynchronous; a streaming one may be an async generator or write to its context.
"""

from __future__ import annotations  # grpc's classes are generic only to type checkers

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram

from llmpilot_contracts.errors import PilotError
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.status import sole_cause, to_status

log = get_logger(__name__)

_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Respond: TypeAlias = Callable[[Any, _Context], Awaitable[Any]]

_HANDLERS: dict[tuple[bool, bool], Callable[..., _Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call of one server; its metrics live in that server's registry."""

    def __init__(self, *, registry: CollectorRegistry, default_deadline_seconds: float) -> None:
        self._default_deadline_seconds = default_deadline_seconds
        self._requests = Counter("llmpilot_grpc_requests", "Finished calls.", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "llmpilot_grpc_request_seconds",
            "Duration of a call, streams until their end.",
            ["method"],
            registry=registry,
            buckets=_BUCKETS_SECONDS,
        )
        self._wrapped: dict[str, tuple[_Handler, _Handler]] = {}
        self._running_count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no call is being answered; what was answered may not have been read."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Give the wrapped handler of the method, built on its first call; None: no such method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        kind = (bool(handler.request_streaming), bool(handler.response_streaming))
        servicer_method: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        respond: _Respond = servicer_method
        if kind == (False, False):
            respond = self._with_deadline(servicer_method)
        elif handler.response_streaming:
            respond = _with_writes(servicer_method)
        return _HANDLERS[kind](
            self._observed(method, respond), handler.request_deserializer, handler.response_serializer
        )

    def _observed(self, method: str, respond: _Respond) -> _Respond:
        observe_seconds = self._seconds.labels(method).observe
        count_ok = self._requests.labels(method, "OK").inc

        async def call(request: Any, context: _Context) -> Any:
            start_seconds = time.perf_counter()
            code: str | None = None
            try:
                with self._running():
                    return await respond(request, context)
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except grpc.aio.InternalError as error:  # gRPC cannot write: the client is gone
                code = "CANCELLED"
                raise asyncio.CancelledError from error
            except Exception as error:  # noqa: BLE001 nothing of the inside may leak to the caller
                status = _status_of(error, method)
                code = status.code.name
                await _abort(context, status)
            finally:
                observe_seconds(time.perf_counter() - start_seconds)
                code = code or getattr(context.code(), "name", None)  # set by the servicer; None: OK
                if code is None or code == "OK":
                    count_ok()
                else:
                    self._requests.labels(method, code).inc()

        return call

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._running_count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running_count -= 1
            if not self._running_count:
                self._idle.set()

    def _with_deadline(self, respond: _Respond) -> _Respond:
        limit_seconds = self._default_deadline_seconds

        async def respond_in_time(request: Any, context: _Context) -> Any:
            if context.time_remaining() is not None:
                return await respond(request, context)
            try:
                async with asyncio.timeout(limit_seconds) as limit:
                    return await respond(request, context)
            except TimeoutError:
                if not limit.expired():
                    raise
            return await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"took longer than {limit_seconds:g} s, the limit of calls without a deadline: set a deadline",
            )

        return respond_in_time


async def _abort(context: _Context, status: grpc.Status) -> None:
    """End a call with a status, or without one where the client goes before it has read what was sent earlier."""
    try:
        await context.abort_with_status(status)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _with_writes(respond: Callable[[Any, _Context], Any]) -> _Respond:
    async def write_all(request: Any, context: _Context) -> None:
        responses = respond(request, context)
        if not hasattr(responses, "__aiter__"):
            await responses  # the servicer writes to the context itself
            return
        async with aclosing(responses):
            async for response in responses:
                await context.write(response)

    return write_all


def _status_of(error: Exception, method: str) -> grpc.Status:
    cause = sole_cause(error)
    if isinstance(cause, PilotError):
        return to_status(cause)
    incident = secrets.token_hex(6)
    log.error("call failed", method=method, incident=incident, exc_info=error)
    return to_status(PilotError(f"internal error, incident {incident}: the service's log says more under this id"))
