"""Requests of the workload generator, over gRPC: the one place that knows its protocol.

Invariant: a stream that breaks off goes on where it broke off, so a stage sends the same requests whether or not the
generator went away meanwhile.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub
from llmpilot_contracts.errors import InvalidInputError, PilotError, UnavailableError, Violation
from llmpilot_loadtester.domain.spec import Protocol, WorkloadRequests
from llmpilot_loadtester.supervision.request_sources import SourceRequest, stage_seed
from llmpilot_loadtester.wire_tgis import single_requests
from llmpilot_servicekit.status import error_from_rpc

if TYPE_CHECKING:
    from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceAsyncStub

COLLECTION = "workloadModels/"
_BATCH_SIZE = "batch_size"
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # services are reached directly
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
)
_SERVERS = {
    Protocol.OPENAI_COMPLETIONS: pb.SERVER_OPENAI_COMPLETIONS,
    Protocol.OPENAI_CHAT: pb.SERVER_OPENAI_CHAT,
    Protocol.TGI: pb.SERVER_TGI,
    Protocol.TGIS: pb.SERVER_TGIS,
}
_VALUE_CHOICES = {
    "": pb.VALUE_CHOICE_UNSPECIFIED,
    "centre": pb.VALUE_CHOICE_CENTRE,
    "uniform": pb.VALUE_CHOICE_UNIFORM,
    "quantiles": pb.VALUE_CHOICE_QUANTILES,
}
_BROKEN_OFF = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""What a stream ends with whose server was killed, beside UNAVAILABLE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a generator is waited for."""

    answer_seconds: float = 60.0
    """For the next requests; a new tokenizer takes seconds."""
    away_seconds: float = 30.0
    """For one that does not answer to come back."""
    first_wait_seconds: float = 0.1
    """Before the first new try; doubles from one to the next."""
    last_wait_seconds: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """Requests that the workload generator draws and writes for the target's protocol."""

    requested: WorkloadRequests
    address: str
    """Of the generator, host:port."""
    protocol: Protocol
    keeps_arrivals: bool
    """Whether requests come at the arrival times of their model; else they have none."""
    patience: Patience = Patience()

    async def requests(self, stage_index: int, served_model: str) -> AsyncIterator[SourceRequest]:
        """Yield the requests of a stage. Raises PilotError: what is asked for is wrong, or the generator stays away."""
        retry = _Retry(self.patience, self.address)
        request: pb.StreamRequestsRequest | None = None
        next_index = 0
        while True:
            try:
                async with self._stub() as stub:
                    request = request or await self._written(stub, stage_index, served_model)
                    request.start_index = next_index
                    async for rendered in self._rendered(stub, request):
                        for item in self._items(rendered):
                            yield item
                        next_index = rendered.index + 1
                        retry.forget()
            except (grpc.RpcError, TimeoutError) as error:
                await retry.wait(self._named(error))
            else:
                return

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator["WorkloadServiceAsyncStub"]:
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            yield WorkloadServiceStub(channel)

    async def _rendered(
        self, stub: "WorkloadServiceAsyncStub", request: pb.StreamRequestsRequest
    ) -> AsyncIterator[pb.RenderedRequest]:
        call = stub.StreamRequests(request)
        try:
            while True:
                async with asyncio.timeout(self.patience.answer_seconds):
                    response = await call.read()
                if not isinstance(response, pb.StreamRequestsResponse):
                    return  # grpc.aio.EOF
                for rendered in response.requests:
                    yield rendered
        finally:
            call.cancel()

    async def _written(
        self, stub: "WorkloadServiceAsyncStub", stage_index: int, served_model: str
    ) -> pb.StreamRequestsRequest:
        asked = self.requested
        name = f"{COLLECTION}{asked.workload_model.removeprefix(COLLECTION)}"
        answer = await stub.GetWorkloadModel(
            pb.GetWorkloadModelRequest(name=name), timeout=self.patience.answer_seconds
        )
        parameters = {parameter.name for parameter in answer.workload_model.parameters}
        sampling = pb.Sampling(
            workload_model=name,
            seed=stage_seed(asked.seed, stage_index),
            conditions=with_single_prompts(asked.conditions, parameters),
            value_choice=_VALUE_CHOICES[asked.value_choice],
            independent=asked.independent,
            scales=[pb.Scale(parameter=parameter, factor=factor) for parameter, factor in asked.scales],
            context_length=asked.context_length,
            replay=asked.replay,
        )
        if not self.keeps_arrivals:
            sampling.arrivals.kind = pb.ARRIVAL_KIND_CLOSED
        return pb.StreamRequestsRequest(
            sampling=sampling,
            tokenizer_json=asked.tokenizer_json,
            shared_prefix_ratio=asked.shared_prefix_ratio,
            prefix_group_count=asked.prefix_group_count,
            server=_SERVERS[self.protocol],
            served_model=served_model,
            fixed_output_length=asked.fixed_output_length,
        )

    def _items(self, rendered: pb.RenderedRequest) -> Iterator[SourceRequest]:
        offset = None
        if self.keeps_arrivals and rendered.HasField("arrival_offset"):
            offset = rendered.arrival_offset.seconds * 10**9 + rendered.arrival_offset.nanos
        bodies: list[bytes] = list(rendered.bodies)
        if self.protocol is Protocol.TGIS:
            bodies = [single for body in bodies for single in single_requests(body)]
        for body in bodies:
            yield SourceRequest(body=body, input_tokens=rendered.input_tokens, arrival_offset_nanos=offset)

    def _named(self, error: grpc.RpcError | TimeoutError) -> PilotError:
        """Return what went wrong, in the words of the spec."""
        if isinstance(error, TimeoutError):
            waited = f"gave no requests for {self.patience.answer_seconds:g} s"
            return UnavailableError(f"{self.address} {waited}")
        found = error_from_rpc(error, address=self.address)
        if error.code() in _BROKEN_OFF:
            return UnavailableError(str(found))
        if isinstance(found, InvalidInputError):
            return InvalidInputError(
                Violation(f"spec.workload.{each.field}", each.description) for each in found.violations
            )
        return found


class _Retry:
    """Waits longer and longer for a generator to come back, up to a limit."""

    def __init__(self, patience: Patience, address: str) -> None:
        self._patience = patience
        self._address = address
        self.forget()

    def forget(self) -> None:
        """It is back."""
        self._since: float | None = None
        self._wait_seconds = self._patience.first_wait_seconds

    async def wait(self, error: PilotError) -> None:
        """Wait before the next try; raises `error` if it is none that time heals, UnavailableError after the limit."""
        if not isinstance(error, UnavailableError):
            raise error
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        away_seconds = now - self._since
        if away_seconds >= self._patience.away_seconds:
            message = (
                f"the workload generator has not answered for {away_seconds:.0f} s: check that it runs at "
                f"{self._address}, then start the load test again ({error})"
            )
            raise UnavailableError(message) from error
        await asyncio.sleep(self._wait_seconds)
        self._wait_seconds = min(2 * self._wait_seconds, self._patience.last_wait_seconds)


def with_single_prompts(conditions: tuple[str, ...], parameters: set[str]) -> list[str]:
    """Return the conditions and, unless one is about batches, one that each request has one prompt."""
    names_batches = any(re.match(rf"\s*{_BATCH_SIZE}\b", condition) for condition in conditions)
    single = [] if names_batches or _BATCH_SIZE not in parameters else [f"{_BATCH_SIZE} = 1"]
    return [*conditions, *single]
