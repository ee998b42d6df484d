"""The load tester's composition root."""

import asyncio
import os
from functools import partial

from prometheus_client import CollectorRegistry

from llmpilot_contracts.errors import PreconditionError
from llmpilot_contracts.subjects import LOAD_TEST_SPECS, STREAMS
from llmpilot_loadtester.conduct import Order, Surroundings
from llmpilot_loadtester.domain.spec import LoadKind, LoadTestSpec, PromptRequests, SyntheticRequests, WorkloadRequests
from llmpilot_loadtester.load_test_states import load_test_states
from llmpilot_loadtester.load_tests import load_tests_of
from llmpilot_loadtester.metrics_export import MetricsExport
from llmpilot_loadtester.servicer import LoadTestServicer
from llmpilot_loadtester.settings import LoadTesterSettings
from llmpilot_loadtester.supervision.load_run import LoadRun
from llmpilot_loadtester.supervision.request_sources import PromptSource, RequestSource, SyntheticSource
from llmpilot_loadtester.wire import read_kept_spec
from llmpilot_loadtester.wire_requests import WorkloadSource
from llmpilot_servicekit.jobs.conduct import RENEWALS, JobKeeping
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.neighbours import neighbour_address
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import serve

GENERATOR = "workload-generator"


async def run(settings: LoadTesterSettings) -> None:
    """Serve until told to stop. NATS may come and go: a load test that runs goes on without it."""
    registry = CollectorRegistry()
    stop = asyncio.Event()
    nats = NatsConnection(settings.nats_url, streams=STREAMS, registry=registry)
    states = load_test_states(nats)
    keeping = JobKeeping(
        nats=nats,
        states=states,
        specs=NatsObjects(nats, LOAD_TEST_SPECS),
        renew_seconds=settings.take_over_seconds / RENEWALS,
    )
    around = Surroundings(keeping=keeping, read_order=partial(read_order, settings), metrics=MetricsExport(registry))
    load_tests = load_tests_of(around, max_count=settings.max_load_tests, take_over_seconds=settings.take_over_seconds)
    calls = OpenCalls(registry, metric="llmpilot_loadtest_open_calls", description="Watches that are open.")
    servicer = LoadTestServicer(load_tests, states=states, nats=nats, calls=calls)
    await serve(
        settings,
        registrations=[servicer.registration()],
        background=[
            nats.run,
            load_tests.follow,
            load_tests.run,
            load_tests.remove_leftovers,
            partial(calls.end_when, stop),
        ],
        finishing=[load_tests.finish],
        stop=stop,
        registry=registry,
    )


def read_order(settings: LoadTesterSettings, load_test_id: str, content: bytes) -> Order:
    """Return a kept specification, ready to be run; raises PilotError."""
    spec, write_measurement = read_kept_spec(content)
    load_run = LoadRun(
        spec,
        load_test_id=load_test_id,
        source=source_of(spec, settings),
        cpu_count=len(os.sched_getaffinity(0)),
    )
    return Order(run=load_run, write_measurement=write_measurement)


def source_of(spec: LoadTestSpec, settings: LoadTesterSettings) -> RequestSource:
    """Return where requests come from; PreconditionError: nobody says where the workload generator is."""
    protocol = spec.target.protocol
    match spec.requests:
        case WorkloadRequests() as requested:
            return WorkloadSource(
                requested=requested,
                address=requested.address or generator_address(settings),
                protocol=protocol,
                keeps_arrivals=any(stage.load.kind is LoadKind.TRACE for stage in spec.stages),
            )
        case PromptRequests() as requested:
            return PromptSource(requested=requested, protocol=protocol)
        case SyntheticRequests() as requested:
            return SyntheticSource(requested=requested, protocol=protocol)


def generator_address(settings: LoadTesterSettings) -> str:
    """Return where the workload generator of this installation is; raises PreconditionError."""
    address = settings.workload_generator_address or neighbour_address(settings.address_folder, GENERATOR)
    if address is None:
        raise PreconditionError(
            "no workload generator is known: set LLMPILOT_WORKLOAD_GENERATOR_ADDRESS, or start one on this machine"
        )
    return address
