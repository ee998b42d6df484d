"""Speaks to TGI, Hugging Face's Text Generation Inference, over its own API.

Invariant: an input is cut to its exact length by the server itself. A reply may end before its length, since TGI has no
way to ask for more; such replies are counted.
Source: TGI 3, router/src/{lib,server,validation}.rs.
"""

import asyncio
from collections.abc import Sequence

from llmpilot_tuner.server_probe.batch_requests import RequestGroup
from llmpilot_tuner.server_probe.client import RequestFailedError, ServerFacts
from llmpilot_tuner.server_probe.http_client import HttpClient, Json
from llmpilot_tuner.server_probe.live_tokens import LiveTokens
from llmpilot_tuner.server_probe.metrics import largest
from llmpilot_tuner.server_probe.prompts import Prompts


class TgiClient:
    """A ServerClient."""

    def __init__(self, url: str, prompts: Prompts) -> None:
        self._http = HttpClient(url)
        self._prompts = prompts
        self._weight: int | None = None

    async def is_healthy(self) -> bool:
        """Ask /health."""
        return await self._http.is_ok("/health")

    async def facts(self) -> ServerFacts:
        """Ask /info."""
        info = await self._http.json("/info")
        self._weight = _count(info, "max_batch_total_tokens")
        return ServerFacts(
            name="tgi",
            model=str(info.get("model_id") or ""),
            version=str(info.get("version") or ""),
            weight=self._weight,
            longest_sequence=_count(info, "max_total_tokens"),
            longest_input=_count(info, "max_input_tokens") or _count(info, "max_input_length"),
        )

    async def used_share(self) -> float | None:
        """Ask how much of the tokens the batch may come to."""
        try:
            metrics = await self._http.text("/metrics")
        except RequestFailedError:
            return None
        tokens = largest(metrics, "tgi_batch_current_max_tokens")
        return None if tokens is None or not self._weight else tokens / self._weight

    async def send(self, group: RequestGroup, serials: Sequence[int], live: LiveTokens) -> None:
        """Send each request over a connection of its own."""
        async with asyncio.TaskGroup() as tasks:
            for serial in serials:
                tasks.create_task(self._generate(group, serial, live))

    async def _generate(self, group: RequestGroup, serial: int, live: LiveTokens) -> None:
        body: Json = {
            "inputs": self._prompts.text(group.input_tokens),
            "parameters": {
                "max_new_tokens": group.output_tokens,
                "truncate": group.input_tokens,
                "do_sample": False,
                "details": True,
            },
        }
        count, details = 0, None
        async for event in self._http.events("/generate_stream", body):
            if isinstance(event.get("token"), dict):
                count += 1
                is_last = count >= group.output_tokens
                live.grew(serial, input_tokens=group.input_tokens, output_tokens=count, is_last=is_last)
            details = event.get("details") or details
        live.ended(serial, is_early=count < group.output_tokens)
        if not isinstance(details, dict):
            raise RequestFailedError(f"a reply broke off after {count} tokens", is_gone=True)
        input_tokens = details.get("input_length")
        if isinstance(input_tokens, int) and input_tokens != group.input_tokens:
            raise RequestFailedError(
                f"an input has {input_tokens} tokens, it was to be cut to {group.input_tokens} ones"
            )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()


def _count(info: Json, name: str) -> int | None:
    count = info.get(name)
    return count if isinstance(count, int) and count > 0 else None
