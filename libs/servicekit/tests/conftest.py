import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue
from prometheus_client import CollectorRegistry

from llmpilot_servicekit.nats_server import NatsServer, start_nats_server
from llmpilot_servicekit.server import Registration, serve
from llmpilot_servicekit.settings import ServiceSettings

SERVICE = "test.Echo"


@pytest.fixture(autouse=True)
def _global_logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server of one service with one method per call kind, and a channel to it."""

    address: str
    metrics_address: str
    channel: grpc.aio.Channel
    registry: CollectorRegistry
    stop: asyncio.Event

    async def call(self, kind: str, text: str = "", **options: Any) -> list[str]:
        """Call the method of that kind with one message; give the texts that came back."""
        method = getattr(self.channel, kind)(
            f"/{SERVICE}/{kind}",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        message = StringValue(value=text)
        call = method(iter([message]) if kind.startswith("stream") else message, **options)
        if kind.endswith("unary"):
            return [(await call).value]
        return [answer.value async for answer in call]

    async def finished_calls(self, kind: str, code: str) -> None:
        """Wait until the server has counted one call: a status reaches the client before that."""
        labels = {"method": f"/{SERVICE}/{kind}", "code": code}
        async with asyncio.timeout(20):
            while self.registry.get_sample_value("llmpilot_grpc_requests_total", labels) != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
def serving(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Running]]:
    """Serve one servicer method, as a method of one call kind, for as long as the context is open."""

    @asynccontextmanager
    async def start(
        servicer: Callable[..., Any], *, kind: str = "unary_unary", **settings: Any
    ) -> AsyncIterator[Running]:
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            servicer, StringValue.FromString, StringValue.SerializeToString
        )
        generic = grpc.method_handlers_generic_handler(SERVICE, {kind: handler})
        address_file = tmp_path / "address.json"
        stop, registry = asyncio.Event(), CollectorRegistry()
        service_settings = ServiceSettings(listen="127.0.0.1:0", address_file=address_file, **settings)
        async with asyncio.TaskGroup() as tasks:
            server = tasks.create_task(
                serve(
                    service_settings,
                    registrations=[Registration(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))],
                    stop=stop,
                    registry=registry,
                )
            )
            try:
                async with asyncio.timeout(20):
                    while not address_file.exists() and not server.done():  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                addresses = json.loads(address_file.read_text())
                async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
                    yield Running(
                        address=addresses["grpc"],
                        metrics_address=addresses["metrics"],
                        channel=channel,
                        registry=registry,
                        stop=stop,
                    )
            finally:
                stop.set()

    return start


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Start real nats-servers on one store; the second takes the port of the first when told so."""
    started: list[NatsServer] = []

    def start(port: int | None = None) -> NatsServer:
        started.append(start_nats_server(tmp_path / "nats", port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop()
