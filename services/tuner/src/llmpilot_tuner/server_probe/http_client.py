"""What clients of HTTP servers share: one session, JSON, server-sent events.

Invariant: whatever goes wrong on the way is a `RequestFailedError`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from llmpilot_tuner.server_probe.client import LONGEST_ERROR, RequestFailedError

_ASK_SECONDS = 15.0
_CONNECT_SECONDS = 30.0
_BUFFER_BYTES = 2**20
_TURNED_AWAY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_EVENT = b"data:"
_DONE = b"[DONE]"
Json = dict[str, Any]


class HttpClient:
    """One server by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            read_bufsize=_BUFFER_BYTES,
        )

    async def is_ok(self, path: str) -> bool:
        """Return whether a GET is answered with success."""
        try:
            await self.text(path)
        except RequestFailedError:
            return False
        return True

    async def text(self, path: str) -> str:
        """GET a text."""
        with _told():
            async with asyncio.timeout(_ASK_SECONDS), self._session.get(f"{self._url}{path}") as response:
                text = await response.text(errors="replace")
                _check(response, text)
                return text

    async def json(self, path: str) -> Json:
        """GET an object; empty where it is none."""
        try:
            found = msgspec.json.decode(await self.text(path))
        except msgspec.MsgspecError as error:
            raise RequestFailedError(f"{path} is no JSON: {error}") from error
        return found if isinstance(found, dict) else {}

    async def events(self, path: str, body: Mapping[str, object]) -> AsyncIterator[Json]:
        """POST, and give the data of every event; raises RequestFailedError for one that is an error."""
        with _told():
            async with self._post(path, body) as response:
                async for line in response.content:
                    data = line.strip().removeprefix(_EVENT).strip() if line.startswith(_EVENT) else b""
                    if not data or data == _DONE:
                        continue
                    yield _event(data)

    @asynccontextmanager
    async def _post(self, path: str, body: Mapping[str, object]) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(
            f"{self._url}{path}", data=msgspec.json.encode(body), headers=headers
        ) as response:
            if response.status != HTTPStatus.OK:
                _check(response, await response.text(errors="replace"))
            yield response

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()


@contextmanager
def _told() -> Iterator[None]:
    """Word what breaks on the way to a server."""
    try:
        yield
    except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
        raise RequestFailedError(f"no answer in HTTP: {error}") from error
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        raise RequestFailedError(f"{type(error).__name__}: {error}", is_gone=True) from error
    except ValueError as error:  # a line that is longer than the buffer
        raise RequestFailedError(f"no answer in HTTP: {error}") from error


def _check(response: aiohttp.ClientResponse, text: str) -> None:
    if response.status != HTTPStatus.OK:
        raise RequestFailedError(
            f"HTTP {response.status} {response.reason}: {' '.join(text.split())[:LONGEST_ERROR]}",
            is_turned_away=response.status in _TURNED_AWAY,
        )


def _event(data: bytes) -> Json:
    try:
        event = msgspec.json.decode(data)
    except msgspec.MsgspecError as error:
        raise RequestFailedError(f"an event is no JSON: {data[:LONGEST_ERROR]!r}") from error
    if not isinstance(event, dict):
        raise RequestFailedError(f"an event is no object: {data[:LONGEST_ERROR]!r}")
    if event.get("error"):
        raise RequestFailedError(f"error in the reply: {event['error']}")
    return event
