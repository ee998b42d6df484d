"""The gRPC server: TGIS's interface, health and reflection on one port.

Invariant: health says SERVING only while calls are let in.
"""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.interceptor import CallInterceptor
from llmpilot_simulator.clock import NANOS_PER_SECOND
from llmpilot_simulator.http_exchange import Service
from llmpilot_simulator.servicer import TgisServicer

_MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""The default of tonic, the gRPC library of TGIS."""
_LONGEST_CALL_SECONDS = 24 * 3600.0
"""TGIS sets calls no deadline."""


class GrpcServer:
    """Listens from `start` to `stop`."""

    def __init__(self, service: Service, registry: CollectorRegistry) -> None:
        self._service = service
        self._registry = registry

    async def start(self, address: str) -> str:
        """Listen; returns the address with the real port. Raises PreconditionError where it is taken."""
        self._server = server = grpc.aio.server(
            interceptors=[CallInterceptor(registry=self._registry, default_deadline_seconds=_LONGEST_CALL_SECONDS)],
            options=[
                ("grpc.so_reuseport", 0),  # else a second process would silently share the port
                ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
            ],
        )
        registration = TgisServicer(self._service).registration()
        registration.add(server)
        self._health = _Health(self._service)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [registration.service_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise PreconditionError(f"cannot listen on {address}: {error}; give gRPC another address") from error
        await server.start()
        for name in ("", registration.service_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_seconds: float) -> None:
        """Accept nothing more, let calls end within the grace period, then close."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)


class _Health(health.aio.HealthServicer):
    """Health that knows of a slow start."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service

    async def Check(  # noqa: N802 named by the proto
        self,
        request: health_pb2.HealthCheckRequest,
        context: "grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]",
    ) -> health_pb2.HealthCheckResponse:
        """Say whether calls are let in."""
        if self._service.gate.is_ready(self._service.server.now_nanos() / NANOS_PER_SECOND):
            return await super().Check(request, context)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
