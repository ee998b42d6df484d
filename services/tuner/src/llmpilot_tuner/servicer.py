"""RPC in, domain call, RPC out.

Invariant: a watch gives every event from where it begins, once and in order, and ends with the tuning: who has seen
the end gets a tuning that has ended.
"""

import asyncio
from functools import partial

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot.tuning.v1.tuning_pb2_grpc import TuningServiceServicer, add_TuningServiceServicer_to_server
from llmpilot_servicekit.jobs.job_log import watch
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import Registration
from llmpilot_tuner import wire
from llmpilot_tuner.tuning_states import TUNING_WIRE, TuningStates
from llmpilot_tuner.tunings import Tunings
from llmpilot_tuner.wire_events import is_end


class TuningServicer(TuningServiceServicer):
    """Serves the tunings of this installation, whichever replica runs them."""

    def __init__(self, tunings: Tunings, *, states: TuningStates, nats: NatsConnection, calls: OpenCalls) -> None:
        self._tunings = tunings
        self._states = states
        self._nats = nats
        self._calls = calls

    def registration(self) -> Registration:
        """Return how a server takes this servicer."""
        service = pb.DESCRIPTOR.services_by_name["TuningService"]
        return Registration(service_name=service.full_name, add=partial(add_TuningServiceServicer_to_server, self))

    async def CreateTuning(  # noqa: N802 named by the proto
        self,
        request: pb.CreateTuningRequest,
        context: ServicerContext[pb.CreateTuningRequest, pb.CreateTuningResponse],  # noqa: ARG002
    ) -> pb.CreateTuningResponse:
        """Accept a tuning."""
        tuning, spec = await asyncio.to_thread(wire.read_create_request, request)  # it counts the LLM's memory
        made = await self._tunings.create(tuning, spec)
        return pb.CreateTuningResponse(tuning=wire.write_tuning(made))

    async def GetTuning(  # noqa: N802
        self,
        request: pb.GetTuningRequest,
        context: ServicerContext[pb.GetTuningRequest, pb.GetTuningResponse],  # noqa: ARG002
    ) -> pb.GetTuningResponse:
        """Give one tuning."""
        stored = await self._states.get(wire.read_name(request.name))
        return pb.GetTuningResponse(tuning=wire.write_tuning(stored.job))

    async def ListTunings(  # noqa: N802
        self,
        request: pb.ListTuningsRequest,
        context: ServicerContext[pb.ListTuningsRequest, pb.ListTuningsResponse],  # noqa: ARG002
    ) -> pb.ListTuningsResponse:
        """List tunings by name."""
        after, count = wire.read_list_request(request)
        page = await self._states.page(after=after, count=count)
        return pb.ListTuningsResponse(
            tunings=[wire.write_tuning(each) for each in page.jobs], next_page_token=page.next_after
        )

    async def CancelTuning(  # noqa: N802
        self,
        request: pb.CancelTuningRequest,
        context: ServicerContext[pb.CancelTuningRequest, pb.CancelTuningResponse],  # noqa: ARG002
    ) -> pb.CancelTuningResponse:
        """Cancel a tuning."""
        tuning = await self._tunings.cancel(wire.read_name(request.name))
        return pb.CancelTuningResponse(tuning=wire.write_tuning(tuning))

    async def WatchTuning(  # type: ignore[override]  # noqa: N802 it writes to its context
        self,
        request: pb.WatchTuningRequest,
        context: ServicerContext[pb.WatchTuningRequest, pb.WatchTuningResponse],
    ) -> None:
        """Write events until the tuning has ended, or the client is gone."""
        async with self._calls.open("WatchTuning"):
            tuning_id, start_index = wire.read_watch_request(request)
            stored = await self._states.get(tuning_id)

            async def send(event: Message) -> None:
                assert isinstance(event, pb.TuningEvent)  # noqa: S101 by the table of subjects
                if is_end(event):
                    await self._states.wait_ended(tuning_id)
                await context.write(pb.WatchTuningResponse(event=event))

            ended = stored.job.state.is_end
            await watch(self._nats, TUNING_WIRE, tuning_id, start_index, ended=ended, send=send)
