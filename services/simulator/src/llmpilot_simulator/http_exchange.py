"""What every generating endpoint does with a request, whatever its dialect: let it in, run it, send or refuse.

Invariant: a request that has left, however it left, holds no place in the batch.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import HttpVersion11, web

from llmpilot_perfmodel.batching.policies import Policy
from llmpilot_simulator.clock import NANOS_PER_SECOND, Clock
from llmpilot_simulator.faults import FAULT_HEADER, Faults, Gate, ServerFaults, held_back, parse_faults
from llmpilot_simulator.generation import Generation, Generator
from llmpilot_simulator.http_stream import (
    ChoiceFrames,
    ReplyFrames,
    StreamedChoice,
    StreamedReply,
    drop,
    first_fault_index,
)
from llmpilot_simulator.pace import OUT_OF_MEMORY
from llmpilot_simulator.realtime import RealTimeServer, Ticket
from llmpilot_simulator.tokenizer import Tokenizer
from llmpilot_simulator.write_log import WriteLog

SIMULATED_SUFFIX = "-simulated"
SIMULATED_HEADER = "x-llm-pilot-simulated"
REQUEST_ID_HEADER = "x-request-id"
RETRY_AFTER_SECONDS = 1
_LONGEST_REQUEST_ID = 256
_SHORT_TEXT = 20_000
"""Characters that are encoded at once, in about a millisecond."""
_PART_TOKENS = 2000
_REJECTIONS: dict[int, str] = {
    HTTPStatus.TOO_MANY_REQUESTS: "Model is overloaded",
    HTTPStatus.SERVICE_UNAVAILABLE: "The server is not ready",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the endpoints share."""

    model_id: str
    """Without the suffix."""
    context_length: int
    """Tokens of prompt and reply together."""
    is_encoder_decoder: bool
    policy: Policy | None
    """None: times are fixed, and nothing limits a batch."""
    tokenizer: Tokenizer
    generator: Generator
    server: RealTimeServer
    clock: Clock
    gate: Gate
    faults: ServerFaults
    log: WriteLog | None
    slow_reader_seconds: float
    """How long a client may not read before its connection is closed."""
    start_seconds: int
    """Unix time."""
    version: str

    @property
    def public_model_id(self) -> str:
        """The name that replies carry."""
        return self.model_id + SIMULATED_SUFFIX

    def serves(self, model: str | None) -> bool:
        """Whether a request for this model can be answered; None: any."""
        return model is None or model in {self.model_id, self.public_model_id}


class Refusal(Exception):  # noqa: N818 an answer, not an error of this program
    """A request that is not served, before any of its reply is sent."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One sequence to generate."""

    generation: Generation
    max_tokens: int
    """What the scheduler reserves for."""


