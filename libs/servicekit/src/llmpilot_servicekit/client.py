"""The synchronous gRPC client, for command lines.

Invariant: no call waits for ever, and nothing but a PilotError leaves the context of a channel.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.status import error_from_rpc

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # services are reached directly
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
)
_POLL_SECONDS = 0.05


class _TimeoutRequired(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def _checked(self, continuation: Callable[[Any, Any], Any], call: grpc.ClientCallDetails, request: Any) -> Any:
        if call.timeout is None:
            raise TypeError(f"{call.method}: pass timeout=, in seconds")
        return continuation(call, request)

    intercept_unary_unary = _checked  # type: ignore[assignment]
    intercept_unary_stream = _checked  # type: ignore[assignment]
    intercept_stream_unary = _checked  # type: ignore[assignment]
    intercept_stream_stream = _checked  # type: ignore[assignment]


@contextmanager
def connect(address: str) -> Iterator[grpc.Channel]:
    """Open a channel to "host:port". Calls need `timeout=`; an RpcError leaves the context as a PilotError."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            yield grpc.intercept_channel(channel, _TimeoutRequired())
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=address) from error


def wait_until_serving(address: str, timeout_seconds: float) -> None:
    """Return once the health service at `address` says SERVING; UnavailableError after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    last = "no answer"
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        while (left_seconds := deadline - time.monotonic()) > 0:
            try:
                answer = check(health_pb2.HealthCheckRequest(), timeout=left_seconds, wait_for_ready=True)
            except grpc.RpcError as error:
                last = error.details() or error.code().name
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = "it says NOT_SERVING"
            time.sleep(min(_POLL_SECONDS, left_seconds))
    raise UnavailableError(f"{address} is not serving after {timeout_seconds:g} s ({last}): look at its log")
