"""The head of an HTTP/1.1 response: its status, its headers, and how long its body is.

Invariant: a head is read the same whether it comes in one part or byte by byte; interim responses (1xx) are skipped.
Source: RFC 9112, 4, 5 and 6.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LARGEST_HEAD_BYTES = 64 * 1024
_SWITCHING_PROTOCOLS = 101
_FIRST_FINAL_STATUS = 200
_MOST_DIGITS = 18
"""Of a length: Python refuses to read thousands of them."""
_BODILESS = (204, 304)


class BadHeadError(ValueError):
    """What came is no head of HTTP/1.x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A response's head."""

    version: str
    status: int
    reason: str
    headers: Mapping[str, str]
    """By lower-case name; several of a name are joined by commas."""
    size_bytes: int
    """With the interim responses before it: where the body begins."""
    body_bytes: int | None
    """None: chunked, or until the connection closes."""
    is_chunked: bool

    @property
    def keeps_connection(self) -> bool:
        """Whether another response may follow this one's body."""
        if self.body_bytes is None and not self.is_chunked:
            return False
        options = {option.strip() for option in self.headers.get("connection", "").lower().split(",")}
        return "keep-alive" in options if self.version == "HTTP/1.0" else "close" not in options


def read_head(data: bytes) -> Head | None:
    """Return the head at the beginning of `data`; None: it has not come whole. BadHeadError: it never will."""
    at = 0
    while True:
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            _check_beginning(data[at:])
            return None
        head = _parse(data[at:end], end + 4)
        if head.status >= _FIRST_FINAL_STATUS:
            return head
        at = end + 4


def _check_beginning(data: bytes) -> None:
    """Find out at once that a server speaks something else: it may never send the end of a head."""
    if data[:5] != b"HTTP/"[: len(data)]:
        raise BadHeadError(f"no HTTP response: {data[:60]!r}")
    if len(data) > LARGEST_HEAD_BYTES:
        raise BadHeadError(f"a response head of more than {LARGEST_HEAD_BYTES:,} bytes")


def _parse(data: bytes, end: int) -> Head:
    _check_beginning(data)
    status_line, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    code, _, reason = rest.partition(" ")
    if len(code) != 3 or not code.isdecimal() or not code.isascii() or int(code) == _SWITCHING_PROTOCOLS:  # noqa: PLR2004
        raise BadHeadError(f"no HTTP status: {status_line[:60]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadHeadError(f"no HTTP header: {line[:60]!r}")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status = int(code)
    is_chunked = headers.get("transfer-encoding", "").lower().endswith("chunked") and status not in _BODILESS
    return Head(
        version=version,
        status=status,
        reason=reason,
        headers=headers,
        size_bytes=end,
        body_bytes=None if is_chunked else _body_bytes(status, headers),
        is_chunked=is_chunked,
    )


def _body_bytes(status: int, headers: Mapping[str, str]) -> int | None:
    if status in _BODILESS:
        return 0
    given = headers.get("content-length")
    if given is None:
        return None
    if not given.isdecimal() or not given.isascii() or len(given) > _MOST_DIGITS:
        raise BadHeadError(f"no Content-Length: {given[:60]!r}")
    return int(given)
