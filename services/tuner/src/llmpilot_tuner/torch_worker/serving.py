"""The loop of a worker process: it is ordered once, then runs batches until its pipe ends.

Invariant: what is said to the prober goes over the pipe that was the standard output; whatever libraries print goes to
the standard error. A worker never outlives the process that started it.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Protocol

from llmpilot_contracts.errors import InvalidInputError, PilotError
from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.probes.worker_messages import (
    Answer,
    CaseFailed,
    CaseResult,
    Drifted,
    Order,
    Ready,
    Refused,
    Run,
    RunEnded,
    pack,
    unpack_order,
)

_SET_PARENT_DEATH_SIGNAL = 1
_MOST_CHARACTERS = 4000

CaseAnswer = CaseResult | CaseFailed | Drifted


class Meter(Protocol):
    """Runs batches on one device and reads what memory they take."""

    def start(self) -> Ready:
        """Load the LLM. PilotError: what was ordered cannot be had here."""

    def run(self, number: int, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:
        """Run batches in turn; ends after the first that does not pass."""


def serve(make_meter: Callable[[Order], Meter]) -> int:
    """Speak to the prober over this process's pipes until it has no more to say; returns the exit code."""
    end_with_parent()
    down, up = sys.stdin.buffer, _own_output()
    first = down.readline()
    if not first:
        return 0
    order = unpack_order(first)
    if not isinstance(order, Order):
        raise TypeError("a worker is ordered before it runs anything")
    try:
        meter = make_meter(order)
        _say(up, meter.start())
    except Exception as error:  # noqa: BLE001 the prober is told, whatever it is
        _say(up, _refusal(error))
        return 0
    for line in down:
        run = unpack_order(line)
        if not isinstance(run, Run):
            raise TypeError("a worker is ordered once")
        for answer in meter.run(run.number, run.batches, soak=run.soak):
            _say(up, answer)
        _say(up, RunEnded(number=run.number))
    return 0


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, however busy this one is."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def clipped(text: str) -> str:
    """Return a text that is no longer than a message should be."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def _own_output() -> BinaryIO:
    up = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return up


def _say(up: BinaryIO, answer: Answer) -> None:
    up.write(pack(answer))
    up.flush()


def _refusal(error: Exception) -> Refused:
    if isinstance(error, InvalidInputError):
        return Refused(why=Refused.INVALID_INPUT, message=clipped(str(error)), violations=list(error.violations))
    if isinstance(error, PilotError):
        return Refused(why=Refused.PRECONDITION, message=clipped(str(error)))
    traceback.print_exception(error)
    return Refused(why=Refused.ERROR, message=clipped(f"{type(error).__name__}: {error}"))
