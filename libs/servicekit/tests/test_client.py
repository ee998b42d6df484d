import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from llmpilot_contracts.errors import InvalidInputError, UnavailableError, Violation
from llmpilot_servicekit.client import connect, wait_until_serving

Serving = Callable[..., AbstractAsyncContextManager[Any]]


def call(address: str, **options: Any) -> str:
    with connect(address) as channel:
        method: Any = channel.unary_unary(
            "/test.Echo/unary_unary",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        return str(method(StringValue(value="a"), **options).value)


async def echo(request: StringValue, _context: object) -> StringValue:
    return request


def test_a_service_that_serves_is_waited_for_and_called(serving: Serving) -> None:
    async def check() -> str:
        async with serving(echo) as running:
            await asyncio.to_thread(wait_until_serving, running.address, 20)
            return await asyncio.to_thread(call, running.address, timeout=20)

    assert asyncio.run(check()) == "a"


def test_the_error_of_the_service_is_raised_again(serving: Serving) -> None:
    async def refuse(_request: object, _context: object) -> None:
        raise InvalidInputError([Violation("rate", "must be > 0, is -1")])

    async def check() -> None:
        async with serving(refuse) as running:
            await asyncio.to_thread(call, running.address, timeout=20)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(check())
    error = caught.value.exceptions[0]
    assert isinstance(error, InvalidInputError)
    assert error.violations == (Violation("rate", "must be > 0, is -1"),)


def test_a_call_without_a_timeout_is_refused() -> None:
    with pytest.raises(TypeError, match="pass timeout="):
        call("127.0.0.1:1")


def test_a_call_to_nobody_says_which_address() -> None:
    with pytest.raises(UnavailableError, match=r"^127\.0\.0\.1:1 does not answer"):
        call("127.0.0.1:1", timeout=20)


def test_waiting_for_nobody_ends_in_time() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 is not serving after 0\.2 s"):
        wait_until_serving("127.0.0.1:1", 0.2)
