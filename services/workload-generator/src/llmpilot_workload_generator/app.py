"""The workload generator's composition root."""

import asyncio
from functools import partial

from prometheus_client import CollectorRegistry

from llmpilot_contracts.subjects import WORKLOAD_MODELS
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import serve
from llmpilot_workload_generator.model_creation import Creations
from llmpilot_workload_generator.model_store import ModelStore
from llmpilot_workload_generator.servicer import WorkloadServicer
from llmpilot_workload_generator.settings import WorkloadSettings


async def run(settings: WorkloadSettings) -> None:
    """Serve until told to stop. NATS may come and go: profiles are drawn from without it."""
    registry = CollectorRegistry()
    stop = asyncio.Event()
    nats = NatsConnection(settings.nats_url, streams=(), registry=registry)
    calls = OpenCalls(
        registry, metric="llmpilot_workload_open_calls", description="Streams and creations that are running."
    )
    creations = Creations(
        traces=settings.traces,
        max_count=settings.max_creations,
        max_upload_bytes=settings.max_upload_bytes,
        idle_seconds=settings.upload_idle_seconds,
    )
    store = ModelStore(NatsObjects(nats, WORKLOAD_MODELS), registry)
    servicer = WorkloadServicer(store, creations=creations, calls=calls, registry=registry)
    await serve(
        settings,
        registrations=[servicer.registration()],
        background=[nats.run, store.remove_leftovers, partial(calls.end_when, stop)],
        stop=stop,
        registry=registry,
    )
