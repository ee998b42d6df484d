"""The gRPC interface of TGIS: `fmaas.GenerationService`.

Invariant: a call that has ended, however it ended, holds no place in the batch.
Source of what is sent when: IBM/text-generation-inference, router/src/{grpc_server,batcher}.rs.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NoReturn

import grpc
import numpy as np
from grpc.aio import ServicerContext

from fmaas import generation_pb2 as pb
from fmaas.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from llmpilot_servicekit.server import Registration
from llmpilot_simulator import wire
from llmpilot_simulator.clock import NANOS_PER_SECOND, nanos
from llmpilot_simulator.faults import FAULT_HEADER, held_back, parse_faults
from llmpilot_simulator.http_exchange import REQUEST_ID_HEADER, SIMULATED_HEADER, Service
from llmpilot_simulator.http_stream import first_fault_index
from llmpilot_simulator.pace import OUT_OF_MEMORY
from llmpilot_simulator.realtime import Ticket
from llmpilot_simulator.tokenizer import Tokenizer

_CORRELATION_HEADER = "x-correlation-id"
"""TGIS's own name for the id of a call."""
_SEEDS = 2**32
_REFUSALS = {
    429: (grpc.StatusCode.RESOURCE_EXHAUSTED, "Model is overloaded"),
    503: (grpc.StatusCode.UNAVAILABLE, "The server is not ready"),
}
_DROPPED = "Socket closed (simulated)"
_NEVER = 1 << 62


class TgisServicer(GenerationServiceServicer):
    """Answers as TGIS, on the event loop of the server behind it."""

    def __init__(
        self, service: Service, *, max_new_tokens: int | None = None, sends_empty: bool = False, seed: int = 0
    ) -> None:
        """Serve what the other protocols serve.

        max_new_tokens: the most that a call may ask for; None: the context length. sends_empty: send a message for
        tokens whose text is still empty, as vllm-tgis-adapter does and TGIS does not. seed: of the seeds that the
        server draws.
        """
        self._service = service
        self._limits = wire.Limits(
            context_length=service.context_length, max_new_tokens=max_new_tokens or service.context_length
        )
        self._sends_empty = sends_empty
        self._random = np.random.default_rng(seed)

    def registration(self) -> Registration:
        """Return how a server takes this servicer."""
        service = pb.DESCRIPTOR.services_by_name["GenerationService"]
        return Registration(service_name=service.full_name, add=partial(add_GenerationServiceServicer_to_server, self))

    async def Generate(  # noqa: N802 named by the proto
        self,
        request: pb.BatchedGenerationRequest,
        context: "ServicerContext[pb.BatchedGenerationRequest, pb.BatchedGenerationResponse]",
    ) -> pb.BatchedGenerationResponse:
        """Continue several texts; none get an empty answer, as from TGIS."""
        call = _Call(self._service, context)
        await call.begin()
        wishes, prompts = self._read(request)
        replies = [_Reply(call, prompt, wishes, self._seed(wishes)) for prompt in prompts]
        try:
            for choice, reply in enumerate(replies):
                reply.submit(choice)
            for reply in replies:
                await reply.arrived(_NEVER)
                if reply.failure is not None:
                    await call.fail(reply)
        finally:
            for reply in replies:
                reply.cancel()
        tokenizer = self._service.tokenizer
        for reply in replies:
            reply.record(0, len(reply.due_nanos))
        return pb.BatchedGenerationResponse(responses=[_whole(reply, wishes, tokenizer) for reply in replies])

    async def GenerateStream(  # noqa: N802
        self,
        request: pb.SingleGenerationRequest,
        context: "ServicerContext[pb.SingleGenerationRequest, pb.GenerationResponse]",
    ) -> AsyncIterator[pb.GenerationResponse]:
        """Continue a text, a message per token."""
        call = _Call(self._service, context)
        await call.begin()
        wishes, (prompt,) = self._read(request)
        reply = _Reply(call, prompt, wishes, self._seed(wishes))
        try:
            reply.submit(0)
            yield wire.write_input(prompt, wishes, reply.seed)
            if wishes.shows_input_tokens and await reply.arrived(1):
                yield wire.write_input_tokens(prompt, wishes, self._service.tokenizer)
            async for response in self._messages(reply, wishes):
                yield response
            if reply.failure is not None:
                await call.fail(reply)
        finally:
            reply.cancel()

    async def Tokenize(  # noqa: N802
        self,
        request: pb.BatchedTokenizeRequest,
        context: "ServicerContext[pb.BatchedTokenizeRequest, pb.BatchedTokenizeResponse]",
    ) -> pb.BatchedTokenizeResponse:
        """Count tokens."""
        await _Call(self._service, context).say_simulated()
        return wire.write_tokenized(request, self._service.tokenizer)

    async def ModelInfo(  # noqa: N802
        self,
        request: pb.ModelInfoRequest,  # noqa: ARG002 one LLM is served
        context: "ServicerContext[pb.ModelInfoRequest, pb.ModelInfoResponse]",
    ) -> pb.ModelInfoResponse:
        """Describe the server."""
        await _Call(self._service, context).say_simulated()
        return wire.write_model_info(self._limits, is_encoder_decoder=self._service.is_encoder_decoder)

    def _read(self, request: wire.AnyGenerationRequest) -> tuple[wire.Wishes, list[wire.Prompt]]:
        return wire.read_generation_request(request, tokenizer=self._service.tokenizer, limits=self._limits)

    def _seed(self, wishes: wire.Wishes) -> int | None:
        """Return the seed of a reply that is sampled; TGIS draws one where none is given, and says which."""
        if not wishes.is_sampled:
            return None
        return int(self._random.integers(_SEEDS)) if wishes.seed is None else wishes.seed

    async def _messages(self, reply: "_Reply", wishes: wire.Wishes) -> AsyncIterator[pb.GenerationResponse]:
        """Give the messages with the output tokens; a failure ends them early."""
        first_index = sent_count = 0
        text = ""
        is_over = False
        while not is_over:
            end_index = await reply.arrived(first_index + reply.interval if first_index else 1)
            is_over = reply.has_ended and end_index == len(reply.due_nanos)
            is_end = is_over and reply.failure is None
            text += "".join(reply.texts[first_index:end_index])
            first_index = end_index
            shows_empty = end_index > sent_count and (wishes.shows_tokens or self._sends_empty)
            if is_end or text or shows_empty:
                response = wire.write_tokens(reply.generation, sent_count, end_index, wishes, text)
                if is_end:
                    reply.write_end(response)
                reply.record(sent_count, end_index)
                yield response
                sent_count, text = end_index, ""