class Exchange:
    """One request on its way through the service."""

    def __init__(self, service: Service, request: web.Request) -> None:
        self.service = service
        self.request = request
        self.arrival_nanos = service.server.now_nanos()
        self.request_id = _request_id(request.headers.get(REQUEST_ID_HEADER, ""))
        self.faults = service.faults.each_request

    def admit(self) -> None:
        """Read the fault header and let the request in; raises Refusal, or InvalidInputError for a bad header."""
        self.faults = parse_faults(self.request.headers.get(FAULT_HEADER), self.faults)
        server = self.service.server
        status = self.service.gate.rejection(
            self.faults,
            now_seconds=self.arrival_nanos / NANOS_PER_SECOND,
            waiting_count=server.load.waiting_count,
        )
        if status is not None:
            server.statistics.rejected += 1
            raise Refusal(status, _REJECTIONS[status])

    async def read(self) -> bytes:
        """Return the body, whose end is when the request arrives; raises Refusal where it cannot be read."""
        try:
            content = await self.request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise Refusal(413, f"{error.text} Please send a shorter prompt.") from error
        except web.RequestPayloadError as error:
            raise Refusal(400, "The body cannot be read; do its length and its Content-Encoding fit?") from error
        self.arrival_nanos = self.service.server.now_nanos()
        return content

    async def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt; tokens of other replies leave while a long one is encoded."""
        tokenizer = self.service.tokenizer
        if len(text) <= _SHORT_TEXT:
            return tokenizer.encode(text)
        ids: list[int] = []
        for part in tokenizer.encode_parts(text, _PART_TOKENS):
            ids += part
            await asyncio.sleep(0)
        self.arrival_nanos = self.service.server.now_nanos()
        return ids

    def texts(self, generation: Generation) -> tuple[str, ...]:
        """Return the text that each token brings to the client."""
        return held_back(generation.pieces, self.faults.empty_every)

    async def stream(
        self, reply_frames: ReplyFrames, jobs: Sequence[Job], frames: Sequence[ChoiceFrames], content_type: str
    ) -> web.StreamResponse:
        """Send the reply as server-sent events, one choice per job; raises InvalidInputError before it sends."""
        transport = self.request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        response = web.StreamResponse(
            headers={"Content-Type": content_type, "Cache-Control": "no-cache"} | self.headers
        )
        if self.request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        reply = self._streamed_reply(transport, reply_frames, choice_count=len(jobs), is_chunked=response.chunked)
        tickets: list[Ticket] = []
        try:
            for index, (job, choice_frames) in enumerate(zip(jobs, frames, strict=True)):
                token_count = len(job.generation.pieces)
                sink = StreamedChoice(reply, choice_frames, token_count=token_count, log_number=self._log_number(index))
                sink.ticket = self._submit(job, sink)
                tickets.append(sink.ticket)
            await response.prepare(self.request)
            reply.begin()
            await reply.finished
        except ConnectionResetError:  # the client left before the first token
            return response
        finally:
            for ticket in tickets:
                self.service.server.cancel(ticket)
        if not transport.is_closing():
            await response.write_eof()
        return response

    def _streamed_reply(
        self, transport: asyncio.Transport, frames: ReplyFrames, *, choice_count: int, is_chunked: bool
    ) -> StreamedReply:
        service = self.service
        return StreamedReply(
            transport=transport,
            frames=frames,
            server=service.server,
            clock=service.clock,
            log=service.log,
            faults=self.faults,
            slow_reader_seconds=service.slow_reader_seconds,
            is_chunked=is_chunked,
            choice_count=choice_count,
        )

    async def collect(self, jobs: Sequence[Job], body: Callable[[], object]) -> web.StreamResponse:
        """Send the reply whole when its last token is due; raises InvalidInputError, or Refusal when it fails."""
        tickets: list[Ticket] = []
        collected = [CollectedChoice(self.service.server, self.faults) for _ in jobs]
        try:
            for job, sink in zip(jobs, collected, strict=True):
                sink.ticket = self._submit(job, sink)
                tickets.append(sink.ticket)
            for sink in collected:
                await sink.finished
                if sink.failure is not None or sink.is_dropped:
                    break
        finally:
            for ticket in tickets:
                self.service.server.cancel(ticket)
        return await self._send_collected(collected, body)

    async def _send_collected(
        self, collected: Sequence["CollectedChoice"], body: Callable[[], object]
    ) -> web.StreamResponse:
        failure = next((sink.failure for sink in collected if sink.failure is not None), None)
        if failure is not None:
            raise Refusal(500, failure)
        if self.request.transport is not None and any(sink.is_dropped for sink in collected):
            drop(self.request.transport, by_reset=self.faults.reset_after is not None)
        response = json_response(body(), headers=self.headers)
        log = self.service.log
        await response.prepare(self.request)
        written_nanos = self.service.clock.wall_nanos()
        await response.write_eof()
        if log is not None:
            for index, sink in enumerate(collected):
                number = self._log_number(index)
                for token_index, due_nanos in enumerate(sink.due_nanos):
                    log.extend((number, token_index, due_nanos, written_nanos, len(sink.due_nanos)))
        return response

    def _submit(self, job: Job, sink: "StreamedChoice | CollectedChoice") -> Ticket:
        return self.service.server.submit(
            job.generation, sink, max_tokens=job.max_tokens, arrival_nanos=self.arrival_nanos
        )

    def _log_number(self, index: int) -> int:
        log = self.service.log
        if log is None:
            return 0
        return log.register(self.request_id, index, self.service.server.wall_nanos_of(self.arrival_nanos))

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every answer to this request."""
        return {REQUEST_ID_HEADER: self.request_id}


class CollectedChoice:
    """One choice of a reply that is sent whole: a TokenSink."""

    def __init__(self, server: RealTimeServer, faults: Faults) -> None:
        self._server = server
        self._faults = faults
        self._fault_index = first_fault_index(faults)
        self.due_nanos: list[int] = []
        """When each token was due, on the wall clock."""
        self.failure: str | None = None
        self.is_dropped = False
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ticket: Ticket | None = None
        """Set when the request is taken in."""

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Keep the time."""
        if first_index + count <= self._fault_index or self.ticket is None:
            self.due_nanos.extend([due_nanos] * count)
        elif self._faults.out_of_memory_after == self._fault_index:
            self._server.cancel(self.ticket, failure=OUT_OF_MEMORY)
        else:
            self.is_dropped = True
            self._server.cancel(self.ticket)
            self._finish()

    def on_end(self, failure: str | None) -> None:
        """Let the reply go."""
        self.failure = failure
        self._finish()

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)


def _request_id(given: str) -> str:
    """Return the client's own id if it can be sent back as it is, else a new one."""
    is_usable = given.isascii() and given.isprintable() and 0 < len(given) <= _LONGEST_REQUEST_ID
    return given if is_usable else uuid.uuid4().hex


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a response with a JSON body."""
    return web.Response(
        status=status, body=json.dumps(body).encode(), content_type="application/json", headers=dict(headers or {})
    )


def retry_headers(status: int) -> dict[str, str]:
    """Return what a client that is turned away is told."""
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in _REJECTIONS else {}
