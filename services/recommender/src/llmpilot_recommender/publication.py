"""Publishing measurements as facts on NATS."""

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Measurement, to_cells
from llmpilot_recommender.wire_llm import write_llm_spec
from llmpilot_recommender.wire_measurement import write_measurement
from llmpilot_servicekit.nats_connection import NatsConnection


def event_of(measurement: Measurement, record_time: datetime) -> MeasurementRecorded:
    """Return the event of a measurement; equal measurements have equal event ids."""
    digest = hashlib.sha256("\x1f".join(to_cells(measurement)).encode()).digest()
    llm = load_measured_llms().get(measurement.llm)
    event = MeasurementRecorded(
        event_id=str(uuid.UUID(bytes=digest[:16])),
        measurement=write_measurement(measurement),
        llm_spec=write_llm_spec(llm.spec) if llm else None,
    )
    event.record_time.FromDatetime(record_time)
    return event


async def publish_measurements(
    nats_url: str,
    measurements: Sequence[Measurement],
    progress: Callable[[int, int], None],
    *,
    connect_seconds: float,
) -> None:
    """Publish every measurement and wait for each acknowledgement. Raises TimeoutError when NATS does not answer."""
    nats = NatsConnection(nats_url, streams=STREAMS)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(nats.run())
        async with asyncio.timeout(connect_seconds):
            await nats.wait_connected()
        now = datetime.now(UTC)
        for done, measurement in enumerate(measurements, start=1):
            event = event_of(measurement, now)
            await nats.publish(MEASUREMENT_RECORDED, event_id=event.event_id, payload=event)
            progress(done, len(measurements))
        running.cancel()