def _whole(reply: "_Reply", wishes: wire.Wishes, tokenizer: Tokenizer) -> pb.GenerationResponse:
    token_count = len(reply.due_nanos)
    response = wire.write_whole(
        reply.generation,
        token_count,
        reply.prompt,
        wishes,
        text="".join(reply.texts[:token_count]),
        tokenizer=tokenizer,
    )
    reply.write_end(response)
    return response


class _Call:
    """What every call begins with."""

    def __init__(self, service: Service, context: "ServicerContext[Any, Any]") -> None:
        self.service = service
        self.arrival_nanos = service.server.now_nanos()
        self.faults = service.faults.each_request
        self._context = context
        self._metadata = dict(context.invocation_metadata() or ())
        ids = (self._metadata.get(name) for name in (REQUEST_ID_HEADER, _CORRELATION_HEADER))
        self.request_id = next((str(each) for each in ids if each), None) or uuid.uuid4().hex

    async def say_simulated(self) -> None:
        """Send the metadata that come before everything."""
        await self._context.send_initial_metadata(
            ((SIMULATED_HEADER, "true"), (REQUEST_ID_HEADER, self.request_id)),
        )

    async def begin(self) -> None:
        """Let the call in or end it; raises InvalidInputError for a bad fault header."""
        await self.say_simulated()
        self.faults = parse_faults(str(self._metadata.get(FAULT_HEADER, "")), self.faults)
        server = self.service.server
        status = self.service.gate.rejection(
            self.faults,
            now_seconds=self.arrival_nanos / NANOS_PER_SECOND,
            waiting_count=server.load.waiting_count,
        )
        if status is not None:
            server.statistics.rejected += 1
            await self._context.abort(*_REFUSALS[status])

    async def fail(self, reply: "_Reply") -> NoReturn:
        """End the call with a reply's failure, in TGIS's words."""
        if reply.is_dropped:
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, _DROPPED)
        count = len(reply.due_nanos)
        after = f"Error after generating {count} tokens: " if count else ""
        await self._context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"Request failed during generation: {after}{reply.failure}"
        )


