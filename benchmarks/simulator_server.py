"""Times the simulator's tokens: 512 streams of 100 tokens a second from one core, against when each was due.

    python benchmarks/simulator_server.py [--streams N] [--seconds S] [--runs N] [--own-core]

The server is a process of its own, pinned to one core; a client that only reads is pinned to another. How late a token
was is read from the server's write log, for the seconds in which every stream was running.

--own-core: the server runs at real-time priority (needs root), for a machine whose cores others use as well: a process
that waits for its time slice is late by milliseconds, whatever it does.

staggered: every stream is alone, at its own phase (the golden server of load testers).
lock step: one batch, all tokens of a step due at the same instant, so the last ones wait for the system calls of the
others. With a frontend time, the API server in front of the model takes so long for each token, and they are due one
after the other.
"""

import argparse
import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from llmpilot_perfmodel.batching.policies import Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.app import Addresses, build, run
from llmpilot_simulator.settings import FixedTimes, ModelledTimes, SimulatorSettings, Times
from llmpilot_simulator.write_log import read_write_log

STREAMS = 512
SECONDS = 15
TOKENS_PER_SECOND = 100
START_SECONDS = 60
RAMP_SECONDS = 1.5
"""In which all streams start."""
EDGE_SECONDS = 1.0
"""Left out at both ends of the time in which all streams run."""
FRONTEND_SECONDS = 18e-6
MODES = ("staggered", "lock step", "lock step + frontend")
TITLES = ("tokens", "p50 ms", "p99 ms", "max ms", "server CPU", "us/token")
HEADER = f"{'':<22}" + "".join(f"{title:>12}" for title in TITLES)


def times(mode: str) -> Times:
    """Return when tokens leave: a token every 10 ms in each mode."""
    step_seconds = 1 / TOKENS_PER_SECOND
    if mode == "staggered":
        return FixedTimes(ttft_seconds=step_seconds, itl_seconds=step_seconds)
    constants = StepConstants(
        decode_seconds=step_seconds,
        decode_seconds_per_sequence=0.0,
        decode_seconds_per_cached_token=0.0,
        prefill_seconds=step_seconds,
        prefill_seconds_per_token=0.0,
        prefill_seconds_per_request=0.0,
    )
    return ModelledTimes(
        policy=Vllm1Policy(block_count=1 << 20, max_num_seqs=4096, max_num_batched_tokens=16384),
        tables=constants.tables(),
        frontend_seconds_per_token=FRONTEND_SECONDS if "frontend" in mode else 0.0,
    )


def serve(mode: str, log: Path, *, owns_core: bool) -> None:
    """Be the server, on the first core."""
    os.sched_setaffinity(0, {0})
    if owns_core:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    settings = SimulatorSettings(
        model_id="benchmark",
        context_length=1 << 20,
        times=times(mode),
        http_address="127.0.0.1:0",
        grpc_address=None,
        write_log=log,
    )

    def ready(addresses: Addresses) -> None:
        print(addresses.http, flush=True)

    asyncio.run(run(build(settings), ready=ready))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one mode came to."""

    mode: str
    lateness_ms: np.ndarray
    cpu_share: float
    token_rate: float

    def __str__(self) -> str:
        if not len(self.lateness_ms):
            return f"{self.mode:<22}  the server fell so far behind that no second had every stream running"
        p50, p99, most = np.percentile(self.lateness_ms, (50, 99, 100))
        cells = (
            f"{len(self.lateness_ms):,}",
            f"{p50:.3f}",
            f"{p99:.3f}",
            f"{most:.2f}",
            f"{self.cpu_share:.0%}",
            f"{1e6 * self.cpu_share / self.token_rate:.1f}",
        )
        return f"{self.mode:<22}" + "".join(f"{cell:>12}" for cell in cells)


def read_streams(address: str, stream_count: int, seconds: float, server: psutil.Process) -> float:
    """Open streams at a steady rate and read all to their end; returns the server's CPU share while all ran."""
    host, _, port = address.rpartition(":")
    body = json.dumps(
        {
            "prompt": "a benchmark",
            "max_tokens": int(seconds * TOKENS_PER_SECOND),
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    poller = select.epoll()
    connections: dict[int, socket.socket] = {}
    buffer = bytearray(1 << 20)
    start = time.monotonic()
    opened = 0
    busy_from: tuple[float, float] | None = None
    share = 0.0
    while opened < stream_count or connections:
        now = time.monotonic() - start
        while opened < stream_count and now >= opened * RAMP_SECONDS / stream_count:
            connection = socket.create_connection((host, int(port)))
            connection.setblocking(False)
            connection.send(head.encode() + body)
            connections[connection.fileno()] = connection
            poller.register(connection, select.EPOLLIN)
            opened += 1
        if opened == stream_count and busy_from is None and now > RAMP_SECONDS + EDGE_SECONDS:
            busy_from = now, sum(server.cpu_times()[:2])
        if busy_from is not None and not share and now > seconds - EDGE_SECONDS:
            share = (sum(server.cpu_times()[:2]) - busy_from[1]) / (now - busy_from[0])
        for descriptor, _ in poller.poll(0.001 if opened < stream_count else 0.1):
            if not connections[descriptor].recv_into(buffer):
                poller.unregister(descriptor)
                connections.pop(descriptor).close()
    return share


def measure(mode: str, stream_count: int, seconds: float, *, owns_core: bool) -> Row:
    """Run one mode."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "writes"
        command = [sys.executable, __file__, "--serve", mode, str(log), *(["--own-core"] if owns_core else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                address = process.stdout.readline().strip() if process.stdout else ""
                share = read_streams(address, stream_count, seconds, psutil.Process(process.pid))
            finally:
                process.terminate()
                process.wait(START_SECONDS)
        writes = read_write_log(log)
    all_run_from = writes.arrival_nanos.max() + EDGE_SECONDS * 1e9
    all_run_to = writes.arrival_nanos.min() + (seconds - EDGE_SECONDS) * 1e9
    steady = (writes.due_nanos >= all_run_from) & (writes.due_nanos < all_run_to)
    return Row(
        mode=mode,
        lateness_ms=writes.lateness_nanos[steady] / 1e6,
        cpu_share=share,
        token_rate=float(steady.sum()) / ((all_run_to - all_run_from) / 1e9),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--runs", type=int, default=1, help="of each mode, in turn")
    parser.add_argument("--own-core", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        mode, log = arguments.serve
        serve(mode, Path(log), owns_core=arguments.own_core)
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[1:]) or set(cores))
    load = f"{arguments.streams} streams of {TOKENS_PER_SECOND} tokens/s for {arguments.seconds:g} s"
    print(f"{load}; how late tokens left:")
    print(HEADER)
    for _ in range(arguments.runs):
        for mode in MODES:
            print(measure(mode, arguments.streams, arguments.seconds, owns_core=arguments.own_core), flush=True)


if __name__ == "__main__":
    main()
