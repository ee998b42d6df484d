"""How the server misbehaves on purpose, as real ones do.

Invariant: without a fault a reply is whole and correct; every fault is asked for, by the settings or by a request's
`x-simulate-fault` header, such as `drop-after=3, stream-interval=4`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation

FAULT_HEADER = "x-simulate-fault"

RoleChunk = Literal["with-first-token", "early", "off"]
_ROLE_CHUNKS = ("with-first-token", "early", "off")
_REJECT_STATUSES = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong with one request. The field `drop_after` is `drop-after` in the header."""

    reject: int | None = None
    """Answer with this status: 429 or 503."""
    drop_after: int | None = None
    """Close the connection when the token after this many is due; 0: before the first."""
    reset_after: int | None = None
    """The same with a TCP reset."""
    out_of_memory_after: int | None = None
    """Fail as a GPU out of memory does when the token after this many is due."""
    stream_interval: int = 1
    """Tokens in a chunk, but for the first and the last, as vLLM's --stream-interval."""
    role_chunk: RoleChunk = "with-first-token"
    """When the chunk comes that has only the role (chat): with the first token as in vLLM, before it, or not at all."""
    empty_every: int | None = None
    """Every so many tokens have no text, which then comes with the next one, as a character split over two tokens."""

    def __post_init__(self) -> None:
        violations = [
            Violation(name, f"must be >= {least}, is {value}")
            for name, least in _LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        if self.reject is not None and self.reject not in _REJECT_STATUSES:
            violations.append(Violation("reject", f"must be 429 or 503, is {self.reject}"))
        if self.role_chunk not in _ROLE_CHUNKS:
            violations.append(
                Violation("role_chunk", f"must be one of {', '.join(_ROLE_CHUNKS)}, is {self.role_chunk}")
            )
        if violations:
            raise InvalidInputError(violations)


_LEAST = {
    "drop_after": 0,
    "reset_after": 0,
    "out_of_memory_after": 0,
    "stream_interval": 1,
    "empty_every": 2,  # 1 would leave no text at all
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFaults:
    """What goes wrong with the server as a whole."""

    each_request: Faults = Faults()
    """Unless a request's header says otherwise."""
    reject_share: float = 0.0
    """Share of the requests that `reject_status` answers, chosen at random."""
    reject_above_waiting: int | None = None
    """Requests are rejected while more than this many wait in the queue."""
    reject_status: int = 429
    slow_start_seconds: float = 0.0
    """How long after the start /health and every request are answered 503."""
    seed: int = 0

    def __post_init__(self) -> None:
        violations = []
        if not 0 <= self.reject_share <= 1:
            violations.append(Violation("reject_share", f"must be from 0 to 1, is {self.reject_share}"))
        if self.reject_above_waiting is not None and self.reject_above_waiting < 0:
            violations.append(Violation("reject_above_waiting", f"must be >= 0, is {self.reject_above_waiting}"))
        if self.reject_status not in _REJECT_STATUSES:
            violations.append(Violation("reject_status", f"must be 429 or 503, is {self.reject_status}"))
        if not 0 <= self.slow_start_seconds < float("inf"):
            violations.append(Violation("slow_start_seconds", f"must be >= 0, is {self.slow_start_seconds}"))
        if violations:
            raise InvalidInputError(violations)


class Gate:
    """Decides which requests are let in."""

    def __init__(self, faults: ServerFaults, *, start_seconds: float) -> None:
        self._faults = faults
        self._random = np.random.default_rng(faults.seed)
        self._ready_seconds = start_seconds + faults.slow_start_seconds
        self._is_closed = False

    def close(self) -> None:
        """Let nothing more in."""
        self._is_closed = True

    def is_ready(self, now_seconds: float) -> bool:
        """Whether the slow start is over and the end has not begun."""
        return now_seconds >= self._ready_seconds and not self._is_closed

    def rejection(self, faults: Faults, *, now_seconds: float, waiting_count: int) -> int | None:
        """Return the status to answer a request with; None: let it in."""
        if not self.is_ready(now_seconds):
            return 503
        if faults.reject is not None:
            return faults.reject
        server = self._faults
        if server.reject_above_waiting is not None and waiting_count > server.reject_above_waiting:
            return server.reject_status
        if server.reject_share and self._random.random() < server.reject_share:
            return server.reject_status
        return None


def parse_faults(header: str | None, default: Faults) -> Faults:
    """Return the faults of a request: `default` but for what its header names.

    Raises InvalidInputError with everything that is wrong with the header.
    """
    if not header:
        return default
    violations: list[Violation] = []
    values: dict[str, int | str] = {}
    for part in header.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        field = name.replace("-", "_")
        if field not in _FIELDS:
            violations.append(Violation(FAULT_HEADER, f"{name!r} is none of {', '.join(_HEADER_NAMES)}"))
        elif field == "role_chunk":
            values[field] = value
        elif value.isdecimal() and len(value) <= _MAX_DIGITS:
            values[field] = int(value)
        else:
            violations.append(Violation(FAULT_HEADER, f"{name} must be a whole number >= 0, is {value!r}"))
    try:
        faults = _replaced(default, values)
    except InvalidInputError as error:
        violations.extend(
            Violation(FAULT_HEADER, f"{v.field.replace('_', '-')} {v.description}") for v in error.violations
        )
    if violations:
        raise InvalidInputError(violations)
    return faults


_FIELDS = frozenset(field.name for field in fields(Faults))
_HEADER_NAMES = sorted(name.replace("_", "-") for name in _FIELDS)
_MAX_DIGITS = 9


def _replaced(default: Faults, values: Mapping[str, int | str]) -> Faults:
    changes: dict[str, object] = dict(values)
    return replace(default, **changes)  # type: ignore[arg-type]


def held_back(pieces: Sequence[str], every: int | None) -> tuple[str, ...]:
    """Return the texts of the tokens when every `every`-th one has none and the next one has both.

    The last token keeps its text, so the whole is the same.
    """
    if every is None:
        return tuple(pieces)
    texts = list(pieces)
    for index in range(every - 1, len(texts) - 1, every):
        texts[index + 1] = texts[index] + texts[index + 1]
        texts[index] = ""
    return tuple(texts)
