"""A golden server in a process of its own, and what it knows: the true time of every token it wrote.

    python benchmarks/loadtest/golden.py staggered|lockstep ADDRESS WRITE_LOG

It is the simulator. `staggered`: every reply is alone, first token after 50 ms, then one every 10 ms. `lockstep`: one
batch whose tokens are all due at the same instant, every 10 ms, as engines with continuous batching send them.
Invariant: what a client reports is judged only by the write log, never by the settings.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.policies import Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.app import Addresses, build, run
from llmpilot_simulator.generation import ReplyLengths
from llmpilot_simulator.settings import FixedTimes, ModelledTimes, SimulatorSettings, Times
from llmpilot_simulator.write_log import read_write_log

MODEL = "golden"
SERVED_MODEL = "golden-simulated"
TTFT_SECONDS = 0.05
ITL_SECONDS = 0.01
MODES = ("staggered", "lockstep")
STOP_SECONDS = 30

Integers = npt.NDArray[np.int64]


def times(mode: str) -> Times:
    """Return when tokens leave."""
    if mode == "staggered":
        return FixedTimes(ttft_seconds=TTFT_SECONDS, itl_seconds=ITL_SECONDS)
    constants = StepConstants(
        decode_seconds=ITL_SECONDS,
        decode_seconds_per_sequence=0.0,
        decode_seconds_per_cached_token=0.0,
        prefill_seconds=ITL_SECONDS,
        prefill_seconds_per_token=0.0,
        prefill_seconds_per_request=0.0,
    )
    return ModelledTimes(
        policy=Vllm1Policy(block_count=1 << 20, max_num_seqs=4096, max_num_batched_tokens=1 << 16),
        tables=constants.tables(),
    )


def serve(mode: str, address: str, log: Path) -> None:
    """Be the server."""
    settings = SimulatorSettings(
        model_id=MODEL,
        context_length=1 << 17,
        times=times(mode),
        http_address=address,
        grpc_address=None,
        write_log=log,
        reply_lengths=ReplyLengths(never_ends=True),
        shutdown_grace_seconds=0.0,
    )

    def ready(addresses: Addresses) -> None:
        print(addresses.http, flush=True)

    asyncio.run(run(build(settings), ready=ready))


@contextmanager
def golden_server(mode: str, log: Path, *, core: int) -> Iterator[tuple[str, int]]:
    """Run the server on one core; yields its address and process id, and has stopped it when the block is left."""
    command = ["taskset", "-c", str(core), sys.executable, __file__, mode, "127.0.0.1:0", str(log)]
    errors = log.with_name("server-errors")
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            address = process.stdout.readline().strip() if process.stdout else ""
            if not address:
                raise RuntimeError(f"the golden server did not start: {errors.read_text()}")
            yield address, process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Replies of one length, in the order in which their requests arrived. Times are CLOCK_REALTIME nanoseconds."""

    request_ids: tuple[str, ...]
    arrival_nanos: Integers
    written_nanos: Integers
    """By reply and token."""
    lateness_nanos: Integers
    """By reply and token: behind the model's time."""

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def ttft_ms(self) -> npt.NDArray[np.float64]:
        """By reply."""
        return (self.written_nanos[:, 0] - self.arrival_nanos) / 1e6

    @property
    def itl_ms(self) -> npt.NDArray[np.float64]:
        """By reply and gap."""
        return np.diff(self.written_nanos, axis=1) / 1e6

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Truth":
        """Return some replies."""
        indices = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Truth(
            request_ids=tuple(self.request_ids[int(index)] for index in indices),
            arrival_nanos=self.arrival_nanos[indices],
            written_nanos=self.written_nanos[indices],
            lateness_nanos=self.lateness_nanos[indices],
        )


def read_truth(log: Path, *, output_tokens: int) -> Truth:
    """Return the replies that have exactly so many tokens: the requests of a load, not a client's probes."""
    writes = read_write_log(log)
    order = np.lexsort((writes.token_index, writes.reply))
    counts = np.bincount(writes.reply, minlength=len(writes.request_ids))
    starts = np.cumsum(counts) - counts
    whole = np.flatnonzero(counts == output_tokens)
    whole = whole[np.argsort(writes.arrival_nanos[whole], kind="stable")]
    rows = order[starts[whole][:, None] + np.arange(output_tokens)]
    return Truth(
        request_ids=tuple(writes.request_ids[int(index)] for index in whole),
        arrival_nanos=writes.arrival_nanos[whole],
        written_nanos=writes.written_nanos[rows],
        lateness_nanos=writes.lateness_nanos[rows],
    )


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
