"""PilotError <-> google.rpc.Status: the one place that knows which error is which gRPC code.

Invariant: the status always arrives. gRPC drops trailers above 8 KB, so long lists of violations are cut, and say so.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from llmpilot_contracts.errors import (
    InvalidInputError,
    NotFoundError,
    PilotError,
    PreconditionError,
    UnavailableError,
    Violation,
)

DOMAIN = "llmpilot"
"""Domain of the ErrorInfo of every status made here."""

_CODES: tuple[tuple[type[PilotError], grpc.StatusCode], ...] = (
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (PilotError, grpc.StatusCode.INTERNAL),
)

_ADVICE = {
    grpc.StatusCode.UNAVAILABLE: "does not answer: check that it runs and try again",
    grpc.StatusCode.DEADLINE_EXCEEDED: "did not answer in time: try again or allow more time",
    grpc.StatusCode.UNIMPLEMENTED: "does not know this call: use a client of the service's version",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused for its size or load: send less",
}

# On the wire: the message percent-encoded, and in base64 the message again, the ErrorInfo and the BadRequest.
# 1,000 + 4/3 x (1,000 + 700 + 3,300) < 8,000.
_MESSAGE_WIRE_BYTES = 1_000
_TEXT_WIRE_BYTES = 250
_BAD_REQUEST_BYTES = 3_300
_MORE_BYTES = 40


def to_status(error: PilotError) -> grpc.Status:
    """Give the status that carries `error`, to abort a call with."""
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    status = status_pb2.Status(code=code.value[0], message=_shortened(str(error), _MESSAGE_WIRE_BYTES))
    metadata = {"kind": error.kind, "name": error.name} if isinstance(error, NotFoundError) else {}
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={key: _shortened(value, _TEXT_WIRE_BYTES) for key, value in metadata.items()},
        )
    )
    if isinstance(error, InvalidInputError):
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=_fitting(error.violations)))
    return rpc_status.to_status(status)


def error_from_rpc(error: grpc.RpcError, *, address: str = "the service") -> PilotError:
    """Rebuild on the client what the service raised, or say what went wrong on the way to `address`."""
    code, message = error.code(), error.details() or error.code().name
    info, bad_request = _details(error)
    ours = info.domain == DOMAIN
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violations = [Violation(each.field, each.description) for each in bad_request.field_violations]
        return InvalidInputError(violations or [Violation("request", message)])
    if code is grpc.StatusCode.NOT_FOUND:
        kind, name = info.metadata.get("kind", "resource"), info.metadata.get("name", message)
        hint = message.removeprefix(str(NotFoundError(kind, name))).removeprefix("; ") if ours else ""
        return NotFoundError(kind, name, hint=hint)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return PreconditionError(message)
    unavailable = code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    if not ours:
        message = f"{address} {_ADVICE.get(code, f'failed with {code.name}')} ({message})"
    return UnavailableError(message) if unavailable else PilotError(message)


def sole_cause(error: BaseException) -> BaseException:
    """Unwrap the exception groups in which task groups put a single error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest]:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except (ValueError, DecodeError):  # a status that some other server made badly
        status = None
    for detail in status.details if status else ():
        if not detail.Unpack(info):
            detail.Unpack(bad_request)
    return info, bad_request


def _fitting(violations: Iterable[Violation]) -> Iterator[error_details_pb2.BadRequest.FieldViolation]:
    left_bytes = _BAD_REQUEST_BYTES - _MORE_BYTES
    violations = tuple(violations)
    for sent_count, violation in enumerate(violations):
        field = error_details_pb2.BadRequest.FieldViolation(
            field=_shortened(violation.field, _TEXT_WIRE_BYTES),
            description=_shortened(violation.description, _MESSAGE_WIRE_BYTES),
        )
        left_bytes -= field.ByteSize() + 3  # its tag and length
        if left_bytes < 0:
            yield error_details_pb2.BadRequest.FieldViolation(
                field="...", description=f"and {len(violations) - sent_count} more"
            )
            return
        yield field


def _shortened(text: str, wire_bytes: int) -> str:
    """Cut `text` so that, percent-encoded as gRPC does, it takes at most `wire_bytes`."""
    text = text.encode("utf-8", "replace").decode()  # protobuf refuses lone surrogates
    left_bytes = wire_bytes
    for index, character in enumerate(text):
        left_bytes -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if left_bytes < 0:
            cut = index - len("...") - wire_bytes // 20
            return f"{text[: max(cut, 0)]}..."
    return text