class _Reply:
    """One sequence, from the batch to the call that sends it: a TokenSink."""

    def __init__(self, call: _Call, prompt: wire.Prompt, wishes: wire.Wishes, seed: int | None) -> None:
        self._call = call
        self._server = call.service.server
        self.prompt = prompt
        self.seed = seed
        self.generation = call.service.generator.plan(wishes.generation_request(prompt, seed))
        self.texts = held_back(self.generation.pieces, call.faults.empty_every)
        self.interval = call.faults.stream_interval
        self.due_nanos: list[int] = []
        """When each token was due that has arrived, on the wall clock."""
        self.has_ended = False
        self.failure: str | None = None
        self.is_dropped = False
        self._is_late = False
        self._fault_index = first_fault_index(call.faults)
        self._limit_seconds = wishes.time_limit_seconds
        self._deadline_nanos = _NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._ticket: Ticket | None = None
        self._log_number = 0
        self._wanted = 0
        self._waiter: asyncio.Future[None] | None = None

    def submit(self, choice: int) -> None:
        """Queue it; raises InvalidInputError for one that can never be scheduled."""
        arrival_nanos = self._call.arrival_nanos
        log = self._call.service.log
        wall_nanos = self._server.wall_nanos_of(arrival_nanos)
        self._ticket = self._server.submit(
            self.generation, self, max_tokens=self.prompt.max_tokens, arrival_nanos=arrival_nanos
        )
        if log is not None:
            self._log_number = log.register(self._call.request_id, choice, wall_nanos)
        if self._limit_seconds is not None:
            self._deadline_nanos = wall_nanos + nanos(self._limit_seconds)
            self._timer = asyncio.get_running_loop().call_later(self._limit_seconds, self._expire)

    def cancel(self) -> None:
        """Free its place, if it has one."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ticket is not None:
            self._server.cancel(self._ticket)

    async def arrived(self, wanted: int) -> int:
        """Wait until so many tokens have arrived or none follow; returns how many have, `wanted` at most."""
        if len(self.due_nanos) < wanted and not self.has_ended:
            self._wanted = wanted
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return min(wanted, len(self.due_nanos))

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Keep the tokens for the call."""
        if first_index + count > self._fault_index:
            self._break()
            return
        self.due_nanos.extend([due_nanos] * count)
        if due_nanos > self._deadline_nanos:  # TGIS looks when it has the token
            self._stop(is_late=True)
        elif len(self.due_nanos) >= self._wanted:
            self._wake()

    def on_end(self, failure: str | None) -> None:
        """Let the call end."""
        self.failure = failure
        self.has_ended = True
        self._wake()

    def record(self, first_index: int, end_index: int) -> None:
        """Write to the log that a message with these tokens leaves now."""
        log = self._call.service.log
        if log is not None:
            written_nanos = self._call.service.clock.wall_nanos()
            count = end_index - first_index
            for index in range(first_index, end_index):
                log.extend((self._log_number, index, self.due_nanos[index], written_nanos, count))

    def write_end(self, response: pb.GenerationResponse) -> None:
        """Say in the last message why there is no more."""
        wire.write_end(response, self.generation, self.prompt, self.seed, is_late=self._is_late)

    def _expire(self) -> None:
        """Give up a request whose time is over before its first token."""
        if not self.due_nanos and not self.has_ended:
            self._stop(is_late=True)

    def _break(self) -> None:
        """Do what the injected fault says."""
        if self._call.faults.out_of_memory_after == self._fault_index:
            self.failure = OUT_OF_MEMORY
        else:
            self.failure = _DROPPED
            self.is_dropped = True
        self._stop(is_late=False)

    def _stop(self, *, is_late: bool) -> None:
        self._is_late = is_late
        self.has_ended = True
        if self._ticket is not None:
            self._server.cancel(self._ticket)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
