"""What is asked of an inference server, whatever its protocol.

Invariant: a reply that is not what was asked for is a `RequestFailedError` with the server's words; what those mean is
judged elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmpilot_tuner.server_probe.batch_requests import RequestGroup
from llmpilot_tuner.server_probe.live_tokens import LiveTokens

LONGEST_ERROR = 2000
"""Characters of a server's words that are kept."""


class RequestFailedError(Exception):
    """A request was not answered as it should be."""

    def __init__(self, text: str, *, is_gone: bool = False, is_turned_away: bool = False) -> None:
        self.text = text[:LONGEST_ERROR]
        self.is_gone = is_gone
        """The connection broke: the server may have died."""
        self.is_turned_away = is_turned_away
        """The server has too much to do, or is not ready."""
        super().__init__(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself; None: it does not."""

    name: str
    model: str = ""
    version: str = ""
    weight: int | None = None
    """The maximum batch weight that it keeps to; vLLM: tokens that its KV blocks have room for."""
    longest_sequence: int | None = None
    longest_input: int | None = None
    most_new_tokens: int | None = None


class ServerClient(Protocol):
    """Speaks to one server."""

    async def is_healthy(self) -> bool:
        """Return whether it answers requests."""

    async def facts(self) -> ServerFacts:
        """Ask what it is; raises RequestFailedError."""

    async def used_share(self) -> float | None:
        """Ask how much of its room for tokens is taken, 0 to 1; None: it does not say."""

    async def send(self, group: RequestGroup, serials: Sequence[int], live: LiveTokens) -> None:
        """Send the requests of a group at once and read every reply to its end; raises RequestFailedError."""

    async def close(self) -> None:
        """Close every connection."""
