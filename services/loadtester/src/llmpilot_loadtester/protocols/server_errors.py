"""What a server's error means: its status of the records, and a line of text.

Invariant: an error that speaks of memory that ran out is `out_of_memory`, however the server said it.
"""

import re
from http import HTTPStatus

import msgspec

from llmpilot_loadtester.protocols.reply import Reply

LARGEST_ERROR_CHARACTERS = 300
OUT_OF_MEMORY = "out_of_memory"
INVALID = "invalid"
REJECTED = "rejected"
TIMEOUT = "timeout"
DISCONNECTED = "disconnected"
MALFORMED = "malformed"
SERVER_ERROR = "server_error"

DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)
"""All that msgspec raises for bytes that are not the JSON it was told to expect."""

_OUT_OF_MEMORY = re.compile(r"out of memory|\bOOM\b|OutOfMemory", re.IGNORECASE)
_BY_CODE = {408: TIMEOUT, 424: SERVER_ERROR, 429: REJECTED, 503: REJECTED, 504: TIMEOUT, 529: REJECTED}
"""424: TGI's word for a model server that failed; 529: overloaded, in use beside 503."""
_BY_TGI_TYPE = {
    "overloaded": REJECTED,
    "unhealthy": REJECTED,
    "validation": INVALID,
    "template_error": INVALID,
    "tool_error": INVALID,
}
_FIRST_ERROR, _FIRST_SERVER_ERROR, _AFTER_LAST = 400, 500, 600
_QUOTED_CHARACTERS = 120


class ErrorObject(msgspec.Struct):
    """OpenAI's error object; servers differ in what they put in."""

    message: object = None
    type: object = None
    code: object = None


class ErrorBody(msgspec.Struct):
    """The JSON of an error, of any server."""

    error: ErrorObject | str | None = None
    error_type: str | None = None
    """TGI's."""
    message: object = None
    """Of vLLM before 0.10, with `code`."""
    code: object = None
    detail: object = None
    """FastAPI's."""


_decode_error = msgspec.json.Decoder(ErrorBody).decode


def failed(status: str, error: str, *, http_status: int | None = None) -> Reply:
    """Return a reply that is nothing but an error."""
    return Reply(status=meant_status(status, error), error=shortened(error), http_status=http_status)


def meant_status(status: str, error: str) -> str:
    """Return the status, or that memory ran out if the error says so."""
    return OUT_OF_MEMORY if _OUT_OF_MEMORY.search(error) else status


def status_of_code(code: int) -> str:
    """Return what an HTTP status of 300 or more means; redirects are not followed."""
    if code in _BY_CODE:
        return _BY_CODE[code]
    return SERVER_ERROR if code >= _FIRST_SERVER_ERROR else INVALID


def shortened(text: str) -> str:
    """Return an error in one line that fits a record."""
    line = " ".join(text.split())
    return line if len(line) <= LARGEST_ERROR_CHARACTERS else f"{line[: LARGEST_ERROR_CHARACTERS - 3]}..."


def quoted(data: bytes) -> str:
    """Return the beginning of what a server sent, to be shown."""
    return repr(data[:_QUOTED_CHARACTERS].decode("utf-8", "replace"))


def read_error(data: bytes) -> tuple[str, str] | None:
    """Return status and text of an error in JSON, as in a stream whose HTTP status was 200; None: it is none."""
    try:
        body = _decode_error(data)
    except DECODE_ERRORS:
        return None
    if isinstance(body.error, ErrorObject):
        message, code = body.error.message or body.error.type, body.error.code
    elif body.error is not None:
        message, code = body.error, None
    else:
        message, code = body.message or body.detail, body.code
    if message is None and code is None:
        return None
    status = _BY_TGI_TYPE.get(body.error_type or "", SERVER_ERROR)
    if isinstance(code, int) and _FIRST_ERROR <= code < _AFTER_LAST:
        status = status_of_code(code)
    text = message if isinstance(message, str) else str(message or code)
    return meant_status(status, text), shortened(text)


def refusal(code: int, reason: str, body: bytes, location: str) -> Reply:
    """Return the reply whose HTTP status was not 200."""
    if not reason and code in set(HTTPStatus):
        reason = HTTPStatus(code).phrase
    said = read_error(body)
    text = said[1] if said else body[: 4 * LARGEST_ERROR_CHARACTERS].decode("utf-8", "replace")
    if location:
        text = f"redirects to {location}: give that URL as the target"
    error = f"HTTP {code} {reason}: {text}" if text.strip() else f"HTTP {code} {reason}"
    return failed(status_of_code(code), error, http_status=code)
