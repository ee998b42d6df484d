"""What a protocol makes of a server's reply.

Invariant: parsing never raises for what a server sent: whatever is wrong with a reply becomes its status and error.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from llmpilot_contracts.record_schema import OK

Item = TypeVar("Item")
STEP_COUNT = 256
"""Events that are parsed without a pause, which takes a fraction of a millisecond."""


def go_on() -> None:
    """Pause not at all."""


def paced(items: Iterable[Item], pause: Callable[[], None]) -> Iterator[Item]:
    """Yield the items, with a pause after every few hundred."""
    iterator = iter(items)
    while step := list(islice(iterator, STEP_COUNT)):
        yield from step
        if len(step) == STEP_COUNT:
            pause()


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """The bytes of one reply as they came, each part with its time."""

    parts: Sequence[bytes]
    stamps: Sequence[int]
    """By part: CLOCK_REALTIME nanoseconds of its arrival."""
    is_closed: bool = False
    """Whether the server closed the connection after the last part."""
    exchange: "Exchange | None" = None
    """Who watched it. HTTP/2 needs it: its headers are packed by what was said before on the connection."""
    pause: Callable[[], None] = go_on
    """Called now and then while a long reply is parsed: who has an event loop lets it run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply, parsed."""

    status: str = OK
    """Of record_schema.STATUSES."""
    error: str = ""
    """Empty if ok; else what the server or the protocol says, at most 300 characters."""
    http_status: int | None = None
    retry_after_seconds: float | None = None
    chunk_stamps: Sequence[int] = ()
    """By part of the reply that has output tokens, of whatever channel: when it came."""
    chunk_tokens: Sequence[int] = ()
    """By part, at least 1."""
    token_count_source: str = "chunks"  # noqa: S105 tokens of text
    """Of record_schema.TOKEN_COUNT_SOURCES."""
    input_tokens: int | None = None
    """As the server counts."""
    reasoning_tokens: int | None = None
    """As the server counts."""
    finish_reason: str | None = None
    """Of record_schema.FINISH_REASONS."""
    served_model: str | None = None
    """Who the reply says it is from."""
    text: str = ""
    reasoning_text: str = ""
    keeps_connection: bool = False
    """Whether the connection may carry another request."""
    coalesced_count: int = 0
    """Entries of `chunk_stamps` whose own time is lost, as the next one came in the same part."""


class CountTokens(Protocol):
    """Counts the tokens of text parts that belong together."""

    def __call__(self, parts: Sequence[str], /) -> Sequence[int]:
        """Return how many tokens end in each part; their sum is the count of the whole text."""


class Exchange(Protocol):
    """One request and its reply, watched while it comes. Costs next to nothing per part: parsing is for later."""

    outgoing: bytes
    """What must be sent at once because of what came (HTTP/2's acknowledgements); the sender empties it."""
    keeps_connection: bool
    """Whether the connection may carry another request; known when the reply is whole."""

    def feed(self, part: bytes) -> bool:
        """Take the next part; returns whether the reply is whole."""


class ProtocolAdapter(Protocol):
    """How requests are written to one target, and its replies read. One per connection, as it may have state."""

    preface: bytes
    """What a new connection begins with (HTTP/2); else nothing."""

    def renew(self) -> None:
        """Forget the connection: what is written next goes over a new one, after the preface."""

    def write(self, body: bytes, request_id: str) -> Sequence[bytes]:
        """Return the bytes of a request, to be sent one after another."""

    def exchange(self) -> Exchange:
        """Begin to watch the reply to the request that was written last."""

    def between(self, part: bytes) -> bytes | None:
        """Take what came while no reply was awaited; returns what to send back, None: the connection is of no use."""

    def read(self, received: Received) -> Reply:
        """Parse a reply that is whole, or what came of one that broke off, at any later time and in any order.

        What broke off is `disconnected` unless the server said more; whoever cut it off knows better.
        """
