"""Publishing measurements as facts on NATS."""

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Measurement, canonical_bytes
from llmpilot_recommender.wire_measurement import write_measurement_recorded
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.status import sole_cause


def event_id_of(measurement: Measurement) -> str:
    """Return the event id of a measurement; equal measurements have equal ids, so a repeated publish is dropped."""
    digest = hashlib.sha256(canonical_bytes(measurement)).digest()
    return str(uuid.UUID(bytes=digest[:16]))


async def publish_measurements(
    nats_url: str,
    measurements: Sequence[Measurement],
    progress: Callable[[int, int], None],
) -> None:
    """Publish every measurement and wait for each acknowledgement; UnavailableError: NATS does not answer."""
    try:
        await _publish(nats_url, measurements, progress)
    except ExceptionGroup as group:
        raise sole_cause(group) from None


async def _publish(nats_url: str, measurements: Sequence[Measurement], progress: Callable[[int, int], None]) -> None:
    nats = NatsConnection(nats_url, streams=STREAMS)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(nats.run())
        await nats.wait_connected()
        now, llms = datetime.now(UTC), load_measured_llms()
        for done, measurement in enumerate(measurements, start=1):
            llm = llms.get(measurement.llm)
            event = write_measurement_recorded(
                measurement, llm.spec if llm else None, event_id=event_id_of(measurement), record_time=now
            )
            await nats.publish(MEASUREMENT_RECORDED, event_id=event.event_id, payload=event)
            progress(done, len(measurements))
        running.cancel()
