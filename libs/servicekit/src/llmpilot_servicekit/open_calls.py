"""The calls that may last: streams without end, and what is in the making.

Invariant: none of them outlives the order to stop by more than what it does at that moment.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Gauge

from llmpilot_contracts.errors import UnavailableError

_STOPPING = "the service is stopping: call again, and another replica or the next start goes on"


class OpenCalls:
    """Counts calls while they last, and ends them when the service stops."""

    def __init__(self, registry: CollectorRegistry, *, metric: str, description: str) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._is_stopping = False
        self._gauge = Gauge(metric, description, ["method"], registry=registry)

    @asynccontextmanager
    async def open(self, method: str) -> AsyncIterator[None]:
        """Count a call; UnavailableError is raised in it when the service stops."""
        if self._is_stopping:
            raise UnavailableError(_STOPPING)
        try:
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    with self._gauge.labels(method).track_inprogress():
                        yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise UnavailableError(_STOPPING) from error

    async def end_when(self, stop: asyncio.Event) -> None:
        """Wait for the order to stop, then end all calls."""
        await stop.wait()
        self._is_stopping = True
        now_seconds = asyncio.get_running_loop().time()
        for limit in tuple(self._limits):
            limit.reschedule(now_seconds)
