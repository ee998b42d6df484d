import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import hypothesis
import numpy as np
import pytest

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.loadtest.v1.loadtest_pb2_grpc import LoadTestServiceStub
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server
from llmpilot_simulator.write_log import read_write_log

DEADLINE_SECONDS = 60
POLL_SECONDS = 0.01

hypothesis.settings.register_profile("any-machine", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("any-machine")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """`python -m llmpilot_loadtester` as a process of its own."""

    process: subprocess.Popen[bytes]
    stub: LoadTestServiceStub
    metrics_address: str
    log: Path

    def metrics(self) -> str:
        """Give what Prometheus scrapes."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=DEADLINE_SECONDS) as answer:
            text: str = answer.read().decode()
        return text

    def watch(self, name: str, start_index: int = 0) -> list[pb.LoadTestEvent]:
        """Give the events of a load test, until its end."""
        request = pb.WatchLoadTestRequest(name=name, start_index=start_index)
        return [answer.event for answer in self.stub.WatchLoadTest(request, timeout=DEADLINE_SECONDS)]


Eventually = Callable[[Callable[[], bool]], None]
StartService = Callable[..., AbstractContextManager[RunningService]]
MakeSpec = Callable[..., pb.LoadTestSpec]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(POLL_SECONDS)


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    """Waits until a condition holds."""
    return _wait


@pytest.fixture(scope="package")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real nats-server."""
    with start_nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture(scope="package")
def simulator_url() -> Iterator[str]:
    """The real simulator over HTTP: the first token after 20 ms, the others every 2 ms, whatever the load."""
    command = [sys.executable, "-m", "llmpilot_console", "simulate", "serve", "--llm", "llama-3.1-8b"]
    command += ["--fixed-ttft-ms", "20", "--fixed-itl-ms", "2", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            lines = (re.search(r"http://[0-9.:]+", line) for line in process.stdout)
            yield next(found.group(0) for found in lines if found)
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)


@pytest.fixture(scope="package")
def make_spec(simulator_url: str) -> MakeSpec:
    """Makes the specification of stages of so many users each against the simulator."""

    def make(*users_counts: int, measure_seconds: float = 0.5, url: str = simulator_url) -> pb.LoadTestSpec:
        return pb.LoadTestSpec(
            target=pb.Target(url=url, protocol=pb.PROTOCOL_OPENAI_COMPLETIONS),
            synthetic=pb.SyntheticRequests(input_tokens=20, output_tokens=10),
            stages=[
                pb.Stage(
                    load=pb.Load(kind=pb.LOAD_KIND_USERS, user_steps=[pb.UserStep(users_count=users_count)]),
                    warm_up_seconds=0.1,
                    measure_seconds=measure_seconds,
                )
                for users_count in users_counts
            ],
            worker_count=1,
        )

    return make


@pytest.fixture(scope="package")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> StartService:
    """Runs the service with these variables; at the end it must stop without an error, unless it was killed."""

    @contextmanager
    def start(**variables: str) -> Iterator[RunningService]:
        folder = tmp_path_factory.mktemp("service")
        address_file, log = folder / "address.json", folder / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
        environment = inherited | {
            "LLMPILOT_LISTEN": "127.0.0.1:0",
            "LLMPILOT_ADDRESS_FILE": str(address_file),
            "LLMPILOT_TAKE_OVER_SECONDS": "1",
        }
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "llmpilot_loadtester"]
            process = subprocess.Popen(command, env=environment | variables, stdout=stream, stderr=stream)
        try:
            _wait(lambda: address_file.exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            addresses: dict[str, str] = json.loads(address_file.read_text())
            wait_until_serving(addresses["grpc"], DEADLINE_SECONDS)
            _wait(lambda: "connected to NATS" in log.read_text())
            with grpc.insecure_channel(addresses["grpc"]) as channel:
                yield RunningService(
                    process=process,
                    stub=LoadTestServiceStub(channel),
                    metrics_address=addresses["metrics"],
                    log=log,
                )
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)
        assert process.returncode in {0, -9}, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()

    return start


@pytest.fixture(scope="package")
def replicas(nats_url: str, start_service: StartService) -> Iterator[tuple[RunningService, RunningService]]:
    """Two running services that share a nats-server."""
    with start_service(LLMPILOT_NATS_URL=nats_url) as first, start_service(LLMPILOT_NATS_URL=nats_url) as second:
        yield first, second


@pytest.fixture(scope="package")
def service(replicas: tuple[RunningService, RunningService]) -> RunningService:
    """One of the two."""
    return replicas[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSimulator:
    """`llm-pilot simulate serve` as a process of its own: the server that knows when it wrote every token."""

    process: subprocess.Popen[str]
    url: str
    """Of OpenAI and TGI."""
    grpc_url: str
    write_log: Path

    def stop(self) -> None:
        """End it, so that its write log is whole."""
        self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)

    def written_nanos(self) -> dict[str, list[int]]:
        """When each token of a reply was written, by x-request-id."""
        writes = read_write_log(self.write_log)
        order = np.argsort(writes.reply, kind="stable")
        ends = np.flatnonzero(np.diff(writes.reply[order], append=-1)) + 1
        replies = np.split(writes.written_nanos[order], ends[:-1])
        return {
            writes.request_ids[int(writes.reply[order][end - 1])]: reply.tolist()
            for end, reply in zip(ends, replies, strict=True)
        }


StartSimulator = Callable[..., AbstractContextManager[RunningSimulator]]


@pytest.fixture(scope="session")
def start_simulator(tmp_path_factory: pytest.TempPathFactory) -> StartSimulator:
    """Runs a simulator that answers after 50 ms and then writes a token every 10 ms, and logs when it did."""

    @contextmanager
    def start() -> Iterator[RunningSimulator]:
        write_log = tmp_path_factory.mktemp("simulator") / "writes"
        script = "from llmpilot_simulator.cli_simulate import simulate; simulate()"
        command = [sys.executable, "-u", "-c", script, "serve", "--llm", "llama-3.1-8b", "--fixed-ttft-ms", "50"]
        command += ["--fixed-itl-ms", "10", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        command += ["--write-log", str(write_log)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                lines = (re.search(r"(http://\S+), TGIS at ([^ ;]+)", line) for line in process.stdout)
                found = next(filter(None, lines))
                yield RunningSimulator(
                    process=process, url=found.group(1), grpc_url=f"grpc://{found.group(2)}", write_log=write_log
                )
            finally:
                process.kill()

    return start


@pytest.fixture(scope="package")
def simulator(start_simulator: StartSimulator) -> Iterator[RunningSimulator]:
    """A simulator that serves all tests."""
    with start_simulator() as running:
        yield running
