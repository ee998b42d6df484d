"""RPC in, domain call, RPC out. What computes runs in threads, so that every other call is answered meanwhile.

Invariant: a stream is a batch ahead of its client at most: the next one is drawn when gRPC has taken the one before.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from grpc.aio import ServicerContext
from prometheus_client import CollectorRegistry, Counter

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceServicer, add_WorkloadServiceServicer_to_server
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_servicekit.server import Registration
from llmpilot_workload_generator import wire, wire_prompts, wire_sampling, wire_statistics
from llmpilot_workload_generator.model import WorkloadModel
from llmpilot_workload_generator.model_creation import Creations
from llmpilot_workload_generator.model_store import ModelStore
from llmpilot_workload_generator.packing import Packer
from llmpilot_workload_generator.prompts.prompt_cutting import draw_for_prompts
from llmpilot_workload_generator.prompts.rendering import Renderer
from llmpilot_workload_generator.sampling.sampler import Sampler
from llmpilot_workload_generator.statistics import describe

_STEP = 10_000_000
"""Random arrivals that are added up in a tenth of a second."""
_RENDERERS = 2
"""New tokenizers that are tried at once, each for seconds, also when their clients are gone meanwhile."""


class WorkloadServicer(WorkloadServiceServicer):
    """Serves the models of a store."""

    def __init__(
        self, store: ModelStore, *, creations: Creations, calls: OpenCalls, registry: CollectorRegistry
    ) -> None:
        self._store = store
        self._creations = creations
        self._calls = calls
        self._renderers = ThreadPoolExecutor(_RENDERERS, "renderer")
        counter = Counter(
            "llmpilot_workload_requests_sent", "Requests that streams gave.", ["method"], registry=registry
        )
        self._count_sampled = counter.labels("SampleRequests").inc
        self._count_rendered = counter.labels("StreamRequests").inc

    def registration(self) -> Registration:
        """Return how a server takes this servicer."""
        service = pb.DESCRIPTOR.services_by_name["WorkloadService"]
        return Registration(service_name=service.full_name, add=partial(add_WorkloadServiceServicer_to_server, self))

    async def CreateWorkloadModel(  # noqa: N802 named by the proto
        self,
        request_iterator: AsyncIterator[pb.CreateWorkloadModelRequest],
        context: ServicerContext[pb.CreateWorkloadModelRequest, pb.CreateWorkloadModelResponse],  # noqa: ARG002
    ) -> pb.CreateWorkloadModelResponse:
        """Receive or find a file, make a model of it, and store it before the answer."""
        async with self._calls.open("CreateWorkloadModel"):
            requests = aiter(request_iterator)
            recipe, origin = wire.read_create_request(await self._creations.in_time(requests))
            made = await self._store.find_made(recipe.model_id, origin)
            if made is None:
                chunks = (wire.read_chunk(request) async for request in requests)
                model = await self._creations.make(recipe, chunks)
                made = await self._store.create(recipe.model_id, model, origin)
            return pb.CreateWorkloadModelResponse(workload_model=wire.write_model(made))

    async def GetWorkloadModel(  # noqa: N802
        self,
        request: pb.GetWorkloadModelRequest,
        context: ServicerContext[pb.GetWorkloadModelRequest, pb.GetWorkloadModelResponse],  # noqa: ARG002
    ) -> pb.GetWorkloadModelResponse:
        """Give one model."""
        model = await self._store.get(wire.read_name(request.name))
        return pb.GetWorkloadModelResponse(workload_model=wire.write_model(model))

    async def ListWorkloadModels(  # noqa: N802
        self,
        request: pb.ListWorkloadModelsRequest,
        context: ServicerContext[pb.ListWorkloadModelsRequest, pb.ListWorkloadModelsResponse],  # noqa: ARG002
    ) -> pb.ListWorkloadModelsResponse:
        """List models and profiles by name."""
        after, count = wire.read_list_request(request)
        page = await self._store.list_page(after=after, count=count)
        return pb.ListWorkloadModelsResponse(
            workload_models=[wire.write_model(model) for model in page.models], next_page_token=page.next_after
        )

    async def DeleteWorkloadModel(  # noqa: N802
        self,
        request: pb.DeleteWorkloadModelRequest,
        context: ServicerContext[pb.DeleteWorkloadModelRequest, pb.DeleteWorkloadModelResponse],  # noqa: ARG002
    ) -> pb.DeleteWorkloadModelResponse:
        """Delete a model."""
        await self._store.delete(wire.read_name(request.name))
        return pb.DeleteWorkloadModelResponse()

    async def DescribeWorkloadModel(  # noqa: N802
        self,
        request: pb.DescribeWorkloadModelRequest,
        context: ServicerContext[pb.DescribeWorkloadModelRequest, pb.DescribeWorkloadModelResponse],  # noqa: ARG002
    ) -> pb.DescribeWorkloadModelResponse:
        """Give a model's statistics."""
        model_id = wire.read_name(request.name)
        stored = await self._store.get(model_id)
        model = await self._store.load(model_id)
        description = await asyncio.to_thread(describe, model)
        return wire_statistics.write_description(description, stored)

    async def SampleRequests(  # type: ignore[override]  # noqa: N802 it writes to its context
        self,
        request: pb.SampleRequestsRequest,
        context: ServicerContext[pb.SampleRequestsRequest, pb.SampleRequestsResponse],
    ) -> None:
        """Write batches until all are sent or the client has enough."""
        async with self._calls.open("SampleRequests"):
            violations: list[Violation] = []
            draw = wire_sampling.read_draw(request, violations)
            batch_size = wire_sampling.read_batch_size(request, violations)
            model = await self._model(draw, violations)
            sampler = await asyncio.to_thread(_sampler, model, draw, violations)
            if sampler is None or violations:
                raise InvalidInputError(violations)
            await _pass_over(sampler, draw, model)
            packer = Packer(model, draw.options.scales)

            def draw_batch(start: int, count: int) -> pb.SampleRequestsResponse:
                with wire_sampling.named_as_asked():
                    sample = sampler.draw(start, count)
                return wire_sampling.write_batch(packer.pack(sample))

            index, stop = draw.start_index, draw.stop_index(sampler.request_count)
            while index < stop:
                count = min(batch_size, stop - index)
                await context.write(await asyncio.to_thread(draw_batch, index, count))
                self._count_sampled(count)
                index += count

    async def StreamRequests(  # type: ignore[override]  # noqa: N802 it writes to its context
        self,
        request: pb.StreamRequestsRequest,
        context: ServicerContext[pb.StreamRequestsRequest, pb.StreamRequestsResponse],
    ) -> None:
        """Write requests with their prompts until all are sent or the client has enough."""
        async with self._calls.open("StreamRequests"):
            violations: list[Violation] = []
            draw = wire_sampling.read_draw(request, violations)
            model = await self._model(draw, violations)
            sampler = await asyncio.to_thread(_sampler, model, draw, violations)
            loop = asyncio.get_running_loop()
            renderer = await loop.run_in_executor(self._renderers, _renderer, request, violations)
            if sampler is None or renderer is None or violations:
                raise InvalidInputError(violations)
            await _pass_over(sampler, draw, model)

            def render_batch(start: int, most: int) -> pb.StreamRequestsResponse:
                with wire_sampling.named_as_asked():
                    sample = draw_for_prompts(sampler, start, most)
                return wire_prompts.write_requests(renderer.render(sample), request)

            index, stop = draw.start_index, draw.stop_index(sampler.request_count)
            while index < stop:
                response = await asyncio.to_thread(render_batch, index, stop - index)
                await context.write(response)
                self._count_rendered(len(response.requests))
                index += len(response.requests)

    async def _model(self, draw: wire_sampling.Draw, violations: list[Violation]) -> WorkloadModel:
        if any(violation.field == wire_sampling.MODEL_FIELD for violation in violations):
            raise InvalidInputError(violations)  # more cannot be found out without the model
        return await self._store.load(draw.model_id)


def _sampler(model: WorkloadModel, draw: wire_sampling.Draw, violations: list[Violation]) -> Sampler | None:
    """Return the sampler; append what is wrong with the options, or with where to begin."""
    try:
        sampler = Sampler(model, draw.options)
    except InvalidInputError as error:
        violations += wire_sampling.sampling_violations(error)
        return None
    violations += wire_sampling.start_violations(draw, model, sampler.request_count)
    return sampler


async def _pass_over(sampler: Sampler, draw: wire_sampling.Draw, model: WorkloadModel) -> None:
    """Have random arrivals added up to where the stream begins, in steps, so that the call can end meanwhile."""
    if draw.has_random_arrivals(model):
        for index in range(0, draw.start_index, _STEP):
            await asyncio.to_thread(sampler.draw, index, 1)


def _renderer(request: pb.StreamRequestsRequest, violations: list[Violation]) -> Renderer | None:
    """Return what makes prompts, which takes seconds for a new tokenizer; append what is wrong with the options."""
    try:
        return Renderer(wire_prompts.read_render_options(request, violations))
    except InvalidInputError as error:
        violations += error.violations
        return None
