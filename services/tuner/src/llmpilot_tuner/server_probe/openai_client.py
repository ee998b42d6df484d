"""Speaks to vLLM, over OpenAI's API with vLLM's extensions.

Invariant: prompts are token ids and replies ignore the end of the text, so both lengths are exact.
Source: vLLM 0.19 to 0.32, entrypoints/openai.
"""

import asyncio
from collections.abc import Sequence

from llmpilot_tuner.server_probe.batch_requests import RequestGroup
from llmpilot_tuner.server_probe.client import RequestFailedError, ServerFacts
from llmpilot_tuner.server_probe.http_client import HttpClient, Json
from llmpilot_tuner.server_probe.live_tokens import LiveTokens
from llmpilot_tuner.server_probe.metrics import largest, vllm_cache_tokens
from llmpilot_tuner.server_probe.prompts import Prompts


class OpenAiClient:
    """A ServerClient."""

    def __init__(self, url: str, prompts: Prompts) -> None:
        self._http = HttpClient(url)
        self._prompts = prompts
        self._model = ""

    async def is_healthy(self) -> bool:
        """Ask /health."""
        return await self._http.is_ok("/health")

    async def facts(self) -> ServerFacts:
        """Ask /v1/models, /version and /metrics."""
        models = await self._http.json("/v1/models")
        cards = models.get("data")
        if not isinstance(cards, list) or not cards:
            raise RequestFailedError("the server lists no model under /v1/models")
        self._model = str(cards[0].get("id", ""))
        longest = cards[0].get("max_model_len")
        version = (await self._http.json("/version")).get("version", "") if await self._http.is_ok("/version") else ""
        metrics = await self._http.text("/metrics") if await self._http.is_ok("/metrics") else ""
        return ServerFacts(
            name="vllm",
            model=self._model,
            version=str(version),
            weight=vllm_cache_tokens(metrics),
            longest_sequence=longest if isinstance(longest, int) else None,
        )

    async def used_share(self) -> float | None:
        """Ask how much of the KV cache is taken."""
        try:
            metrics = await self._http.text("/metrics")
        except RequestFailedError:
            return None
        share = largest(metrics, "vllm:kv_cache_usage_perc")
        return largest(metrics, "vllm:gpu_cache_usage_perc") if share is None else share  # its name before 0.10

    async def send(self, group: RequestGroup, serials: Sequence[int], live: LiveTokens) -> None:
        """Send each request over a connection of its own."""
        async with asyncio.TaskGroup() as tasks:
            for serial in serials:
                tasks.create_task(self._complete(group, serial, live))

    async def _complete(self, group: RequestGroup, serial: int, live: LiveTokens) -> None:
        body: Json = {
            "model": self._model,
            "prompt": self._prompts.token_ids(group.input_tokens),
            "max_tokens": group.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if group.wants_input_logprobs:
            body["prompt_logprobs"] = 1
        input_tokens = output_tokens = 0
        async for event in self._http.events("/v1/completions", body):
            usage = event.get("usage")
            if not isinstance(usage, dict):
                continue
            input_tokens = int(usage.get("prompt_tokens") or 0)
            output_tokens = int(usage.get("completion_tokens") or 0)
            if output_tokens:
                is_last = output_tokens >= group.output_tokens
                live.grew(serial, input_tokens=input_tokens, output_tokens=output_tokens, is_last=is_last)
        live.ended(serial)
        if (input_tokens, output_tokens) != (group.input_tokens, group.output_tokens):
            raise RequestFailedError(
                f"a reply has {input_tokens} input and {output_tokens} output tokens, asked for were "
                f"{group.input_tokens} and {group.output_tokens}",
                is_gone=not output_tokens,
            )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()
