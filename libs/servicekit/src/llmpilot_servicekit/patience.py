"""Waiting for NATS to come back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.logs import get_logger

log = get_logger(__name__)

_FIRST_DELAY_SECONDS = 0.05
_LAST_DELAY_SECONDS = 2.0
T = TypeVar("T")


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Do something that may be done twice, again and again while what it needs is unavailable."""
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        try:
            return await work()
        except UnavailableError as error:
            if delay_seconds < _LAST_DELAY_SECONDS <= 2 * delay_seconds:  # once
                log.warning("waiting for NATS", error=str(error))
            await asyncio.sleep(delay_seconds)
        delay_seconds = min(2 * delay_seconds, _LAST_DELAY_SECONDS)
