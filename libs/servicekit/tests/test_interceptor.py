import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from structlog.testing import capture_logs

from llmpilot_contracts.errors import UnavailableError

Serving = Callable[..., AbstractAsyncContextManager[Any]]

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


async def echo(request: StringValue, _context: object) -> StringValue:
    return request


async def echo_thrice(request: StringValue, _context: object) -> AsyncIterator[StringValue]:
    for _ in range(3):
        yield request


async def write_twice(request: StringValue, context: Any) -> None:
    await context.write(request)
    await context.write(request)


async def join(requests: AsyncIterator[StringValue], _context: object) -> StringValue:
    return StringValue(value="+".join([request.value async for request in requests]))


async def echo_stream(requests: AsyncIterator[StringValue], _context: object) -> AsyncIterator[StringValue]:
    async for request in requests:
        yield request


@pytest.mark.parametrize(
    ("kind", "servicer", "expected"),
    [
        ("unary_unary", echo, ["a"]),
        ("unary_stream", echo_thrice, ["a", "a", "a"]),
        ("unary_stream", write_twice, ["a", "a"]),
        ("stream_unary", join, ["a"]),
        ("stream_stream", echo_stream, ["a"]),
    ],
)
def test_every_call_kind_passes_and_is_counted(
    serving: Serving, kind: str, servicer: Callable[..., Any], expected: list[str]
) -> None:
    async def check() -> None:
        async with serving(servicer, kind=kind) as running:
            assert await running.call(kind, "a", timeout=20) == expected
            await running.finished_calls(kind, "OK")
            labels = {"method": f"/test.Echo/{kind}"}
            assert running.registry.get_sample_value("llmpilot_grpc_request_seconds_count", labels) == 1

    asyncio.run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unexpected_error_leaks_nothing_but_an_incident_that_the_log_explains(serving: Serving, kind: str) -> None:
    async def fail(_request: object, _context: object) -> None:
        raise KeyError("the secret")

    async def check() -> str:
        async with serving(fail, kind=kind) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.call(kind, timeout=20)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            await running.finished_calls(kind, "INTERNAL")
            return str(caught.value.details())

    with capture_logs() as logs:
        details = asyncio.run(check())
    assert "secret" not in details
    incident = re.search(r"incident (\w{12})", details)
    assert incident
    (entry,) = [entry for entry in logs if entry["event"] == "call failed"]
    assert entry["incident"] == incident[1]
    assert isinstance(entry["exc_info"], KeyError)


def test_an_abort_of_the_servicer_is_left_alone_and_counted(serving: Serving) -> None:
    async def abort(_request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too far")

    async def check() -> None:
        async with serving(abort) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.call("unary_unary", timeout=20)
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "too far")
            await running.finished_calls("unary_unary", "OUT_OF_RANGE")

    asyncio.run(check())


def test_a_call_without_a_deadline_gets_one(serving: Serving) -> None:
    async def wait_for_ever(_request: object, _context: object) -> None:
        await asyncio.Event().wait()

    async def check() -> None:
        async with serving(wait_for_ever, default_deadline_seconds=0.05) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.call("unary_unary")
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "longer than 0.05 s" in str(caught.value.details())

    asyncio.run(check())


def test_the_deadline_of_the_client_wins(serving: Serving) -> None:
    async def slow_echo(request: StringValue, context: Any) -> StringValue:
        await asyncio.sleep(0.1)  # longer than the default deadline
        return StringValue(value=f"{request.value} {context.time_remaining() > 1}")

    async def check() -> None:
        async with serving(slow_echo, default_deadline_seconds=0.01) as running:
            assert await running.call("unary_unary", "a", timeout=20) == ["a True"]

    asyncio.run(check())


def test_a_timeout_of_the_servicer_itself_is_an_incident(serving: Serving) -> None:
    async def time_out(_request: object, _context: object) -> None:
        raise TimeoutError

    async def check() -> None:
        async with serving(time_out) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.call("unary_unary")
            assert caught.value.code() is grpc.StatusCode.INTERNAL

    with capture_logs():
        asyncio.run(check())


def test_a_client_that_leaves_cancels_the_servicer(serving: Serving) -> None:
    async def check() -> None:
        entered, cancelled = asyncio.Event(), asyncio.Event()

        async def wait(_request: object, _context: object) -> AsyncIterator[StringValue]:
            entered.set()
            try:
                await asyncio.Event().wait()
                yield StringValue()
            finally:
                cancelled.set()

        async with serving(wait, kind="unary_stream") as running, asyncio.timeout(20):
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(running.call("unary_stream"))
                await entered.wait()
                call.cancel()
            await cancelled.wait()
            await running.finished_calls("unary_stream", "CANCELLED")

    asyncio.run(check())


def test_an_unknown_method_stays_unimplemented(serving: Serving) -> None:
    async def check() -> None:
        async with serving(echo) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.channel.unary_unary("/test.Echo/Nothing")(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(check())


def test_a_client_that_vanishes_while_it_is_written_to_is_no_error(serving: Serving) -> None:
    async def endless(request: StringValue, context: Any) -> None:
        while True:
            await context.write(request)

    async def check() -> None:
        async with serving(endless, kind="unary_stream") as running:
            async with grpc.aio.insecure_channel(running.address) as channel:
                method = channel.unary_stream(
                    "/test.Echo/unary_stream",
                    request_serializer=StringValue.SerializeToString,
                    response_deserializer=StringValue.FromString,
                )
                assert await method(StringValue(value="x" * 1_000_000)).read()
            await running.finished_calls("unary_stream", "CANCELLED")

    with capture_logs() as logs:
        asyncio.run(check())
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


def test_a_client_that_does_not_read_is_cut_off_without_a_word_in_the_log(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """The status waits behind the message that it does not take, and is lost when the connection ends."""
    has_failed = asyncio.Event()

    async def write_until_it_takes_too_long(request: StringValue, context: Any) -> None:
        try:
            async with asyncio.timeout(0.2):
                while True:
                    await context.write(request)
        except TimeoutError as error:
            has_failed.set()
            raise UnavailableError("the service is stopping") from error

    async def check() -> None:
        async with serving(write_until_it_takes_too_long, kind="unary_stream") as running:
            async with grpc.aio.insecure_channel(running.address) as channel, asyncio.timeout(20):
                method = channel.unary_stream(
                    "/test.Echo/unary_stream",
                    request_serializer=StringValue.SerializeToString,
                    response_deserializer=StringValue.FromString,
                )
                call = method(StringValue(value="x" * 1_000_000))
                assert await call.read()
                await has_failed.wait()
            await running.finished_calls("unary_stream", "UNAVAILABLE")

    asyncio.run(check())
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
