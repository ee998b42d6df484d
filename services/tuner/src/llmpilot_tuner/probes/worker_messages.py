"""What a prober and its worker processes say to each other: a line of JSON each, over two pipes.

Invariant: both sides speak only what this module has; a worker whose pipe ends stops by itself.
"""

from typing import ClassVar

import msgspec

from llmpilot_contracts.errors import Violation
from llmpilot_perfmodel.step_memory.batch import Batch, Execution
from llmpilot_tuner.domain.probing import Outcome, ProbeKind


class Order(msgspec.Struct, frozen=True, kw_only=True, tag="order"):
    """Down, once: be ready to run batches."""

    kind: ProbeKind
    config_json: str
    model_folder: str = ""
    """Empty: random weights."""
    execution: Execution
    capacity_bytes: int
    reserved_bytes: int = 0
    """Of a GPU, beside the capacity: room for what is not PyTorch's."""
    seed: int = 0
    rank: int = 0
    rank_count: int = 1
    meeting_folder: str = ""
    """Where ranks find each other; empty for a rank that is alone."""


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Down: run these batches in turn, and end after the first that does not pass."""

    number: int
    """Of the run; all ranks have the same."""
    batches: list[Batch]
    soak: bool = False


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Up, once: the LLM is loaded."""

    device: str
    weight_bytes: int
    versions: list[tuple[str, str]]
    notes: list[str] = []


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """Up instead of `Ready`: what was ordered cannot be had here; then the worker ends."""

    INVALID_INPUT: ClassVar[str] = "invalid-input"
    PRECONDITION: ClassVar[str] = "precondition"
    ERROR: ClassVar[str] = "error"

    why: str
    message: str
    violations: list[Violation] = []


class CaseResult(msgspec.Struct, frozen=True, kw_only=True, tag="case"):
    """Up: a batch was run."""

    index: int
    outcome: Outcome
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    live_before_bytes: int | None = None
    seconds: float = 0.0
    message: str = ""


class CaseFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Up: a batch failed for another reason than memory, and with it the run."""

    index: int
    message: str
    exit_code: int | None = None
    """Of the process that ran the batch, if it died."""
    log: str = ""
    """Empty: see what the worker wrote to its standard error."""


class Drifted(msgspec.Struct, frozen=True, kw_only=True, tag="drifted"):
    """Up: earlier batches left something alive, so this one and those behind it were not run."""

    index: int
    live_bytes: int
    baseline_bytes: int


class RunEnded(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Up: nothing more comes of this run, and another one may be ordered."""

    number: int


Answer = Ready | Refused | CaseResult | CaseFailed | Drifted | RunEnded

_encoder = msgspec.json.Encoder()
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
_orders: msgspec.json.Decoder[Order | Run] = msgspec.json.Decoder(Order | Run)


def pack(message: Order | Run | Answer) -> bytes:
    """Return the line of a message."""
    return _encoder.encode(message) + b"\n"


def unpack_answer(line: bytes) -> Answer:
    """Return what a worker says; raises msgspec.MsgspecError."""
    return _answers.decode(line)


def unpack_order(line: bytes) -> Order | Run:
    """Return what a worker is told; raises msgspec.MsgspecError."""
    return _orders.decode(line)
