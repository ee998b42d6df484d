import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot.tuning.v1.tuning_pb2_grpc import TuningServiceStub
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server

DEADLINE_SECONDS = 60
POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """`python -m llmpilot_tuner` as a process of its own."""

    process: subprocess.Popen[bytes]
    stub: TuningServiceStub
    metrics_address: str
    log: Path

    def metrics(self) -> str:
        """Give what Prometheus scrapes."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=DEADLINE_SECONDS) as answer:
            text: str = answer.read().decode()
        return text

    def create(self, spec: pb.TuningSpec, request_id: str = "", tuning_id: str = "") -> pb.Tuning:
        """Have a tuning made."""
        request = pb.CreateTuningRequest(spec=spec, request_id=request_id or uuid.uuid4().hex, tuning_id=tuning_id)
        answer: pb.CreateTuningResponse = self.stub.CreateTuning(request, timeout=DEADLINE_SECONDS)
        return answer.tuning

    def get(self, name: str) -> pb.Tuning:
        """Give a tuning."""
        answer: pb.GetTuningResponse = self.stub.GetTuning(pb.GetTuningRequest(name=name), timeout=DEADLINE_SECONDS)
        return answer.tuning

    def cancel(self, name: str) -> pb.Tuning:
        """Cancel a tuning."""
        request = pb.CancelTuningRequest(name=name)
        answer: pb.CancelTuningResponse = self.stub.CancelTuning(request, timeout=DEADLINE_SECONDS)
        return answer.tuning

    def watch(self, name: str, start_index: int = 0) -> list[pb.TuningEvent]:
        """Give the events of a tuning, until its end."""
        request = pb.WatchTuningRequest(name=name, start_index=start_index)
        return [answer.event for answer in self.stub.WatchTuning(request, timeout=DEADLINE_SECONDS)]

    def watch_until(self, name: str, wanted: Callable[[pb.TuningEvent], bool]) -> list[pb.TuningEvent]:
        """Watch as far as an event, then go away."""
        call = self.stub.WatchTuning(pb.WatchTuningRequest(name=name), timeout=DEADLINE_SECONDS)
        events = []
        for answer in call:
            events.append(answer.event)
            if wanted(answer.event):
                call.cancel()
                return events
        raise AssertionError(f"it ended before: {events[-1]}")


Eventually = Callable[[Callable[[], bool]], None]
StartService = Callable[..., AbstractContextManager[RunningService]]
MakeSpec = Callable[..., pb.TuningSpec]


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


@pytest.fixture(scope="session")
def make_spec() -> MakeSpec:
    """Makes the specification of a bundled LLM on a GPU of the catalogue, by formulas unless told otherwise."""

    def make(**fields: Any) -> pb.TuningSpec:
        wanted: dict[str, Any] = {
            "llm": llm_pb2.Llm(name="llama-3.1-8b"),
            "probe": pb.PROBE_KIND_ANALYTIC,
            "server": pb.SERVER_KIND_TGIS,
            "gpu_profile": "1xA100-40GB",
            "longest_sequence": 1024,
        }
        return pb.TuningSpec(**(wanted | fields))

    return make


@pytest.fixture(scope="session")
def make_slow_spec() -> MakeSpec:
    """Makes the specification of a probe that takes its time: a small LLM under a real limit of memory."""
    pytest.importorskip("torch", reason="the probe runs the LLM: install llm-pilot-tuner[torch]")

    def make(**fields: Any) -> pb.TuningSpec:
        sizes = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 2048,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }
        wanted: dict[str, Any] = {
            "llm": llm_pb2.Llm(config_json=json.dumps(sizes)),
            "probe": pb.PROBE_KIND_CPU,
            "server": pb.SERVER_KIND_TGI,
            "gpu_memory_bytes": 128 * 2**20,
            "precision": "fp32",
            "longest_sequence": 256,
            "most_requests": 128,
            "soak_steps": 0,
            "precision_share": 0.3,
        }
        return pb.TuningSpec(**(wanted | fields))

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
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "llmpilot_tuner"]
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
                    stub=TuningServiceStub(channel),
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
