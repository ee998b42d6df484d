"""The endpoints of TGI (Text Generation Inference, Hugging Face).

Invariant: status codes, error types and messages are those of TGI, so that a client handles them as it would there.
Source: text-generation-inference, router/src/server.rs.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import TgiPolicy
from llmpilot_simulator.generation import GenerationRequest
from llmpilot_simulator.http_exchange import Exchange, Job, Refusal, Service, json_response, retry_headers
from llmpilot_simulator.tgi_frames import TgiStream, error_body, error_event, generation_failure, whole_body
from llmpilot_simulator.tgi_requests import MAX_STOP_SEQUENCES, GenerateRequest, parse

_EVENT_STREAM = "text/event-stream"
_SEEDS = 2**63
_Send = Callable[[Exchange, GenerateRequest], Awaitable[web.StreamResponse]]


def add_tgi_routes(router: web.UrlDispatcher, service: Service) -> None:
    """Listen as TGI."""
    endpoints = TgiEndpoints(service)
    router.add_post("/", endpoints.compatible)
    router.add_post("/generate", endpoints.generate)
    router.add_post("/generate_stream", endpoints.generate_stream)
    router.add_get("/info", endpoints.info)


class TgiEndpoints:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Continue a text."""
        return await self._answer(request, self._send_whole)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """Continue a text, token by token."""
        return await self._answer(request, self._send_stream)

    async def compatible(self, request: web.Request) -> web.StreamResponse:
        """Continue a text, token by token if the body says so."""

        async def send(exchange: Exchange, body: GenerateRequest) -> web.StreamResponse:
            if body.stream:
                return await self._send_stream(exchange, body)
            return await self._send_whole(exchange, body, is_list=True)

        return await self._answer(request, send)

    async def info(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 the server's signature
        """Describe the server."""
        service = self._service
        return json_response(
            {
                "model_id": service.public_model_id,
                "model_sha": None,
                "model_dtype": "simulated",
                "model_device_type": "simulated",
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": None,
                "max_best_of": 1,
                "max_stop_sequences": MAX_STOP_SEQUENCES,
                "max_input_length": service.context_length - 1,
                "max_input_tokens": service.context_length - 1,
                "max_total_tokens": service.context_length,
                **_batch_limits(service),
                "version": service.version,
                "sha": None,
                "docker_label": None,
                "router": "llm-pilot simulator",
                "simulated": True,
            }
        )

    async def _answer(self, request: web.Request, send: _Send) -> web.StreamResponse:
        exchange = Exchange(self._service, request)
        try:
            content = await exchange.read()
            exchange.admit()
            return await send(exchange, parse(content))
        except InvalidInputError as error:
            refusal = Refusal(422, f"Input validation error: {error}")
        except Refusal as raised:
            refusal = raised
        headers = exchange.headers | retry_headers(refusal.status)
        return json_response(error_body(refusal.status, refusal.message), status=refusal.status, headers=headers)

    async def _send_stream(self, exchange: Exchange, body: GenerateRequest) -> web.StreamResponse:
        try:
            job = await self._job(exchange, body, is_stream=True)
            frames = TgiStream(
                texts=exchange.texts(job.generation),
                generation=job.generation,
                prompt=_echo(body),
                has_details=body.parameters.details,
                seed=body.parameters.seed,
            )
            return await exchange.stream(frames, [job], [frames], _EVENT_STREAM)
        except InvalidInputError as error:
            message = f"Input validation error: {error}"
        except Refusal as refusal:
            message = refusal.message
        # TGI has decided to stream by now: the error is an event
        return web.Response(text=error_event(422, message), content_type=_EVENT_STREAM, headers=exchange.headers)

    async def _send_whole(
        self, exchange: Exchange, body: GenerateRequest, *, is_list: bool = False
    ) -> web.StreamResponse:
        job = await self._job(exchange, body, is_stream=False)

        def whole() -> object:
            reply = whole_body(
                texts=exchange.texts(job.generation),
                generation=job.generation,
                prompt=_echo(body),
                has_details=body.parameters.details or body.parameters.decoder_input_details,
                seed=body.parameters.seed,
            )
            return [reply] if is_list else reply

        try:
            return await exchange.collect([job], whole)
        except Refusal as refusal:  # the model server failed
            raise Refusal(424, generation_failure(refusal.message)) from refusal

    async def _job(self, exchange: Exchange, body: GenerateRequest, *, is_stream: bool) -> Job:
        """Say what to generate; raises Refusal with what TGI would refuse."""
        service, given = self._service, body.parameters
        max_input_tokens = service.context_length - 1
        problems = body.problems(max_input_tokens=max_input_tokens, is_stream=is_stream)
        ids = await exchange.encode(body.inputs)
        if given.truncate is not None and given.truncate > 0:
            ids = ids[-given.truncate :]
        input_tokens = len(ids)
        max_new_tokens = given.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = max(service.context_length - input_tokens, 1)
        if input_tokens + max_new_tokens > service.context_length:
            problems.append(
                f"`inputs` tokens + `max_new_tokens` must be <= {service.context_length}. "
                f"Given: {input_tokens} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
            )
        if problems:
            raise Refusal(422, f"Input validation error: {'; '.join(problems)}")
        request = GenerationRequest(
            prompt=ids,
            max_tokens=max_new_tokens,
            stop=tuple(filter(None, given.stop)),
            seed=None if given.seed is None else given.seed % _SEEDS,
            include_stop=True,
        )
        return Job(generation=service.generator.plan(request), max_tokens=max_new_tokens)


def _echo(body: GenerateRequest) -> str:
    return body.inputs if body.parameters.return_full_text else ""


def _batch_limits(service: Service) -> dict[str, object]:
    """Return what TGI says of its batches; nothing where the times are another server's, or fixed."""
    policy = service.policy
    if not isinstance(policy, TgiPolicy):
        return {}
    return {
        "waiting_served_ratio": policy.waiting_served_ratio,
        "max_batch_total_tokens": policy.max_batch_total_tokens,
        "max_waiting_tokens": policy.max_waiting_tokens,
        "max_batch_size": policy.max_batch_size,
    }
