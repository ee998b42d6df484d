"""The errors that cross a boundary: raised by domain code, mapped to `google.rpc.Status` by servicekit.

    PilotError
    ├── InvalidInputError     what was asked or configured is wrong; carries every violation   INVALID_ARGUMENT
    ├── NotFoundError         a named resource does not exist                                  NOT_FOUND
    ├── PreconditionError     right input, but the system is not in a state for it             FAILED_PRECONDITION
    └── UnavailableError      something outside does not answer; try again                     UNAVAILABLE

Invariant: `str(error)` is one message that tells the reader what to do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with one field."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class PilotError(Exception):
    """Anything LLM-Pilot refuses to do or cannot do."""

    reason: ClassVar[str] = "INTERNAL"
    """Stable machine-readable word, the reason of the ErrorInfo on the wire."""


class InvalidInputError(PilotError):
    """Input is wrong. Lists every violation, not the first."""

    reason = "INVALID_INPUT"

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(map(str, self.violations)))


class NotFoundError(PilotError):
    """A named resource does not exist."""

    reason = "NOT_FOUND"

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} {name!r} not found{'; ' + hint if hint else ''}")


class PreconditionError(PilotError):
    """The input is right, but the system is not in a state for it."""

    reason = "FAILED_PRECONDITION"


class UnavailableError(PilotError):
    """Something outside does not answer; the same call may succeed later."""

    reason = "UNAVAILABLE"
