"""Runs a load test against the server at the URL it is given, tells when it measures, and waits to be killed."""

import asyncio
import sys

from llmpilot_loadtester.domain.events import LiveMetrics, RunEvent
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    LoadTestSpec,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
)
from llmpilot_loadtester.supervision.load_run import LoadRun
from llmpilot_loadtester.supervision.request_sources import SyntheticSource


async def tell(event: RunEvent) -> None:
    if isinstance(event, LiveMetrics) and event.ok_count:
        print("measuring", flush=True)  # noqa: T201 the test reads it


load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=4),))
requests = SyntheticRequests(input_tokens=20, output_tokens=6)
spec = LoadTestSpec(
    target=Target(url=sys.argv[1]),
    requests=requests,
    stages=(Stage(load=load, warm_up_seconds=0.0, measure_seconds=3600.0),),
    worker_count=2,
)
source = SyntheticSource(requested=requests, protocol=spec.target.protocol)
asyncio.run(LoadRun(spec, load_test_id="doomed", source=source, cpu_count=2).run(tell, stop=asyncio.Event()))
