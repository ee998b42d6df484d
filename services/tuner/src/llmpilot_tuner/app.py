"""The tuner's composition root."""

import asyncio
from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry

from llmpilot_contracts.subjects import STREAMS, TUNING_SPECS
from llmpilot_servicekit.jobs.conduct import RENEWALS, JobKeeping
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import serve
from llmpilot_tuner.conduct import Surroundings
from llmpilot_tuner.domain.probing import Probe
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.result_cache import ResultCache
from llmpilot_tuner.servicer import TuningServicer
from llmpilot_tuner.settings import TunerSettings
from llmpilot_tuner.tuning_run import TuningRun
from llmpilot_tuner.tuning_states import tuning_states
from llmpilot_tuner.tunings import tunings_of


async def run(settings: TunerSettings) -> None:
    """Serve until told to stop. NATS may come and go: a tuning that runs goes on without it."""
    registry = CollectorRegistry()
    stop = asyncio.Event()
    nats = NatsConnection(settings.nats_url, streams=STREAMS, registry=registry)
    keeping = JobKeeping(
        nats=nats,
        states=tuning_states(nats),
        specs=NatsObjects(nats, TUNING_SPECS),
        renew_seconds=settings.take_over_seconds / RENEWALS,
    )
    around = Surroundings(keeping=keeping, cache=ResultCache(nats), start_run=_start_run)
    tunings = tunings_of(around, max_count=settings.max_tunings, take_over_seconds=settings.take_over_seconds)
    calls = OpenCalls(registry, metric="llmpilot_tuning_open_calls", description="Watches that are open.")
    servicer = TuningServicer(tunings, states=keeping.states, nats=nats, calls=calls)
    await serve(
        settings,
        registrations=[servicer.registration()],
        background=[
            nats.run,
            tunings.follow,
            tunings.run,
            tunings.remove_leftovers,
            partial(calls.end_when, stop),
        ],
        finishing=[tunings.finish],
        stop=stop,
        registry=registry,
    )


def _start_run(spec: TuningSpec, kept: Sequence[Probe]) -> TuningRun:
    return TuningRun(spec, kept=kept)
