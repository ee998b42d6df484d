"""Worker processes that need no PyTorch, and of which most misbehave; the first argument says how."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.probes.worker_messages import Order, Ready
from llmpilot_tuner.torch_worker.in_process import InProcess
from llmpilot_tuner.torch_worker.serving import CaseAnswer, serve

NEVER_SECONDS = 3600.0
WEIGHT_BYTES = 1_000_000
TOKEN_BYTES = 1_000
LEAK_BYTES = 3 << 20
HOW, ARGUMENTS = sys.argv[1], sys.argv[2:]


class Memory:
    """A device that is a number."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.live_bytes = self.peak_bytes = WEIGHT_BYTES
        self.reserved_bytes: int | None = None

    def reset_peak(self) -> None:
        """Count anew."""
        self.peak_bytes = self.live_bytes

    def give_back(self) -> None:
        """Hold nothing."""

    def await_step(self) -> None:
        """Be done."""

    def problem(self) -> str:
        """Nothing can go wrong."""
        return ""


class Steps:
    """A step takes so many bytes a token; a case that is no word of its own is what the step raises."""

    def __init__(self, order: Order, memory: Memory) -> None:
        self._order = order
        self._memory = memory

    def run(self, batch: Batch) -> None:
        """Take memory, or do what the case says."""
        if batch.case.startswith("raise "):
            raise RuntimeError(batch.case.removeprefix("raise "))
        if batch.case == "odd":
            misbehave(self._order.rank)
        needed = self._memory.live_bytes + TOKEN_BYTES * batch.token_count
        if needed > self._memory.capacity_bytes:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        self._memory.peak_bytes = needed
        if HOW == "leak":
            self._memory.live_bytes += LEAK_BYTES


def say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def misbehave(rank: int) -> None:  # noqa: C901 a line for each way
    match HOW:
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(NEVER_SECONDS)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed-once":
            flag = Path(ARGUMENTS[0])
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case "bad-alloc":
            sys.stderr.write(
                "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
            )
            sys.stderr.flush()
            os.abort()
        case "segfault":
            say("the last words\n")
            ctypes.string_at(0)
        case "garble":
            os.write(int(ARGUMENTS[0]), b"HTTP/1.1 200 OK\n")
        case "endless-line":
            while True:
                os.write(int(ARGUMENTS[0]), bytes(65536))
        case "one-rank":
            if rank == 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            time.sleep(NEVER_SECONDS)
        case "child":
            command = [sys.executable, "-c", f"import time; time.sleep({NEVER_SECONDS})", "torch_worker's child"]
            subprocess.Popen(command)
            time.sleep(NEVER_SECONDS)


class OddMeter:
    """Counts tokens."""

    def __init__(self, order: Order) -> None:
        self._memory = Memory(order.capacity_bytes)
        self._steps = InProcess(Steps(order, self._memory), self._memory, capacity_bytes=order.capacity_bytes)

    def start(self) -> Ready:
        """Be ready, or not."""
        match HOW:
            case "refuses":
                raise PreconditionError("no such GPU: use another")
            case "refuses-input":
                raise InvalidInputError([Violation("heads", "are missing"), Violation("layers", "are missing")])
            case "fails-at-start":
                raise RuntimeError("the driver is drunk")
            case "hangs-at-start":
                time.sleep(NEVER_SECONDS)
            case "prints":
                print("a library says hello")  # noqa: T201 that is the point
                sys.stdout.flush()
        self._steps.warm_up([])
        return Ready(device=f"process {os.getpid()}", weight_bytes=WEIGHT_BYTES, versions=[("odd", "1")], notes=["odd"])

    def run(self, number: int, batches: Sequence[Batch], *, soak: bool) -> Iterator[CaseAnswer]:  # noqa: ARG002
        """Run batches."""
        yield from self._steps.run(batches, soak=soak)


if __name__ == "__main__":
    if HOW == "dies-at-start":
        sys.stderr.write("".join(f"line {number}\n" for number in range(1000)))
        sys.exit(3)
    if HOW in {"garble", "endless-line"}:
        ARGUMENTS.append(str(os.dup(1)))
    sys.exit(serve(OddMeter))
