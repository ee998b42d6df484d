"""Times Recommend over loopback gRPC: 14 GPU profiles x 8 user levels, another LLM in every call.

    python benchmarks/recommend.py [CALLS]

The server runs as in production (a real nats-server beside it) and is pinned to one core, the client to another. The
same calls to the health service, in the same run, show what the transport alone takes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmpilot.catalog.v1.llm_pb2 import Llm, LlmSpec
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server

CALLS = 50_000
WARM_UP_CALLS = 500
CONCURRENT_CALLS = 8
DEADLINE_SECONDS = 10
START_SECONDS = 60
TITLES = ("calls", "p50 ms", "p99 ms", "calls/s", "server CPU ms", "growth MB")
WIDTHS = (8, 9, 9, 11, 15, 13)
HEADER = f"{'call':<12}" + "".join(f"{title:>{width}}" for title, width in zip(TITLES, WIDTHS, strict=True))


def request(index: int) -> pb.RecommendRequest:
    """Return a request for an LLM of another size than that of any other index."""
    spec = LlmSpec(
        model_type="llama",
        parameter_count=7_000_000_000 + 100_003 * index,
        layer_count=32,
        head_count=32,
        vocabulary_size=128_256,
        max_position_count=131_072,
        uses_flash_attention=True,
        torch_dtype="bfloat16",
    )
    return pb.RecommendRequest(llm=Llm(spec=spec), limits=pb.LatencyLimits(nttft_ms=100, itl_ms=50), users_count=200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one kind of call took."""

    call: str
    count: int
    p50_ms: float
    p99_ms: float
    calls_per_second: float
    server_cpu_ms: float
    """Per call."""
    memory_growth_mb: float
    """Of the server, from after the warm-up to the end."""

    def __str__(self) -> str:
        return (
            f"{self.call:<12}{self.count:>8}{self.p50_ms:>9.2f}{self.p99_ms:>9.2f}{self.calls_per_second:>11.0f}"
            f"{self.server_cpu_ms:>15.2f}{self.memory_growth_mb:>+13.1f}"
        )


def measured(name: str, call: Callable[[int], object], count: int, server: psutil.Process) -> Row:
    """Call one after the other for the latencies, then several at once for the rate."""
    for index in range(WARM_UP_CALLS):
        call(index)
    memory, cpu = server.memory_info().rss, sum(server.cpu_times()[:2])
    sequential = count // 2
    milliseconds = np.empty(sequential)
    for index in range(sequential):
        started = time.perf_counter()
        call(WARM_UP_CALLS + index)
        milliseconds[index] = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT_CALLS) as pool:
        for _ in pool.map(call, range(sequential, count), chunksize=1):
            pass
    seconds = time.perf_counter() - started
    return Row(
        call=name,
        count=count,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        calls_per_second=(count - sequential) / seconds,
        server_cpu_ms=(sum(server.cpu_times()[:2]) - cpu) / count * 1e3,
        memory_growth_mb=(server.memory_info().rss - memory) / 2**20,
    )


def address_of(process: subprocess.Popen[bytes], address_file: Path) -> str:
    """Return the address of the service once it serves."""
    deadline = time.monotonic() + START_SECONDS
    while not address_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the recommender did not start; its log is above")
        time.sleep(0.05)
    address = str(json.loads(address_file.read_text())["grpc"])
    wait_until_serving(address, START_SECONDS)
    return address


def measure(address: str, count: int, server: psutil.Process) -> None:
    """Print the table of one server."""
    checked = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(address) as channel:
        recommender = RecommendationServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)

        def check(_: int) -> object:
            return health.Check(checked, timeout=DEADLINE_SECONDS)  # type: ignore[attr-defined]  # stub lacks it

        def recommend(index: int) -> pb.RecommendResponse:
            return recommender.Recommend(request(index), timeout=DEADLINE_SECONDS)

        answer = recommend(0)
        print(f"{len(answer.options) + len(answer.rejections)} GPU profiles x 8 user levels;", end=" ")
        print(f"server memory {server.memory_info().rss / 2**20:.0f} MB; rate with {CONCURRENT_CALLS} calls at once")
        print(HEADER)
        print(measured("health", check, count // 5, server))
        print(measured("Recommend", recommend, count, server))


def main() -> None:
    """Start the server on one core and measure it from another."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CALLS
    cores = sorted(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp())
    with start_nats_server(folder / "nats") as nats:
        address_file = folder / "address.json"
        environment = os.environ | {
            "LLMPILOT_LISTEN": "127.0.0.1:0",
            "LLMPILOT_NATS_URL": nats.url,
            "LLMPILOT_ADDRESS_FILE": str(address_file),
            "LLMPILOT_LOG_LEVEL": "warning",
        }
        process = subprocess.Popen([sys.executable, "-m", "llmpilot_recommender"], env=environment)
        try:
            address = address_of(process, address_file)
            server = psutil.Process(process.pid)
            server.cpu_affinity([cores[0]])
            os.sched_setaffinity(0, {cores[-1]})
            measure(address, count, server)
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)


if __name__ == "__main__":
    main()
