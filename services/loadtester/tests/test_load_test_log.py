"""The log against a real nats-server: order, no gap, no loss, no duplicate, one writer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import nats
import numpy as np
import pytest
from nats.js.api import DiscardPolicy

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.subjects import LOAD_TEST_EVENT, STREAMS
from llmpilot_loadtester.domain.events import Noted, RecordsCame, StageBegan
from llmpilot_loadtester.domain.record_frames import pack_records, unpack_records
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch, empty_records
from llmpilot_loadtester.domain.spec import Load, LoadKind, Stage, UserStep
from llmpilot_loadtester.load_test_log import LoadTestLog, load_test_log, read_history
from llmpilot_loadtester.load_test_states import LOAD_TEST_WIRE
from llmpilot_servicekit.jobs.job_log import replay, watch
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server

STAGE = Stage(
    load=Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=1),)),
    warm_up_seconds=0.0,
    measure_seconds=1.0,
)
StartNats = Callable[..., NatsServer]


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[StartNats]:
    """Starts real nats-servers on one store."""
    started: list[NatsServer] = []

    def start(port: int | None = None) -> NatsServer:
        started.append(start_nats_server(tmp_path / "nats", port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[NatsConnection]:
    connection = NatsConnection(url, streams=STREAMS)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(connection.run())
        try:
            await connection.wait_connected(20)
            yield connection
        finally:
            running.cancel()


@asynccontextmanager
async def writing(connection: NatsConnection, **options: int) -> AsyncIterator[LoadTestLog]:
    history = await read_history(connection, "lt-1")
    log = load_test_log(
        connection, "lt-1", next_index=history.next_index, last_sequence=history.last_sequence, **options
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(log.run())
        try:
            yield log
        finally:
            running.cancel()


async def kept(url: str) -> list[pb.LoadTestEvent]:
    """Read the stream with a plain client, the independent witness."""
    client = await nats.connect(url)
    jetstream = client.jetstream()
    info = await jetstream.stream_info("LOAD_TEST_EVENTS")
    subscription = await jetstream.subscribe(LOAD_TEST_EVENT.of("lt-1").name, ordered_consumer=True)
    events = [
        pb.LoadTestEvent.FromString((await subscription.next_msg(timeout=10)).data) for _ in range(info.state.messages)
    ]
    await client.close()
    return events


def notes(events: list[pb.LoadTestEvent]) -> list[tuple[int, str]]:
    return [(event.index, event.note) for event in events]


def test_events_are_kept_in_their_order(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection, writing(connection) as log:
            for number in range(200):
                await log.append(Noted(text=str(number)))
            await log.flush()
        assert notes(await kept(server.url)) == [(number, str(number)) for number in range(200)]

    asyncio.run(check())


def test_a_server_that_dies_in_the_middle_loses_nothing_and_repeats_nothing(start_nats: StartNats) -> None:
    """Killed and started again thrice while 300 events are written."""

    async def check() -> None:
        server = start_nats()
        port = int(server.url.rpartition(":")[2])
        async with connected(server.url) as connection, writing(connection) as log:
            for number in range(300):
                await log.append(Noted(text=str(number)))
                if number % 100 == 50:
                    await asyncio.sleep(0)
                    server.kill()
                    server = await asyncio.to_thread(start_nats, port)
            await log.flush()
        assert notes(await kept(server.url)) == [(number, str(number)) for number in range(300)]

    asyncio.run(check())


def test_a_stream_that_is_full_is_waited_for_and_nothing_is_lost(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection, writing(connection) as log, asyncio.TaskGroup() as tasks:
            jetstream = connection.client.jetstream()
            config = (await jetstream.stream_info("LOAD_TEST_EVENTS")).config
            await jetstream.update_stream(config, max_bytes=10_000, discard=DiscardPolicy.NEW)
            for number in range(20):
                await log.append(Noted(text=f"{number:01000}"))
            flushing = tasks.create_task(log.flush())
            while len(await kept(server.url)) < 8:  # noqa: ASYNC110 NATS tells nobody
                await asyncio.sleep(0)
            done, _ = await asyncio.wait([flushing], timeout=0.2)
            assert not done
            await jetstream.update_stream(config, max_bytes=-1)
            await flushing
        assert notes(await kept(server.url)) == [(number, f"{number:01000}") for number in range(20)]

    asyncio.run(check())


def test_who_appends_waits_when_too_much_waits(start_nats: StartNats) -> None:
    """1,000 bytes a note and room for 5,000: the sixth or so waits for the server to be back."""

    async def check() -> None:
        server = start_nats()
        port = int(server.url.rpartition(":")[2])
        async with (
            connected(server.url) as connection,
            writing(connection, largest_waiting_bytes=5_000) as log,
            asyncio.TaskGroup() as tasks,
        ):
            server.kill()
            appended = 0

            async def append() -> None:
                nonlocal appended
                for _ in range(20):
                    await log.append(Noted(text="x" * 1_000))
                    appended += 1

            appending = tasks.create_task(append())
            done, _ = await asyncio.wait([appending], timeout=0.2)
            assert not done
            assert 5 <= appended <= 6
            server = await asyncio.to_thread(start_nats, port)
            await appending
            await log.flush()
        assert [event.index for event in await kept(server.url)] == list(range(20))

    asyncio.run(check())


def test_a_second_writer_ends_the_first(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection, writing(connection) as first:
            await first.append(Noted(text="first"))
            await first.flush()
            async with writing(connection) as second:
                await second.append(Noted(text="second"))
                await second.flush()
                await first.append(Noted(text="too late"))
                with pytest.raises(StaleSequenceError):
                    await first.flush()
                with pytest.raises(StaleSequenceError):
                    await first.append(Noted(text="still too late"))
                await second.append(Noted(text="third"))
                await second.flush()
        assert notes(await kept(server.url)) == [(0, "first"), (1, "second"), (2, "third")]

    asyncio.run(check())


def test_a_history_says_how_often_each_stage_was_begun(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection:
            async with writing(connection) as log:
                for stage_index, attempt in ((0, 1), (1, 1), (1, 2)):
                    began = StageBegan(
                        stage_index=stage_index, attempt=attempt, stage=STAGE, start_unix_nanos=1, stage_count=2
                    )
                    await log.append(began)
                await log.flush()
            history = await read_history(connection, "lt-1")
        assert dict(history.attempts) == {0: 1, 1: 2}
        assert (history.next_index, history.results, history.ended) == (3, (), None)

    asyncio.run(check())


def test_a_replay_goes_on_live(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        got: list[int] = []

        async def take(message: object, _sequence: int) -> bool:
            assert isinstance(message, pb.LoadTestEvent)
            got.append(message.index)
            return message.note == "last"

        async with connected(server.url) as connection, writing(connection) as log, asyncio.TaskGroup() as tasks:
            await log.append(Noted(text="before"))
            await log.flush()
            replaying = tasks.create_task(replay(connection, LOAD_TEST_EVENT.of("lt-1"), take))
            while not got:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await log.append(Noted(text="live"))
            await log.append(Noted(text="last"))
            await replaying
        assert got == [0, 1, 2]

    asyncio.run(check())


def test_a_watch_of_a_load_test_that_has_ended_ends_though_its_log_does_not_say_so(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        got: list[object] = []

        async def send(message: object) -> None:
            got.append(message)

        async with connected(server.url) as connection, writing(connection) as log:
            for number in range(3):
                await log.append(Noted(text=str(number)))
            await log.flush()
            await watch(connection, LOAD_TEST_WIRE, "lt-1", 1, ended=True, send=send)
        assert got == (await kept(server.url))[1:]

    asyncio.run(check())


def test_an_event_of_another_writer_is_not_taken_for_this_ones_sent_again(start_nats: StartNats) -> None:
    """Some versions of JetStream look at the id before they compare the sequence: ids of writers must differ."""

    async def check() -> None:
        server = start_nats()
        ids = []
        for _ in range(2):
            async with connected(server.url) as connection, writing(connection) as log:
                await log.append(Noted(text="first"))
                await log.flush()
                client = connection.client
                last = await client.jetstream().get_last_msg("LOAD_TEST_EVENTS", LOAD_TEST_EVENT.of("lt-1").name)
                ids.append((last.headers or {})["Nats-Msg-Id"])
                await client.jetstream().purge_stream("LOAD_TEST_EVENTS")
        assert len(set(ids)) == 2

    asyncio.run(check())


def test_what_takes_events_and_fails_ends_the_replay(start_nats: StartNats) -> None:
    async def fail(_message: object, _sequence: int) -> bool:
        raise ZeroDivisionError

    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection, writing(connection) as log:
            await log.append(Noted(text="one"))
            await log.flush()
            with pytest.raises(ZeroDivisionError):
                await replay(connection, LOAD_TEST_EVENT.of("lt-1"), fail)

    asyncio.run(check())


def test_a_frame_too_large_for_a_message_travels_in_parts(start_nats: StartNats) -> None:
    """Error texts of 300 random characters each make 5,000 requests 1.5 MB, more than NATS takes in a message."""
    rng = np.random.default_rng(0)
    count = 5_000
    batch = replace(
        empty_records(),
        **{name: np.arange(count, dtype=np.int64) % 2 for name in REQUEST_COLUMNS},
        errors=tuple("".join(chr(97 + letter) for letter in row) for row in rng.integers(0, 26, (count, 300))),
        chunk_starts=np.zeros(count + 1, np.int64),
    )
    columns = pack_records(batch)
    assert len(columns) > 1024 * 1024

    async def check() -> None:
        server = start_nats()
        async with connected(server.url) as connection, writing(connection) as log:
            await log.append(RecordsCame(stage_index=0, attempt=1, request_count=count, columns=columns))
            await log.flush()
        events = await kept(server.url)
        assert [event.index for event in events] == list(range(len(events)))
        parts: list[RecordBatch] = [unpack_records(event.records.columns) for event in events]
        assert [event.records.request_count for event in events] == [len(part) for part in parts]
        assert tuple(error for part in parts for error in part.errors) == batch.errors

    asyncio.run(check())
