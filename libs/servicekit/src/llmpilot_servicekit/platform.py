"""How a command of one service reaches any service, wherever it runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Platform(Protocol):
    """Finds services, starting what it must; the console implements it."""

    def address_of(self, service: str, *, beside: Sequence[str] = ()) -> AbstractContextManager[str]:
        """Give the gRPC address, "host:port", of a running service for as long as the context is open.

        Where the service must be started for it, those `beside` it are started too, for it to call.
        """
