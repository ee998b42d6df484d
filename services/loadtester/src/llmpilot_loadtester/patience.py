"""Waiting for NATS to come back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llmpilot_contracts.errors import UnavailableError

_FIRST_DELAY_SECONDS = 0.05
_LAST_DELAY_SECONDS = 2.0
T = TypeVar("T")


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Do something that may be done twice, again and again while what it needs is unavailable."""
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        try:
            return await work()
        except UnavailableError:
            await asyncio.sleep(delay_seconds)
        delay_seconds = min(2 * delay_seconds, _LAST_DELAY_SECONDS)
