"""How much a server holds at once, as its replies show it.

Invariant: a request counts from its first output token to its last, and no longer: the server gives its place to
another one at once, so that the sum is never more than what the server really holds.
"""

import time


class LiveTokens:
    """The tokens of requests that are under way."""

    def __init__(self) -> None:
        self.held = 0
        self.most_held = 0
        self.started_count = 0
        """Requests of which a token came, or that ended."""
        self.early_count = 0
        """Replies that ended before the length that was asked for."""
        self.progress_seconds = time.monotonic()
        """When the last token came."""
        self.watched_serial: int | None = None
        """Requests from this number on are what the others have to be there for."""
        self.held_when_watched: int | None = None
        """What was held when the first of those had a token, it not included; None: none has."""
        self._tokens: dict[int, int] = {}
        self._started: set[int] = set()
        self._complete: set[int] = set()

    def grew(self, serial: int, *, input_tokens: int, output_tokens: int, is_last: bool = False) -> None:
        """Learn that a request has so many output tokens now; is_last: and will have no more."""
        self.progress_seconds = time.monotonic()
        if serial in self._complete:
            return  # said again, as with the numbers at the end of a reply
        before = self._tokens.get(serial, 0)
        if self.held_when_watched is None and self.watched_serial is not None and serial >= self.watched_serial:
            self.held_when_watched = self.held
        self._tokens[serial] = input_tokens + output_tokens
        self.held += input_tokens + output_tokens - before
        self.most_held = max(self.most_held, self.held)
        self._start(serial)
        if is_last:
            self._complete.add(serial)
            self.held -= self._tokens.pop(serial)

    def ended(self, serial: int, *, is_early: bool = False) -> None:
        """Learn that a reply is complete."""
        self.progress_seconds = time.monotonic()
        self.held -= self._tokens.pop(serial, 0)
        self.early_count += is_early
        self._start(serial)

    def _start(self, serial: int) -> None:
        self._started.add(serial)
        self.started_count = len(self._started)
