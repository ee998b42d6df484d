"""What the store does of itself; the rest is in test_service*.py, over real gRPC."""

import asyncio
from datetime import timedelta

import nats
from prometheus_client import CollectorRegistry

from llmpilot_contracts.subjects import Bucket
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_workload_generator.model_store import ModelStore

TIMEOUT_SECONDS = 30


def test_what_a_killed_service_left_is_removed_also_after_an_outage(nats_url: str) -> None:
    async def check() -> None:
        bucket = Bucket(name="LEFTOVERS", description="Of a test.")
        connection = NatsConnection(nats_url, streams=())
        objects = NatsObjects(connection, bucket)
        witness = await nats.connect(nats_url)
        jetstream = witness.jetstream()
        sweeping = asyncio.create_task(ModelStore(objects, CollectorRegistry()).remove_leftovers(timedelta(0)))
        await asyncio.sleep(0)  # it runs, and there is no connection
        running = asyncio.create_task(connection.run())
        try:
            await connection.wait_connected(TIMEOUT_SECONDS)
            await objects.create("model", b"content")
            await jetstream.publish("$O.LEFTOVERS.C.left", b"part")
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while (await jetstream.stream_info("OBJ_LEFTOVERS")).state.messages != 2:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert await objects.names() == ["model"]
        finally:
            for task in (sweeping, running):
                task.cancel()
            await asyncio.wait([sweeping, running])
            await witness.close()
        assert sweeping.cancelled()

    asyncio.run(check())
