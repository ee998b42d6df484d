"""The HTTP server: OpenAI's and TGI's endpoints, health and metrics on one port.

Invariant: every response to an HTTP request says that the server is simulated, errors included.
"""

import logging
import resource

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.address import split_address
from llmpilot_simulator.clock import NANOS_PER_SECOND
from llmpilot_simulator.http_exchange import SIMULATED_HEADER, Service, json_response, retry_headers
from llmpilot_simulator.openai_handlers import add_openai_routes
from llmpilot_simulator.tgi_handlers import add_tgi_routes

_BACKLOG = 4096
"""Connections that may wait to be accepted: load testers open theirs at once."""
_LEAST_BODY_BYTES = 2_000_000
"""TGI's default of --payload-limit."""
_TOKEN_BYTES = 32
"""A body may have so many for each token of the context: more cannot be a prompt that fits."""
_KEEP_ALIVE_SECONDS = 3600.0
"""Idle connections cost nothing here; a load tester's pool should not lose any in the middle of a test."""
_CLOSE_SECONDS = 0.1
"""How long handlers may take to notice that their connection is closed."""


class HttpServer:
    """Listens from `start` to `stop`."""

    def __init__(self, service: Service, registry: CollectorRegistry) -> None:
        self._service = service
        self._registry = registry
        body_bytes = max(_LEAST_BODY_BYTES, _TOKEN_BYTES * service.context_length)
        application = web.Application(client_max_size=body_bytes)
        application.on_response_prepare.append(_say_simulated)
        application.router.add_get("/health", self._health)
        application.router.add_get("/version", self._version)
        application.router.add_get("/metrics", self._metrics)
        add_openai_routes(application.router, service)
        add_tgi_routes(application.router, service)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=_logger(),
            handler_cancellation=True,  # a client that leaves ends its handler, which frees the place in the batch
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
            shutdown_timeout=_CLOSE_SECONDS,
        )
        self._site: web.TCPSite | None = None

    async def start(self, address: str) -> str:
        """Listen; returns the address with the real port. Raises PreconditionError where that is impossible."""
        host, port = split_address(address)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port, backlog=_BACKLOG)
        try:
            await self._site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise PreconditionError(
                f"cannot listen on {address}: {error.strerror or error}; choose another address (port 0: any free one)"
            ) from error
        bound_port: int = self._runner.addresses[0][1]
        return f"{address.rpartition(':')[0]}:{bound_port}"

    async def stop_accepting(self) -> None:
        """Take no new connections; those that are open go on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def stop(self) -> None:
        """Close every connection."""
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:  # noqa: ARG002 the server's signature
        now_seconds = self._service.server.now_nanos() / NANOS_PER_SECOND
        if self._service.gate.is_ready(now_seconds):
            return json_response({"status": "ok", "simulated": True})
        return json_response({"status": "starting", "simulated": True}, status=503, headers=retry_headers(503))

    async def _version(self, request: web.Request) -> web.Response:  # noqa: ARG002
        return json_response({"version": self._service.version, "simulated": True})

    async def _metrics(self, request: web.Request) -> web.Response:  # noqa: ARG002
        content = generate_latest(self._registry)
        return web.Response(body=content, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


async def _say_simulated(request: web.Request, response: web.StreamResponse) -> None:  # noqa: ARG001
    response.headers[SIMULATED_HEADER] = "true"


def _logger() -> logging.Logger:
    logger = logging.getLogger("aiohttp.server")
    logger.addFilter(_is_own_error)
    return logger


def _is_own_error(record: logging.LogRecord) -> bool:
    """Return whether a log line is of more than a client's broken HTTP, which has its answer."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


def raise_file_limit() -> int:
    """Let this process hold as many connections as it may; returns how many files that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS states a limit that it does not grant
        return soft
    return hard
