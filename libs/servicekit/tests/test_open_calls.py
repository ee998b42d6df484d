import asyncio

import pytest
from prometheus_client import CollectorRegistry

from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.open_calls import OpenCalls


def test_a_call_hears_that_the_service_stops_and_so_does_who_comes_later() -> None:
    async def scenario() -> None:
        calls = OpenCalls(CollectorRegistry(), metric="test_open_calls", description="Calls.")
        stop = asyncio.Event()

        async def last() -> None:
            async with calls.open("SampleRequests"):
                stop.set()
                await asyncio.Event().wait()

        ending = asyncio.create_task(calls.end_when(stop))
        with pytest.raises(UnavailableError, match="the service is stopping"):
            await last()
        await ending
        with pytest.raises(UnavailableError, match="the service is stopping"):
            await last()

    asyncio.run(asyncio.wait_for(scenario(), 10))
