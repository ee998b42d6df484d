"""Speaks to TGIS, IBM's Text Generation Inference Server, over gRPC.

Invariant: an input is cut to its exact length by the server itself, and a reply does not end before its length.
Source: proto/fmaas/generation.proto; router/src/grpc_server.rs.
"""

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

import grpc

from fmaas import generation_pb2 as pb
from fmaas.generation_pb2_grpc import GenerationServiceStub
from llmpilot_tuner.server_probe.batch_requests import RequestGroup
from llmpilot_tuner.server_probe.client import RequestFailedError, ServerFacts
from llmpilot_tuner.server_probe.live_tokens import LiveTokens
from llmpilot_tuner.server_probe.prompts import Prompts

_ASK_SECONDS = 15.0
_LARGEST_CALL_BYTES = 3 * 2**20
"""Servers take 4 MiB."""
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
_NOT_READY = "not ready"
_OVERLOADED = "overloaded"


class TgisClient:
    """A ServerClient."""

    def __init__(self, url: str, prompts: Prompts) -> None:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        # its own connections: after a restart, a shared one would wait before it looks for the server again
        options += [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
        if parts.scheme in {"grpcs", "https"}:
            self._channel = grpc.aio.secure_channel(parts.netloc, grpc.ssl_channel_credentials(), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(parts.netloc, options=options)
        self._stub = GenerationServiceStub(self._channel)
        self._prompts = prompts

    async def is_healthy(self) -> bool:
        """Ask for the model."""
        try:
            await self._model_info()
        except RequestFailedError:
            return False
        return True

    async def facts(self) -> ServerFacts:
        """Ask for the model; TGIS does not say what its maximum batch weight is."""
        info = await self._model_info()
        return ServerFacts(
            name="tgis",
            longest_sequence=info.max_sequence_length or None,
            most_new_tokens=info.max_new_tokens or None,
        )

    async def used_share(self) -> float | None:
        """Return that TGIS does not say it over gRPC."""
        return None

    async def send(self, group: RequestGroup, serials: Sequence[int], live: LiveTokens) -> None:
        """Send prefills in one call, which enter TGIS's queue together; longer replies one by one, to see them grow."""
        texts = [self._prompts.text(group.input_tokens) for _ in serials]
        if group.output_tokens == 1 and sum(map(len, texts)) <= _LARGEST_CALL_BYTES:
            await self._together(group, serials, texts, live)
        else:
            async with asyncio.TaskGroup() as tasks:
                for serial, text in zip(serials, texts, strict=True):
                    tasks.create_task(self._stream(group, serial, text, live))

    async def _together(
        self, group: RequestGroup, serials: Sequence[int], texts: Sequence[str], live: LiveTokens
    ) -> None:
        request = pb.BatchedGenerationRequest(
            requests=[pb.GenerationRequest(text=text) for text in texts], params=_parameters(group)
        )
        try:
            reply = await self._stub.Generate(request)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        for serial, response in zip(serials, reply.responses, strict=True):
            live.grew(serial, input_tokens=response.input_token_count, output_tokens=response.generated_token_count)
        for serial, response in zip(serials, reply.responses, strict=True):
            live.ended(serial)
            _check(group, response.input_token_count, response.generated_token_count)

    async def _stream(self, group: RequestGroup, serial: int, text: str, live: LiveTokens) -> None:
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=_parameters(group))
        input_tokens = output_tokens = 0
        try:
            async for message in self._stub.GenerateStream(request):
                input_tokens = message.input_token_count or input_tokens
                if message.generated_token_count:
                    output_tokens = message.generated_token_count
                    is_last = output_tokens >= group.output_tokens
                    live.grew(serial, input_tokens=input_tokens, output_tokens=output_tokens, is_last=is_last)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        live.ended(serial)
        _check(group, input_tokens, output_tokens)

    async def _model_info(self) -> pb.ModelInfoResponse:
        try:
            info: pb.ModelInfoResponse = await self._stub.ModelInfo(pb.ModelInfoRequest(), timeout=_ASK_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        return info

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


def _parameters(group: RequestGroup) -> pb.Parameters:
    output = group.output_tokens
    return pb.Parameters(
        method=pb.GREEDY,
        stopping=pb.StoppingCriteria(max_new_tokens=output, min_new_tokens=output),
        response=pb.ResponseOptions(input_tokens=group.wants_input_logprobs, token_logprobs=group.wants_input_logprobs),
        truncate_input_tokens=group.input_tokens,
    )


def _check(group: RequestGroup, input_tokens: int, output_tokens: int) -> None:
    if (input_tokens, output_tokens) != (group.input_tokens, group.output_tokens):
        raise RequestFailedError(
            f"a reply has {input_tokens} input and {output_tokens} output tokens, asked for were {group.input_tokens} "
            f"and {group.output_tokens}"
        )


def _failed(error: grpc.aio.AioRpcError) -> RequestFailedError:
    code, said = error.code(), error.details() or ""
    is_turned_away = _NOT_READY in said or _OVERLOADED in said
    return RequestFailedError(
        f"{code.name}: {said}", is_gone=code in _GONE and not is_turned_away, is_turned_away=is_turned_away
    )
