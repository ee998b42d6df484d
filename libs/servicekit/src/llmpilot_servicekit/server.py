"""Runs a gRPC service: metrics, health, reflection, its address file, its background work, a graceful end.

Invariant: health says SERVING only between the moment every port is bound and the moment the end begins.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from llmpilot_contracts.errors import InvalidInputError, PilotError, PreconditionError
from llmpilot_servicekit.address import split_address
from llmpilot_servicekit.interceptor import CallInterceptor
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.settings import ServiceSettings
from llmpilot_servicekit.status import sole_cause

log = get_logger(__name__)

_UNREAD_SECONDS = 1.0
_EXIT_ERROR = 1
_EXIT_INVALID_INPUT = 2
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Registration:
    """A gRPC service to serve."""

    service_name: str
    """Full name, e.g. "llmpilot.recommendation.v1.RecommendationService"."""
    add: Callable[[grpc.aio.Server], None]
    """Adds the servicer to the server."""


async def serve(
    settings: ServiceSettings,
    *,
    registrations: Sequence[Registration],
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    finishing: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    stop: asyncio.Event | None = None,
    registry: CollectorRegistry | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`, then let calls in flight end within the grace period.

    Background coroutines are cancelled after the last call; one that fails ends the service with its error. Finishing
    ones begin with the end, and must limit themselves: the background is there until the last of them is over.
    """
    stop = stop or asyncio.Event()
    registry = registry or CollectorRegistry()
    try:
        with _set_by_signals(stop):
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(work()) for work in background]
                last: list[asyncio.Task[None]] = []
                async with _serving(settings, registrations, registry):
                    await stop.wait()
                    last += [tasks.create_task(work()) for work in finishing]
                await asyncio.gather(*last)
                for task in running:
                    task.cancel()
    except BaseExceptionGroup as group:
        raise sole_cause(group) from None


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run `main` and give the exit code: 0, 1 after a PilotError, 2 after an InvalidInputError, 130 after Ctrl-C."""
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except (PilotError, ExceptionGroup) as error:
        cause = sole_cause(error)
        if not isinstance(cause, PilotError):
            raise
        lines = cause.violations if isinstance(cause, InvalidInputError) else (cause,)
        sys.stderr.write("".join(f"error: {line}\n" for line in lines))
        return _EXIT_INVALID_INPUT if isinstance(cause, InvalidInputError) else _EXIT_ERROR
    return 0


@asynccontextmanager
async def _serving(
    settings: ServiceSettings, registrations: Sequence[Registration], registry: CollectorRegistry
) -> AsyncIterator[None]:
    calls = CallInterceptor(registry=registry, default_deadline_seconds=settings.default_deadline_seconds)
    server = grpc.aio.server(
        interceptors=[calls],
        options=[
            ("grpc.keepalive_time_ms", 60_000),  # a client whose host is gone is noticed
            ("grpc.so_reuseport", 0),  # else a second process would silently share the port
            ("grpc.max_receive_message_length", settings.max_request_bytes),
        ],
    )
    ProcessCollector(registry=registry)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = [registration.service_name for registration in registrations]
    for registration in registrations:
        registration.add(server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    async with _metrics_served(settings.metrics_listen, registry) as metrics_address:
        address = _bind(server, settings.listen)
        try:
            await server.start()
            for name in ("", *names):
                await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
            with _address_written(settings.address_file, {"grpc": address, "metrics": metrics_address}):
                log.info("serving", grpc=address, metrics=metrics_address, services=names)
                yield
        finally:
            await health_servicer.enter_graceful_shutdown()
            await _stop(server, calls, settings.shutdown_grace_seconds)
            log.info("stopped", grpc=address)


async def _stop(server: grpc.aio.Server, calls: CallInterceptor, grace_seconds: float) -> None:
    """Let calls end within the grace period. Who does not read an answer that is complete cannot make it so long."""

    async def cut_off() -> None:
        await calls.wait_idle()
        await asyncio.sleep(_UNREAD_SECONDS)
        await server.stop(None)

    async with asyncio.TaskGroup() as tasks:
        cutting = tasks.create_task(cut_off())
        await server.stop(grace_seconds)
        cutting.cancel()


def _bind(server: grpc.aio.Server, address: str) -> str:
    host, port = split_address(address)
    try:
        # A trial first: grpc prints to stderr when it cannot bind, and hides why.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
        bound_port = server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        raise _not_bound(address, "LLMPILOT_LISTEN", error) from error
    return _with_port(address, bound_port)


@asynccontextmanager
async def _metrics_served(address: str, registry: CollectorRegistry) -> AsyncIterator[str]:
    host, port = split_address(address)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise _not_bound(address, "LLMPILOT_METRICS_LISTEN", error) from error
    try:
        yield _with_port(address, server.server_port)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


def _not_bound(address: str, variable: str, error: Exception) -> PilotError:
    return PreconditionError(
        f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}; "
        f"set {variable} to another address (port 0: any free one)"
    )


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"


@contextmanager
def _address_written(path: Path | None, addresses: dict[str, str]) -> Iterator[None]:
    if path is None:
        yield
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(addresses), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise PreconditionError(
            f"cannot write {path}: {error.strerror}; set LLMPILOT_ADDRESS_FILE to a writable path"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _set_by_signals(stop: asyncio.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
