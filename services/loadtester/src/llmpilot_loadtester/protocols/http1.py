"""HTTP/1.1 requests as bytes, and the exchange that watches for the end of a reply.

Invariant: an exchange finds the end of a reply exactly, wherever the parts are cut; for a part in the middle of a
chunked stream it does no more than look at the part's last bytes.
"""

from collections.abc import Callable, Sequence
from urllib.parse import quote, urlsplit

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.protocols.http_chunks import walk_chunks
from llmpilot_loadtester.protocols.http_head import BadHeadError, Head, read_head
from llmpilot_loadtester.protocols.reply import Exchange, Received, Reply

USER_AGENT = "llm-pilot-loadtester"
_END = b"\r\n\r\n"
_OURS = ("content-length", "transfer-encoding", "x-request-id", "connection")
"""Headers that a target may not set: the framing and the join with a server's log rest on them."""


class HttpExchange:
    """An Exchange of HTTP/1.1."""

    __slots__ = ("_is_chunked", "_missing_bytes", "_pending", "_skipped_bytes", "keeps_connection", "outgoing")

    def __init__(self) -> None:
        self.outgoing = b""
        self.keeps_connection = False
        self._is_chunked = False
        self._missing_bytes: int | None = None
        """Of a body whose length was said."""
        self._pending: list[bytes] = []
        """Parts since the last walk; before the body, those of the head."""
        self._skipped_bytes = 0
        """Of `_pending`: what is left of a chunk whose size is known."""

    def feed(self, part: bytes) -> bool:
        """Take the next part; returns whether the reply is whole, or cannot become so."""
        if self._is_chunked:
            self._pending.append(part)
            if part.endswith(_END) or len(part) < len(_END):
                return self._walk()
            return False
        if self._missing_bytes is not None:
            return self._count(len(part))
        self._pending.append(part)
        return self._read_head()

    def _read_head(self) -> bool:
        data = b"".join(self._pending)
        self._pending = [data]
        try:
            head = read_head(data)
        except BadHeadError:
            return True
        if head is None:
            return False
        self._pending = [data[head.size_bytes :]]
        return self._begin_body(head)

    def _begin_body(self, head: Head) -> bool:
        self.keeps_connection = head.keeps_connection
        if head.is_chunked:
            self._is_chunked = True
            return self._walk()
        if head.body_bytes is None:
            self._missing_bytes = 1 << 62  # until the connection closes
            return False
        self._missing_bytes = head.body_bytes
        return self._count(len(self._pending.pop()))

    def _count(self, size_bytes: int) -> bool:
        missing = (self._missing_bytes or 0) - size_bytes
        self._missing_bytes = missing
        if missing < 0:  # more than was said: who knows whose reply that is
            self.keeps_connection = False
        return missing <= 0

    def _walk(self) -> bool:
        data = b"".join(self._pending)
        walk = walk_chunks(data, self._skipped_bytes)
        self._pending = [data[walk.next_at :]] if walk.next_at < len(data) else []
        self._skipped_bytes = max(walk.next_at - len(data), 0)
        if walk.problem or (walk.is_ended and self._pending):
            self.keeps_connection = False
        return walk.is_ended or bool(walk.problem)


class HttpAdapter:
    """A ProtocolAdapter of HTTP/1.1: one endpoint, and how its replies are read."""

    preface = b""

    def __init__(self, target: Target, path: str, read: Callable[[Received], Reply]) -> None:
        """path: of the endpoint, with what the target's URL has before it."""
        self._head = request_head("POST", target, path, accept="text/event-stream").removesuffix(b"\r\n")
        self._read = read

    def renew(self) -> None:
        """Do nothing: requests of HTTP/1.1 know nothing of those before."""

    def write(self, body: bytes, request_id: str) -> Sequence[bytes]:
        """Return a request in one piece, so that it can leave in one."""
        return (
            b"%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, request_id.encode(), len(body), body),
        )

    def exchange(self) -> Exchange:
        """Begin to watch a reply."""
        return HttpExchange()

    def between(self, part: bytes) -> bytes | None:  # noqa: ARG002 whatever it is
        """Refuse: in HTTP/1.1 a server says nothing unasked but that it closes."""
        return None

    def read(self, received: Received) -> Reply:
        """Parse a reply."""
        return self._read(received)


def request_head(method: str, target: Target, path: str, *, accept: str) -> bytes:
    """Return a request's head, with the empty line; the target's headers take the place of ours.

    Raises InvalidInputError for headers that cannot be sent.
    """
    headers = {
        "host": ("Host", urlsplit(target.url).netloc.rpartition("@")[2]),
        "user-agent": ("User-Agent", USER_AGENT),
        "accept": ("Accept", accept),
    }
    if method == "POST":
        headers["content-type"] = ("Content-Type", "application/json")
    headers |= {name.lower(): (name, value) for name, value in sent_headers(target)}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.values())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def sent_headers(target: Target) -> list[tuple[str, str]]:
    """Return the target's own headers and its key; raises InvalidInputError for what cannot be sent."""
    headers = list(target.headers)
    if target.api_key and not any(name.lower() == "authorization" for name, _ in headers):
        headers.insert(0, ("Authorization", f"Bearer {target.api_key}"))
    violations = [
        Violation("target.headers", problem) for name, value in headers if (problem := _header_problem(name, value))
    ]
    if violations:
        raise InvalidInputError(violations)
    return headers


def _header_problem(name: str, value: str) -> str:
    if not name or not name.isascii() or not name.isprintable() or any(mark in name for mark in ' :()<>@,;"/[]?={}\\'):
        return f"{name!r} is no name of a header"
    if name.lower() in _OURS:
        return f"{name} is set by the load tester; leave it out"
    if any(mark in value for mark in "\r\n\0") or not value.isascii():
        return f"the value of {name} must be a line of ASCII"
    return ""


def endpoint_path(url: str, endpoint: str) -> str:
    """Return the path of an endpoint at a server.

    The URL may have a path already: a prefix, one that ends in the endpoint's first part (/v1), or the whole endpoint.
    """
    split = urlsplit(url)
    path = quote(split.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    query = f"?{split.query}" if split.query else ""
    first, _, rest = endpoint.removeprefix("/").partition("/")
    if path.endswith((endpoint, f"/{rest or first}")):
        return path + query
    if rest and path.endswith(f"/{first}"):
        return f"{path}/{rest}{query}"
    return f"{path}{endpoint}{query}"
