"""Streams requests of the profile `production` from the workload generator over loopback gRPC, and the same bytes raw.

    python benchmarks/workload_streaming.py [REQUESTS] [PROMPTS]

The service is a process of its own, pinned to one core; the client is pinned to another. `raw socket` is a process on
the service's core that sends messages of the same sizes, made beforehand, over a TCP connection: nothing is drawn,
packed or framed. Each row is the best of three rounds in which the rows take turns. The client drops what it reads.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import psutil

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub

REQUESTS = 10_000_000
PROMPTS = 50_000
ROUNDS = 3
BATCH_SIZES = (65_536, 8_192)
START_SECONDS = 60
TIMEOUT_SECONDS = 600
PROFILE = pb.Sampling(workload_model="workloadModels/production")
RAW = "--raw"
RECEIVE_BYTES = 1 << 20
TITLES = ("requests/s", "MB", "MB/s", "server CPU s")
HEADER = f"{'':<34}" + "".join(f"{title:>14}" for title in TITLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One stream."""

    count: int
    byte_count: int
    seconds: float
    cpu_seconds: float

    def row(self, title: str) -> str:
        """Return the line of the table."""
        megabytes = self.byte_count / 1e6
        numbers = (f"{self.count / self.seconds:,.0f}", f"{megabytes:.0f}", f"{megabytes / self.seconds:.0f}")
        return f"{title:<34}" + "".join(f"{text:>14}" for text in (*numbers, f"{self.cpu_seconds:.2f}"))


@contextmanager
def server(command: list[str], core: int, *, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process on a core."""
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        psutil.Process(process.pid).cpu_affinity([core])
        yield process
    finally:
        process.terminate()
        process.wait(START_SECONDS)


@contextmanager
def service(core: int) -> Iterator[tuple[WorkloadServiceStub, psutil.Process]]:
    """Run the workload generator on a core; profiles need no NATS."""
    with tempfile.TemporaryDirectory() as folder:
        address_file = Path(folder) / "address.json"
        environment = {
            "LLMPILOT_LISTEN": "127.0.0.1:0",
            "LLMPILOT_ADDRESS_FILE": str(address_file),
            "LLMPILOT_NATS_URL": "nats://127.0.0.1:1",
        }
        command = [sys.executable, "-m", "llmpilot_workload_generator"]
        with server(command, core, environment=environment) as process:
            deadline = time.monotonic() + START_SECONDS
            while not address_file.exists():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("the service does not start")
                time.sleep(0.01)
            address = address_file.read_text().split('"grpc": "')[1].split('"')[0]
            with grpc.insecure_channel(address) as channel:
                yield WorkloadServiceStub(channel), psutil.Process(process.pid)


def sampled(stub: WorkloadServiceStub, process: psutil.Process, count: int, batch_size: int) -> Round:
    """Stream samples."""
    request = pb.SampleRequestsRequest(sampling=PROFILE, request_count=count, batch_size=batch_size)
    return timed(
        process,
        ((batch.request_count, batch.ByteSize()) for batch in stub.SampleRequests(request, timeout=TIMEOUT_SECONDS)),
    )


def rendered(stub: WorkloadServiceStub, process: psutil.Process, count: int, target: pb.Server.ValueType) -> Round:
    """Stream prompts."""
    request = pb.StreamRequestsRequest(
        sampling=PROFILE, request_count=count, server=target, served_model="llm", fixed_output_length=True
    )
    return timed(
        process,
        ((len(answer.requests), answer.ByteSize()) for answer in stub.StreamRequests(request, timeout=TIMEOUT_SECONDS)),
    )


def timed(process: psutil.Process, messages: Iterator[tuple[int, int]]) -> Round:
    """Read a stream to its end."""
    cpu_before = sum(process.cpu_times()[:2])
    start = time.perf_counter()
    count = byte_count = 0
    for message_count, message_bytes in messages:
        count += message_count
        byte_count += message_bytes
    seconds = time.perf_counter() - start
    return Round(
        count=count, byte_count=byte_count, seconds=seconds, cpu_seconds=sum(process.cpu_times()[:2]) - cpu_before
    )


def send_raw(message_bytes: int, message_count: int) -> None:
    """Send messages of this size to whoever connects, for ever."""
    message = os.urandom(message_bytes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            with connection:
                for _ in range(message_count):
                    connection.sendall(message)


def raw(port: int, process: psutil.Process, *, count: int, batch_size: int, message_bytes: int) -> Round:
    """Read what a raw sender sends."""
    buffer = bytearray(RECEIVE_BYTES)

    def received() -> Iterator[tuple[int, int]]:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            while read_bytes := connection.recv_into(buffer):
                yield 0, read_bytes

    measured = timed(process, received())
    if measured.byte_count != -(-count // batch_size) * message_bytes:
        raise RuntimeError("the raw stream broke off")
    return Round(
        count=count, byte_count=measured.byte_count, seconds=measured.seconds, cpu_seconds=measured.cpu_seconds
    )


def main() -> None:
    """Print the table."""
    count, prompt_count = (int(text) for text in (*sys.argv[1:], str(REQUESTS), str(PROMPTS))[:2])
    cores = psutil.Process().cpu_affinity()
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the service, one for the client")
    psutil.Process().cpu_affinity([cores[1]])
    rows: dict[str, Callable[[], Round]] = {}
    with service(cores[0]) as (stub, process):
        batch_size = BATCH_SIZES[0]
        message_bytes = sampled(stub, process, batch_size, batch_size).byte_count
        message_count = -(-count // batch_size)
        raw_command = [sys.executable, __file__, RAW, str(message_bytes), str(message_count)]
        with server(raw_command, cores[0], environment={}) as sender:
            assert sender.stdout is not None  # noqa: S101 a pipe
            port, raw_process = int(sender.stdout.readline()), psutil.Process(sender.pid)
            for size in BATCH_SIZES:
                rows[f"SampleRequests, batches of {size:,}"] = partial(sampled, stub, process, count, size)
            rows["raw socket"] = partial(
                raw, port, raw_process, count=count, batch_size=batch_size, message_bytes=message_bytes
            )
            rows["StreamRequests, prompts"] = partial(rendered, stub, process, prompt_count, pb.SERVER_UNSPECIFIED)
            rows["StreamRequests, OpenAI bodies"] = partial(
                rendered, stub, process, prompt_count, pb.SERVER_OPENAI_COMPLETIONS
            )
            for run in rows.values():
                run()  # compiles, connects
            rounds = [{title: run() for title, run in rows.items()} for _ in range(ROUNDS)]
    best = {title: min((each[title] for each in rounds), key=lambda one: one.seconds) for title in rows}
    print(f"{count:,} samples of 7 parameters ({message_bytes / batch_size:.1f} bytes each), {prompt_count:,} prompts")
    print(HEADER)
    for title, fastest in best.items():
        print(fastest.row(title))
    share = best["raw socket"].seconds / best[f"SampleRequests, batches of {batch_size:,}"].seconds
    print(f"\nshare of the raw socket: {share:.0%}")


if __name__ == "__main__":
    if sys.argv[1:2] == [RAW]:
        send_raw(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
