import json
import os
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
import pytest

from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server

DEADLINE_SECONDS = 60
POLL_SECONDS = 0.01

hypothesis.settings.register_profile("any-machine", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("any-machine")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """`python -m llmpilot_workload_generator` as a process of its own."""

    process: subprocess.Popen[bytes]
    grpc_address: str
    metrics_address: str
    uploads: Path
    """Where it keeps files while it reads them."""
    stub: WorkloadServiceStub

    def metric(self, name: str, **labels: str) -> float:
        """Give the sum of a metric's samples with these labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=DEADLINE_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and all(pair in line for pair in wanted)
        )


Eventually = Callable[[Callable[[], bool]], None]
StartService = Callable[..., AbstractContextManager[RunningService]]


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
def start_service(tmp_path_factory: pytest.TempPathFactory) -> StartService:
    """Runs the service with these variables; at the end it must stop without an error."""

    @contextmanager
    def start(**variables: str) -> Iterator[RunningService]:
        folder = tmp_path_factory.mktemp("service")
        address_file, log, uploads = folder / "address.json", folder / "log", folder / "uploads"
        uploads.mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
        environment = inherited | {
            "LLMPILOT_LISTEN": "127.0.0.1:0",
            "LLMPILOT_ADDRESS_FILE": str(address_file),
            "TMPDIR": str(uploads),
        }
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "llmpilot_workload_generator"]
            process = subprocess.Popen(command, env=environment | variables, stdout=stream, stderr=stream)
        try:
            _wait(lambda: address_file.exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            addresses: dict[str, str] = json.loads(address_file.read_text())
            wait_until_serving(addresses["grpc"], DEADLINE_SECONDS)
            with grpc.insecure_channel(addresses["grpc"]) as channel:
                yield RunningService(
                    process=process,
                    grpc_address=addresses["grpc"],
                    metrics_address=addresses["metrics"],
                    uploads=uploads,
                    stub=WorkloadServiceStub(channel),
                )
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)
        assert process.returncode == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()

    return start


@pytest.fixture(scope="package")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real nats-server."""
    with start_nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture(scope="package")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of traces that the services were given."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="package")
def replicas(
    nats_url: str, traces: Path, start_service: StartService
) -> Iterator[tuple[RunningService, RunningService]]:
    """Two running services that share a nats-server and a folder of traces."""
    variables = {"LLMPILOT_NATS_URL": nats_url, "LLMPILOT_TRACES": str(traces), "LLMPILOT_MAX_UPLOAD_BYTES": "50000000"}
    with start_service(**variables) as first, start_service(**variables) as second:
        yield first, second


@pytest.fixture(scope="package")
def service(replicas: tuple[RunningService, RunningService]) -> RunningService:
    """One of the two."""
    return replicas[0]
