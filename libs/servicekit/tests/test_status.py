import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import (
    InvalidInputError,
    NotFoundError,
    PilotError,
    PreconditionError,
    UnavailableError,
    Violation,
)
from llmpilot_servicekit.status import error_from_rpc

Serving = Callable[..., AbstractAsyncContextManager[Any]]

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
SAMPLES = (
    (InvalidInputError([Violation("a.b", "must be > 0, is -1"), Violation("c", "größer")]), "INVALID_ARGUMENT"),
    (NotFoundError("model", "models/x", hint="list them"), "NOT_FOUND"),
    (NotFoundError("model", "models/x"), "NOT_FOUND"),
    (PreconditionError("not trained yet: train first"), "FAILED_PRECONDITION"),
    (UnavailableError("the store is away: try again"), "UNAVAILABLE"),
    (PilotError("100% lost\nreally"), "INTERNAL"),
)


def descendants(kind: type[PilotError]) -> set[type[PilotError]]:
    return {kind, *(each for child in kind.__subclasses__() for each in descendants(child))}


def received(serving: Serving, *errors: Exception, kind: str = "unary_unary") -> list[grpc.RpcError]:
    """Send errors through one real channel."""
    left = iter(errors)

    async def fail(_request: object, _context: object) -> None:
        raise next(left)

    async def exchange() -> list[grpc.RpcError]:
        answers = []
        async with serving(fail, kind=kind) as running:
            for _ in errors:
                with pytest.raises(grpc.RpcError) as caught:
                    await running.call(kind, timeout=20)
                answers.append(caught.value)
        return answers

    return asyncio.run(exchange())


def test_every_error_class_of_the_contracts_is_among_the_samples() -> None:
    classes = {kind for kind in descendants(PilotError) if kind.__module__ == PilotError.__module__}
    assert {type(error) for error, _ in SAMPLES} == classes


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_the_channel_whole(serving: Serving, kind: str) -> None:
    answers = received(serving, *(error for error, _ in SAMPLES), kind=kind)
    for (sent, code), answer in zip(SAMPLES, answers, strict=True):
        rebuilt = error_from_rpc(answer)
        assert answer.code().name == code
        assert type(rebuilt) is type(sent)
        assert str(rebuilt) == str(sent)
        if isinstance(sent, InvalidInputError):
            assert isinstance(rebuilt, InvalidInputError)
            assert rebuilt.violations == sent.violations
        if isinstance(sent, NotFoundError):
            assert isinstance(rebuilt, NotFoundError)
            assert (rebuilt.kind, rebuilt.name) == ("model", "models/x")


def test_a_subclass_travels_as_its_parent(serving: Serving) -> None:
    class BusyError(PreconditionError):
        reason = "BUSY"

    (answer,) = received(serving, BusyError("busy: wait"))
    assert type(error_from_rpc(answer)) is PreconditionError


def test_an_error_alone_in_a_task_group_is_unwrapped(serving: Serving) -> None:
    (answer,) = received(serving, ExceptionGroup("tasks", [UnavailableError("away: try again")]))
    assert str(error_from_rpc(answer)) == "away: try again"


def test_a_long_list_of_violations_is_cut_and_says_so(serving: Serving) -> None:
    (answer,) = received(serving, InvalidInputError(Violation(f"f[{i}]", "must be > 0") for i in range(500)))
    rebuilt = error_from_rpc(answer)
    assert isinstance(rebuilt, InvalidInputError)
    *shown, more = rebuilt.violations
    assert [violation.field for violation in shown] == [f"f[{i}]" for i in range(len(shown))]
    assert len(shown) > 50
    assert more == Violation("...", f"and {500 - len(shown)} more")


@pytest.mark.parametrize("text", ["x" * 100_000, "ü" * 100_000, "%\n" * 50_000, "\U0001f600" * 50_000])
def test_a_huge_text_arrives_cut(serving: Serving, text: str) -> None:
    errors = (
        PilotError(text),
        NotFoundError(text, text),
        InvalidInputError([Violation(text, text)] * 100),
    )
    codes = [answer.code().name for answer in received(serving, *errors)]
    assert codes == ["INTERNAL", "NOT_FOUND", "INVALID_ARGUMENT"]


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.tuples(st.text(), st.text()), min_size=1), min_size=1, max_size=30))
def test_any_violations_arrive(serving: Serving, lists: list[list[tuple[str, str]]]) -> None:
    errors = [InvalidInputError(Violation(*pair) for pair in pairs) for pairs in lists]
    for sent, answer in zip(errors, received(serving, *errors), strict=True):
        rebuilt = error_from_rpc(answer)
        assert isinstance(rebuilt, InvalidInputError)
        assert len(rebuilt.violations) == len(sent.violations) or rebuilt.violations[-1].field == "..."


def test_an_address_nobody_listens_on_is_named() -> None:
    async def call() -> grpc.RpcError:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            method: Any = channel.unary_unary("/test.Echo/unary_unary")
            with pytest.raises(grpc.RpcError) as caught:
                await method(b"", timeout=20)
            return caught.value

    error = error_from_rpc(asyncio.run(call()), address="127.0.0.1:1")
    assert isinstance(error, UnavailableError)
    assert str(error).startswith("127.0.0.1:1 does not answer: check that it runs")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInputError, "request: why"),
        (grpc.StatusCode.NOT_FOUND, NotFoundError, "why"),
        (grpc.StatusCode.FAILED_PRECONDITION, PreconditionError, "why"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError, "h:1 did not answer in time"),
        (grpc.StatusCode.UNIMPLEMENTED, PilotError, "h:1 does not know this call"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, PilotError, "h:1 refused"),
        (grpc.StatusCode.DATA_LOSS, PilotError, "h:1 failed with DATA_LOSS"),
    ],
)
def test_statuses_of_other_servers_become_errors(code: grpc.StatusCode, kind: type[PilotError], words: str) -> None:
    error = error_from_rpc(grpc.aio.AioRpcError(code, details="why"), address="h:1")
    assert type(error) is kind
    assert words in str(error)
    assert "why" in str(error)


def test_a_status_that_contradicts_itself_is_read_without_its_details() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\x08\x05"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, trailing_metadata=metadata, details="why")
    assert "failed with ABORTED (why)" in str(error_from_rpc(error))
