"""The endpoints of OpenAI's API as vLLM serves them.

Invariant: status codes, error bodies and messages are those of vLLM, so that a client handles them as it would there.
Source of the message about the context length: vllm/renderers/params.py.
"""

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_simulator.clock import NANOS_PER_SECOND
from llmpilot_simulator.generation import Generation, GenerationRequest
from llmpilot_simulator.http_exchange import Exchange, Job, Refusal, Service, json_response, retry_headers
from llmpilot_simulator.openai_frames import (
    Identity,
    OpenAiReply,
    chat_body,
    chat_choice,
    completion_body,
    completion_choice,
    error_body,
    role_frames,
    usage_of,
)
from llmpilot_simulator.openai_requests import ChatRequest, CompletionRequest, OpenAiRequest, parse

_SEEDS = 2**63
_EVENT_STREAM = "text/event-stream; charset=utf-8"


def add_openai_routes(router: web.UrlDispatcher, service: Service) -> None:
    """Listen as OpenAI."""
    endpoints = OpenAiEndpoints(service)
    router.add_post("/v1/completions", endpoints.completions)
    router.add_post("/v1/chat/completions", endpoints.chat_completions)
    router.add_get("/v1/models", endpoints.models)
    router.add_get("/v1/models/{model:.+}", endpoints.model)


class OpenAiEndpoints:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Continue texts."""
        return await self._answer(request, self._complete)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Continue a conversation."""
        return await self._answer(request, self._chat)

    async def models(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 the server's signature
        """List the one model."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Describe the model."""
        name = request.match_info["model"]
        if self._service.serves(name):
            return json_response(self._card())
        return json_response(error_body(404, _unknown(name), "model"), status=404)

    async def _answer(
        self, request: web.Request, serve: Callable[[Exchange, bytes], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        exchange = Exchange(self._service, request)
        try:
            content = await exchange.read()
            exchange.admit()
            return await serve(exchange, content)
        except InvalidInputError as error:
            refusal = Refusal(400, str(error))
        except Refusal as raised:
            refusal = raised
        body = error_body(refusal.status, refusal.message, refusal.param)
        return json_response(body, status=refusal.status, headers=exchange.headers | retry_headers(refusal.status))

    async def _complete(self, exchange: Exchange, content: bytes) -> web.StreamResponse:
        body = parse(CompletionRequest, content)
        identity = self._identity(exchange, "cmpl", body)
        jobs = await self._jobs(exchange, body, body.prompts, body.max_tokens)
        texts = [exchange.texts(job.generation) for job in jobs]
        if body.echo:
            prompts = [self._text(prompt) for prompt in body.prompts for _ in range(body.n)]
            texts = [(prompt + first, *rest) for prompt, (first, *rest) in zip(prompts, texts, strict=True)]
        usage = _usage(jobs, choices_per_prompt=body.n)
        if not body.stream:
            return await exchange.collect(jobs, lambda: completion_body(identity, texts, _generations(jobs), usage))
        frames = [
            completion_choice(
                identity, index, texts[index], job.generation, has_continuous_usage=body.has_continuous_usage
            )
            for index, job in enumerate(jobs)
        ]
        head = identity.head("text_completion")
        reply = OpenAiReply(head=head, opening="", usage=usage if body.has_usage else None)
        return await exchange.stream(reply, jobs, frames, _EVENT_STREAM)

    async def _chat(self, exchange: Exchange, content: bytes) -> web.StreamResponse:
        body = parse(ChatRequest, content)
        identity = self._identity(exchange, "chatcmpl", body)
        jobs = await self._jobs(exchange, body, [body.prompt], body.limit)
        texts = [exchange.texts(job.generation) for job in jobs]
        usage = _usage(jobs, choices_per_prompt=body.n)
        if not body.stream:
            return await exchange.collect(jobs, lambda: chat_body(identity, texts, _generations(jobs), usage))
        frames = [
            chat_choice(identity, index, texts[index], job.generation, has_continuous_usage=body.has_continuous_usage)
            for index, job in enumerate(jobs)
        ]
        prompt_tokens = jobs[0].generation.input_tokens if body.has_continuous_usage else None
        reply = OpenAiReply(
            head=identity.head("chat.completion.chunk"),
            opening=role_frames(identity, body.n, prompt_tokens=prompt_tokens),
            usage=usage if body.has_usage else None,
        )
        return await exchange.stream(reply, jobs, frames, _EVENT_STREAM)

    def _identity(self, exchange: Exchange, prefix: str, body: OpenAiRequest) -> Identity:
        service = self._service
        if not service.serves(body.model):
            raise Refusal(404, _unknown(str(body.model)), param="model")
        return Identity(
            id=f"{prefix}-{exchange.request_id}",
            created_seconds=service.clock.wall_nanos() // NANOS_PER_SECOND,
            model=service.public_model_id,
        )

    async def _jobs(
        self, exchange: Exchange, body: OpenAiRequest, prompts: Sequence[str | list[int]], max_tokens: int | None
    ) -> list[Job]:
        """Say what every choice generates, those of the first prompt first."""
        jobs = []
        for prompt in prompts:
            ids = await exchange.encode(prompt) if isinstance(prompt, str) else prompt
            if body.truncate_prompt_tokens is not None:
                ids = ids[-body.truncate_prompt_tokens :]
            limit = self._limit(len(ids), max_tokens)
            for choice in range(body.n):
                request = GenerationRequest(
                    prompt=ids,
                    max_tokens=limit,
                    min_tokens=body.min_tokens,
                    ignore_eos=body.ignore_eos,
                    stop=body.stop_texts,
                    seed=None if body.seed is None else (body.seed + choice) % _SEEDS,
                    include_stop=body.include_stop_str_in_output,
                )
                jobs.append(Job(generation=self._service.generator.plan(request), max_tokens=limit))
        return jobs

    def _limit(self, input_tokens: int, max_tokens: int | None) -> int:
        """Return how many tokens a reply may have; raises Refusal where there is no room."""
        context_length = self._service.context_length
        wanted = max_tokens or 1
        if input_tokens + wanted <= context_length:
            return max_tokens or context_length - input_tokens
        raise Refusal(
            400,
            f"This model's maximum context length is {context_length} tokens. However, you requested {wanted} output "
            f"tokens and your prompt contains {input_tokens} input tokens, for a total of {input_tokens + wanted} "
            "tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)

    def _card(self) -> dict[str, object]:
        service = self._service
        return {
            "id": service.public_model_id,
            "object": "model",
            "created": service.start_seconds,
            "owned_by": "llm-pilot simulator",
            "root": service.model_id,
            "parent": None,
            "max_model_len": service.context_length,
            "simulated": True,
        }


def _unknown(model: str) -> str:
    return f"The model `{model}` does not exist."


def _generations(jobs: Sequence[Job]) -> list[Generation]:
    return [job.generation for job in jobs]


def _usage(jobs: Sequence[Job], *, choices_per_prompt: int) -> dict[str, int]:
    prompt_tokens = sum(job.generation.input_tokens for job in jobs[::choices_per_prompt])
    return usage_of(prompt_tokens, sum(len(job.generation.pieces) for job in jobs))
