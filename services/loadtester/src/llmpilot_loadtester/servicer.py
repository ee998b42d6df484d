"""RPC in, domain call, RPC out.

Invariant: a watch gives every event from where it begins, once and in order, and ends with the load test: who has seen
the end gets a load test that has ended.
"""

import asyncio
from functools import partial

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.loadtest.v1.loadtest_pb2_grpc import LoadTestServiceServicer, add_LoadTestServiceServicer_to_server
from llmpilot_loadtester import wire
from llmpilot_loadtester.load_test_states import LOAD_TEST_WIRE, LoadTestStates
from llmpilot_loadtester.load_tests import LoadTests
from llmpilot_loadtester.wire_events import is_end
from llmpilot_servicekit.jobs.job_log import watch
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import Registration


class LoadTestServicer(LoadTestServiceServicer):
    """Serves the load tests of this installation, whichever replica runs them."""

    def __init__(
        self, load_tests: LoadTests, *, states: LoadTestStates, nats: NatsConnection, calls: OpenCalls
    ) -> None:
        self._load_tests = load_tests
        self._states = states
        self._nats = nats
        self._calls = calls

    def registration(self) -> Registration:
        """Return how a server takes this servicer."""
        service = pb.DESCRIPTOR.services_by_name["LoadTestService"]
        return Registration(service_name=service.full_name, add=partial(add_LoadTestServiceServicer_to_server, self))

    async def CreateLoadTest(  # noqa: N802 named by the proto
        self,
        request: pb.CreateLoadTestRequest,
        context: ServicerContext[pb.CreateLoadTestRequest, pb.CreateLoadTestResponse],  # noqa: ARG002
    ) -> pb.CreateLoadTestResponse:
        """Accept a load test."""
        load_test, spec = await asyncio.to_thread(wire.read_create_request, request)  # prompts may be megabytes
        made = await self._load_tests.create(load_test, spec)
        return pb.CreateLoadTestResponse(load_test=wire.write_load_test(made))

    async def GetLoadTest(  # noqa: N802
        self,
        request: pb.GetLoadTestRequest,
        context: ServicerContext[pb.GetLoadTestRequest, pb.GetLoadTestResponse],  # noqa: ARG002
    ) -> pb.GetLoadTestResponse:
        """Give one load test."""
        stored = await self._states.get(wire.read_name(request.name))
        return pb.GetLoadTestResponse(load_test=wire.write_load_test(stored.job))

    async def ListLoadTests(  # noqa: N802
        self,
        request: pb.ListLoadTestsRequest,
        context: ServicerContext[pb.ListLoadTestsRequest, pb.ListLoadTestsResponse],  # noqa: ARG002
    ) -> pb.ListLoadTestsResponse:
        """List load tests by name."""
        after, count = wire.read_list_request(request)
        page = await self._states.page(after=after, count=count)
        return pb.ListLoadTestsResponse(
            load_tests=[wire.write_load_test(each) for each in page.jobs],
            next_page_token=page.next_after,
        )

    async def CancelLoadTest(  # noqa: N802
        self,
        request: pb.CancelLoadTestRequest,
        context: ServicerContext[pb.CancelLoadTestRequest, pb.CancelLoadTestResponse],  # noqa: ARG002
    ) -> pb.CancelLoadTestResponse:
        """Cancel a load test."""
        load_test = await self._load_tests.cancel(wire.read_name(request.name))
        return pb.CancelLoadTestResponse(load_test=wire.write_load_test(load_test))

    async def WatchLoadTest(  # type: ignore[override]  # noqa: N802 it writes to its context
        self,
        request: pb.WatchLoadTestRequest,
        context: ServicerContext[pb.WatchLoadTestRequest, pb.WatchLoadTestResponse],
    ) -> None:
        """Write events until the load test has ended, or the client is gone."""
        async with self._calls.open("WatchLoadTest"):
            load_test_id, start_index = wire.read_watch_request(request)
            stored = await self._states.get(load_test_id)

            async def send(event: Message) -> None:
                assert isinstance(event, pb.LoadTestEvent)  # noqa: S101 by the table of subjects
                if is_end(event):
                    await self._states.wait_ended(load_test_id)
                await context.write(pb.WatchLoadTestResponse(event=event))

            ended = stored.job.state.is_end
            await watch(self._nats, LOAD_TEST_WIRE, load_test_id, start_index, ended=ended, send=send)
