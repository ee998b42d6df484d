import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import UnavailableError
from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_recommender import cli_dataset
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import write_dataset
from llmpilot_recommender.measurement import Measurement
from llmpilot_recommender.publication import event_id_of, publish_measurements
from llmpilot_recommender.wire_measurement import read_measurement_recorded
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_server import start_nats_server

TIMEOUT_SECONDS = 20
NOBODY_LISTENS = "nats://127.0.0.1:1"

Publish = Callable[[str], list[tuple[int, int]]]


@pytest.fixture
def publish_all(small_dataset: Dataset) -> Publish:
    """Publishes the small dataset; gives what the progress callback was told."""

    def run(url: str) -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []
        asyncio.run(
            publish_measurements(url, small_dataset.measurements, lambda done, total: steps.append((done, total)))
        )
        return steps

    return run


async def stored(url: str, count: int) -> list[Measurement]:
    """The measurements of the stream, from the first on, until there are `count`."""
    found: list[Measurement] = []
    enough = asyncio.Event()

    async def handle(event: object, _sequence: int) -> None:
        assert isinstance(event, MEASUREMENT_RECORDED.payload)
        found.append(read_measurement_recorded(event)[0])  # type: ignore[arg-type]
        if len(found) >= count:
            enough.set()

    nats = NatsConnection(url, streams=STREAMS)
    async with asyncio.timeout(TIMEOUT_SECONDS), asyncio.TaskGroup() as group:
        tasks = [group.create_task(nats.run()), group.create_task(nats.follow(MEASUREMENT_RECORDED, handle))]
        await enough.wait()
        for task in tasks:
            task.cancel()
    return found


def test_all_measurements_are_stored_once_however_often_they_are_published(
    small_dataset: Dataset, publish_all: Publish, tmp_path: Path
) -> None:
    first, *_ = small_dataset.measurements
    last = replace(first, users_count=999)
    with start_nats_server(tmp_path) as server:
        assert publish_all(server.url) == [(done, 32) for done in range(1, 33)]
        publish_all(server.url)
        asyncio.run(publish_measurements(server.url, [last], lambda *_: None))
        assert asyncio.run(stored(server.url, 33)) == [*small_dataset.measurements, last]


def test_equal_measurements_have_equal_ids_and_others_do_not(small_dataset: Dataset) -> None:
    ids = {event_id_of(measurement) for measurement in small_dataset.measurements}
    assert len(ids) == 32
    first, *_ = small_dataset.measurements
    assert event_id_of(replace(first)) == event_id_of(first)
    assert event_id_of(replace(first, test_seconds=121.0)) not in ids


def test_command_says_that_no_nats_server_answers(small_dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "dataset.csv"
    write_dataset(file, small_dataset.measurements, {})
    result = CliRunner().invoke(cli_dataset.dataset, ["publish", str(file), "--nats-url", NOBODY_LISTENS])
    assert isinstance(result.exception, UnavailableError)
    assert NOBODY_LISTENS in str(result.exception)


def test_command_publishes_a_dataset_file(small_dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "dataset.csv"
    write_dataset(file, small_dataset.measurements, {})
    with start_nats_server(tmp_path / "nats") as server:
        result = CliRunner().invoke(cli_dataset.dataset, ["publish", str(file), "--nats-url", server.url])
        assert result.exception is None
        assert f"32 measurements published to {server.url}" in result.output
        assert asyncio.run(stored(server.url, 32)) == list(small_dataset.measurements)
