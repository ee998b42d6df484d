"""Results that an installation keeps, by everything they depend on, in a bucket that all replicas share.

Invariant: a result is kept whole or not at all; one that cannot be read is as good as none, and is replaced. The
command line keeps its own in files, see `kept_tunings`.
"""

import dataclasses

from llmpilot_contracts.errors import PilotError, UnavailableError
from llmpilot_contracts.subjects import TUNING_CACHE
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.outputs.report import Report, read_report

log = get_logger(__name__)


class ResultCache:
    """The reports of an installation. Raises UnavailableError while NATS is away."""

    def __init__(self, nats: NatsConnection) -> None:
        self._objects = NatsObjects(nats, TUNING_CACHE)

    async def find(self, key: str, spec: TuningSpec) -> Report | None:
        """Return what an earlier tuning of that `cache_key` found, under the names of this one; None: nothing."""
        try:
            stored = await self._objects.find(key)
            content = await self._objects.read(stored) if stored else None
            if content is None:
                return None
            report = read_report(content)
        except UnavailableError:
            raise
        except PilotError as error:
            log.warning("a kept result cannot be read", key=key, error=str(error))
            return None
        return dataclasses.replace(report, llm_name=spec.llm_name, gpu_name=spec.gpu_name)

    async def keep(self, key: str, report_json: str) -> None:
        """Keep what a tuning found, in the place of what is kept, if anything."""
        if stored := await self._objects.find(key):
            await self._objects.delete(stored)
        await self._objects.create(key, report_json.encode())
