import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import hypothesis
import pytest

from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub
from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_recommender.app import load_knowledge
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.settings import RecommenderSettings
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_server import start_nats_server
from llmpilot_servicekit.settings import load_settings

DEADLINE_SECONDS = 30
POLL_SECONDS = 0.01

UNPRICED_GPU = "name,architecture,memory_gb,memory_bandwidth_gb_per_second\nUNPRICED-80GB,Hopper,80,3350\n"
"""A GPU of which no price is known."""
HOUSE_PRICES = "gpu_profile,price_per_hour\n8xMI300X-192GB,1234.5\n"
"""A price of the operator's own, unlike the bundled one."""

hypothesis.settings.register_profile("any-machine", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("any-machine")

Eventually = Callable[[Callable[[], bool]], None]
StartRecommender = Callable[..., AbstractContextManager[dict[str, str]]]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(POLL_SECONDS)


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    """Waits until a condition holds."""
    return _wait


@pytest.fixture(scope="session")
def bundled_knowledge() -> Knowledge:
    """What a service without settings knows."""
    return load_knowledge(load_settings(RecommenderSettings, {}))


@pytest.fixture(scope="session")
def small_dataset(bundled_knowledge: Knowledge) -> Dataset:
    """Four LLMs of three families on two GPU profiles under four loads: enough to train on in milliseconds."""
    llms = {"llama-7b", "llama-13b", "bigcode/starcoder", "ibm/mpt-7b-instruct2"}
    return Dataset(
        row
        for row in bundled_knowledge.dataset.measurements
        if row.llm in llms and row.gpu_profile in {"1xA100-40GB", "1xH100-80GB"} and row.users_count in {1, 8, 32, 128}
    )


@pytest.fixture(scope="package")
def start_recommender(tmp_path_factory: pytest.TempPathFactory) -> StartRecommender:
    """Runs `python -m llmpilot_recommender` with these variables; gives its addresses while it serves."""

    @contextmanager
    def start(**variables: str) -> Iterator[dict[str, str]]:
        folder = tmp_path_factory.mktemp("recommender")
        address_file, log = folder / "address.json", folder / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
        environment = inherited | {"LLMPILOT_LISTEN": "127.0.0.1:0", "LLMPILOT_ADDRESS_FILE": str(address_file)}
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "llmpilot_recommender"]
            process = subprocess.Popen(command, env=environment | variables, stdout=stream, stderr=stream)
        try:
            _wait(lambda: address_file.exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            addresses: dict[str, str] = json.loads(address_file.read_text())
            wait_until_serving(addresses["grpc"], DEADLINE_SECONDS)
            yield addresses
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)
        assert process.returncode == 0, log.read_text()

    return start


@pytest.fixture(scope="package")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real nats-server."""
    with start_nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture(scope="package")
def addresses(
    nats_url: str, start_recommender: StartRecommender, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The addresses of a running recommender that knows a GPU without a price and one house price."""
    folder: Path = tmp_path_factory.mktemp("tables")
    gpus, prices = folder / "gpus.csv", folder / "prices.csv"
    gpus.write_text(UNPRICED_GPU)
    prices.write_text(HOUSE_PRICES)
    with start_recommender(LLMPILOT_NATS_URL=nats_url, LLMPILOT_GPUS=str(gpus), LLMPILOT_PRICES=str(prices)) as running:
        yield running


@pytest.fixture(scope="package")
def service(addresses: dict[str, str]) -> Iterator[RecommendationServiceStub]:
    """A client of the running recommender."""
    with grpc.insecure_channel(addresses["grpc"]) as channel:
        yield RecommendationServiceStub(channel)


@pytest.fixture(scope="session")
def publish() -> Callable[[str, Sequence[MeasurementRecorded]], None]:
    """Publishes events to the NATS server at a URL and waits for its acknowledgements."""

    async def connect_and_publish(url: str, events: Sequence[MeasurementRecorded]) -> None:
        nats = NatsConnection(url, streams=STREAMS)
        async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as group:
            running = group.create_task(nats.run())
            await nats.wait_connected()
            for event in events:
                await nats.publish(MEASUREMENT_RECORDED, event_id=event.event_id, payload=event)
            running.cancel()

    return lambda url, events: asyncio.run(connect_and_publish(url, events))
