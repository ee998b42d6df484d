import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import nats.aio.client
import nats.errors
import psutil
import pytest
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value, StringValue
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from llmpilot_contracts.errors import InvalidInputError, PilotError, UnavailableError
from llmpilot_contracts.subjects import Stream, Subject
from llmpilot_servicekit.nats_connection import NatsConnection, StaleSequenceError
from llmpilot_servicekit.nats_server import NatsServer

StartNats = Callable[..., NatsServer]

STREAM = Stream(
    name="FACTS",
    subjects=("test.facts.>",),
    max_age=timedelta(days=3),
    duplicate_window=timedelta(minutes=1),
    description="Facts.",
)
SUBJECT = Subject(name="test.facts.recorded", payload=StringValue, stream=STREAM)
OTHER_SUBJECT = Subject(name="test.facts.other", payload=StringValue, stream=STREAM)


class Connection:
    """A connection that runs, and what its followers got."""

    def __init__(self, url: str, tasks: asyncio.TaskGroup, streams: tuple[Stream, ...]) -> None:
        self.registry = CollectorRegistry()
        self.nats = NatsConnection(url, streams=streams, registry=self.registry)
        self._task_group = tasks
        self._tasks = [tasks.create_task(self.nats.run())]

    async def publish(self, *texts: str) -> list[int]:
        """Publish each text under itself as event id."""
        return [
            await self.nats.publish(SUBJECT, event_id=text, payload=StringValue(value=text), timeout_seconds=20)
            for text in texts
        ]

    def follow(self, subject: Subject = SUBJECT, fail_on: str = "") -> list[tuple[str, int]]:
        """Follow in the background; give the list that fills with texts and sequences."""
        got: list[tuple[str, int]] = []

        async def handle(message: Message, sequence: int) -> None:
            assert isinstance(message, StringValue)
            if message.value == fail_on:
                raise ValueError("cannot handle it")
            got.append((message.value, sequence))

        self._tasks.append(self._task_group.create_task(self.nats.follow(subject, handle)))
        return got

    def cancel(self) -> None:
        """End what runs."""
        for task in self._tasks:
            task.cancel()

    def metric(self, name: str, **labels: str) -> float | None:
        """Give the value of a metric."""
        return self.registry.get_sample_value(name, labels)


@asynccontextmanager
async def connection(
    url: str, *, wait: bool = True, streams: tuple[Stream, ...] = (STREAM,)
) -> AsyncIterator[Connection]:
    async with asyncio.TaskGroup() as tasks:
        made = Connection(url, tasks, streams)
        try:
            if wait:
                await until(lambda: made.nats.connected)
            yield made
        finally:
            made.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def port_of(server: NatsServer) -> int:
    return int(server.url.rpartition(":")[2])


def numbered(count: int, start: int = 1) -> list[tuple[str, int]]:
    """Give what a follower must get: the n-th message is "n"."""
    return [(str(number), number) for number in range(start, start + count)]


def texts(count: int, start: int = 1) -> list[str]:
    return [text for text, _ in numbered(count, start)]


async def open_raw(url: str) -> Any:
    """Open a plain client, the independent witness."""
    return await nats.connect(url)


def test_waiting_for_a_server_that_is_not_there_ends_in_time() -> None:
    async def check() -> None:
        async with connection("nats://127.0.0.1:1", wait=False) as here:
            await here.nats.wait_connected(timeout_seconds=0.2)

    with capture_logs(), pytest.raises(ExceptionGroup) as caught:
        asyncio.run(check())
    (error,) = caught.value.exceptions
    assert isinstance(error, UnavailableError)
    assert str(error) == "NATS at nats://127.0.0.1:1 does not answer after 0.2 s: check the URL and that it runs"


def test_a_follower_gets_the_past_then_the_present(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            assert await here.publish(*texts(600)) == list(range(1, 601))
            got = here.follow()
            await until(lambda: len(got) == 600)
            await here.publish("601")
            await until(lambda: len(got) == 601)
            assert got == numbered(601)

    asyncio.run(check())


def test_a_repeated_event_id_is_stored_once(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            assert await here.publish("1", "2", "1", "3") == [1, 2, 1, 3]

    asyncio.run(check())


def test_a_follower_gets_its_subject_only(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            got, other = here.follow(), here.follow(OTHER_SUBJECT)
            await here.publish("1")
            await here.nats.publish(OTHER_SUBJECT, event_id="x", payload=StringValue(value="x"))
            await here.publish("3")
            await until(lambda: len(got) == 2 and len(other) == 1)
            assert got == [("1", 1), ("3", 3)]
            assert other == [("x", 2)]

    asyncio.run(check())


def test_followers_outlive_a_killed_server_without_loss_or_repetition(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            got = here.follow()
            await here.publish(*texts(300))
            for round_number in range(1, 4):
                await until(lambda count=300 * round_number: len(got) == count)  # type: ignore[misc]
                server.kill()
                await until(lambda: not here.nats.connected)
                assert here.metric("llmpilot_nats_connected") == 0
                with pytest.raises(UnavailableError, match="not connected"):
                    await here.publish("lost")
                server = start_nats(port_of(server))
                await until(lambda: here.nats.connected)
                await here.publish(*texts(300, start=300 * round_number + 1))
            await until(lambda: len(got) == 1_200)
            assert got == numbered(1_200)
            assert here.metric("llmpilot_nats_connected") == 1

    asyncio.run(check())


def test_a_server_killed_while_messages_wait_to_be_sent_is_connected_again(start_nats: StartNats) -> None:
    """nats-py then fails to close, and calls nobody back."""

    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            got = here.follow()
            await here.publish("before")
            client = here.nats.client
            server.kill()
            with suppress(nats.errors.ConnectionClosedError):
                while True:
                    await client.publish("test.facts.other", b"waits")
                    await asyncio.sleep(0)
            await asyncio.to_thread(start_nats, port_of(server))
            await until(lambda: here.nats.connected and here.nats.client is not client)
            await here.publish("after")
            await until(lambda: [text for text, _ in got] == ["before", "after"])

    asyncio.run(check())


def test_a_server_killed_in_the_middle_of_a_replay_loses_nothing(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            await here.publish(*texts(2_000))
            got = here.follow()
            await until(lambda: len(got) >= 300)
            server.kill()
            assert len(got) < 2_000
            start_nats(port_of(server))
            await until(lambda: len(got) >= 2_000)
            assert got == numbered(2_000)

    asyncio.run(check())


def test_a_server_that_is_dead_at_the_start_is_waited_for_and_logged_once(start_nats: StartNats) -> None:
    async def check(port: int) -> None:
        async with connection(f"nats://127.0.0.1:{port}", wait=False) as here:
            got = here.follow()
            await until(lambda: len(tries) == 4)  # all but the first must be silent
            start_nats(port)
            await until(lambda: here.nats.connected)
            await here.publish("1")
            await until(lambda: got == [("1", 1)])

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tries: list[str] = []

    class Recording(nats.aio.client.Client):
        async def connect(self, *arguments: Any, **options: Any) -> None:
            tries.append("try")
            await super().connect(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
        patch.setattr("llmpilot_servicekit.nats_connection.Client", Recording)
        asyncio.run(check(port))
    assert [entry["event"] for entry in logs] == ["NATS is away, trying on", "connected to NATS"]


def test_an_outage_is_logged_once_and_nats_py_is_silent(
    start_nats: StartNats, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            got = here.follow()
            await here.publish("1")
            await until(lambda: len(got) == 1)
            server.kill()
            await until(lambda: not here.nats.connected)
            start_nats(port_of(server))
            await until(lambda: here.nats.connected)

    with capture_logs() as logs:
        asyncio.run(check())
    assert [entry["event"] for entry in logs] == ["connected to NATS", "connection to NATS lost", "connected to NATS"]
    assert [record.message for record in caplog.records if record.name.startswith("nats")] == []


def test_a_recreated_stream_is_followed_from_its_first_message(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            got = here.follow()
            await here.publish("a", "b", "c")
            await until(lambda: len(got) == 3)
            raw = await open_raw(server.url)
            await raw.jetstream().delete_stream("FACTS")
            await raw.close()
            await until(lambda: here.metric("llmpilot_nats_connected") == 1)
            async with asyncio.timeout(30):
                while True:  # the follower creates the stream again
                    try:
                        assert await here.publish("d") == [1]
                        break
                    except UnavailableError:
                        await asyncio.sleep(0.01)
            await until(lambda: len(got) == 4)
            assert got == [("a", 1), ("b", 2), ("c", 3), ("d", 1)]

    with capture_logs():
        asyncio.run(check())


def test_messages_that_do_not_parse_or_fail_are_counted_and_skipped(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            got = here.follow(fail_on="bad")
            await here.publish("1", "bad")
            raw = await open_raw(server.url)
            await raw.jetstream().publish(SUBJECT.name, b"\xff\xff not a protobuf")
            await raw.close()
            await here.publish("4")
            await until(lambda: len(got) == 2)
            assert got == [("1", 1), ("4", 4)]
            assert here.metric("llmpilot_nats_messages_failed_total", subject=SUBJECT.name) == 2

    with capture_logs() as logs:
        asyncio.run(check())
    assert [entry["sequence"] for entry in logs if entry["event"] == "message skipped"] == [2, 3]


def test_the_stream_is_kept_in_files_as_the_table_says(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url):
            raw = await open_raw(server.url)
            config = (await raw.jetstream().stream_info("FACTS")).config
            await raw.close()
        assert (config.storage, config.max_age, config.duplicate_window) == ("file", 259_200, 60)
        assert config.subjects == ["test.facts.>"]

    asyncio.run(check())


def test_a_changed_table_updates_the_stream_and_keeps_its_messages(start_nats: StartNats) -> None:
    changed = replace(STREAM, subjects=("test.facts.>", "test.more.>"), max_age=None)

    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            await here.publish("1", "2")
        raw = await open_raw(server.url)
        await raw.jetstream().update_stream(name="FACTS", subjects=["test.facts.>"], max_msgs=1_000)
        async with connection(server.url, streams=(changed,)):
            info = await raw.jetstream().stream_info("FACTS")
            await raw.close()
        assert info.state.messages == 2
        assert info.config.subjects == ["test.facts.>", "test.more.>"]
        assert info.config.max_age == 0
        assert info.config.max_msgs == 1_000  # not in the table: the operator's

    asyncio.run(check())


def test_a_payload_of_another_type_is_refused(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            with pytest.raises(PilotError, match=r"carries google\.protobuf\.StringValue, not Int64Value"):
                await here.nats.publish(SUBJECT, event_id="1", payload=Int64Value(value=1))

    asyncio.run(check())


def test_a_payload_larger_than_the_server_takes_is_refused(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            with pytest.raises(InvalidInputError, match="at most 1048576"):
                await here.publish("x" * 2_000_000)
            assert await here.publish("1") == [1]

    asyncio.run(check())


def test_closing_against_a_frozen_server_ends_in_time_and_silence(
    start_nats: StartNats, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        server = start_nats()
        frozen = psutil.Process(server.process.pid)
        async with asyncio.timeout(20), connection(server.url) as here:
            got = here.follow()
            await here.publish("1")
            await until(lambda: len(got) == 1)
            frozen.suspend()
            await until(lambda: frozen.status() == psutil.STATUS_STOPPED)
        frozen.resume()

    asyncio.run(check())
    assert caplog.records == []


def test_a_frozen_server_makes_publishing_unavailable_in_time(start_nats: StartNats) -> None:
    async def check() -> None:
        server = start_nats()
        async with connection(server.url) as here:
            frozen = psutil.Process(server.process.pid)
            frozen.suspend()
            await until(lambda: frozen.status() == psutil.STATUS_STOPPED)
            with pytest.raises(UnavailableError, match="did not acknowledge"):
                await here.nats.publish(SUBJECT, event_id="1", payload=StringValue(), timeout_seconds=0.05)
            frozen.resume()

    asyncio.run(check())


def test_closing_takes_the_gauge_down(start_nats: StartNats) -> None:
    async def check() -> Connection:
        async with connection(start_nats().url) as here:
            assert here.metric("llmpilot_nats_connected") == 1
        return here

    here = asyncio.run(check())
    assert here.metric("llmpilot_nats_connected") == 0
    assert not here.nats.connected


class Swallowing(nats.aio.client.Client):
    """A client that loses the cancellation of a request, as `asyncio.wait_for` of Python 3.11 can."""

    entered: asyncio.Event

    async def request(self, *arguments: Any, **options: Any) -> Any:
        """Wait for the answer, cancelled or not."""
        asked = asyncio.ensure_future(super().request(*arguments, **options))
        self.entered.set()
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            return await asked


@pytest.mark.parametrize("work", ["run", "follow", "publish"])
def test_a_cancellation_that_the_client_loses_still_ends_the_work(
    start_nats: StartNats, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setattr("llmpilot_servicekit.nats_connection.Client", Swallowing)

    async def ignore(_message: Message, _sequence: int) -> None: ...

    async def check() -> None:
        Swallowing.entered = asyncio.Event()
        url = start_nats().url
        async with asyncio.timeout(20), connection(url) as here:
            works: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "run": NatsConnection(url, streams=[STREAM]).run,
                "follow": lambda: here.nats.follow(SUBJECT, ignore),
                "publish": lambda: here.publish("1"),
            }
            Swallowing.entered.clear()
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(works[work]())
                await Swallowing.entered.wait()
                task.cancel()
            assert task.cancelled()

    asyncio.run(check())


LATEST = replace(STREAM, name="LATEST", subjects=("test.latest.>",), latest_only=True)
OF_EACH = Subject(name="test.latest.*.state", payload=StringValue, stream=LATEST)


def test_of_two_publishers_after_the_same_message_one_is_told(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url) as here:
            first = await here.nats.publish(SUBJECT, event_id="a", payload=StringValue(value="a"), after_sequence=0)
            await here.nats.publish(SUBJECT, event_id="b", payload=StringValue(value="b"), after_sequence=first)
            for late in (0, first):
                with pytest.raises(StaleSequenceError, match="written by another meanwhile"):
                    await here.nats.publish(
                        SUBJECT, event_id=f"c{late}", payload=StringValue(value="c"), after_sequence=late
                    )
            with pytest.raises(StaleSequenceError):  # JetStream compares the sequence before it knows the id again
                await here.nats.publish(SUBJECT, event_id="b", payload=StringValue(value="b"), after_sequence=first)
            assert await here.nats.last(SUBJECT) == (StringValue(value="b"), 2)

    asyncio.run(check())


def test_the_latest_message_of_each_resource_is_kept(start_nats: StartNats) -> None:
    async def check() -> None:
        async with connection(start_nats().url, streams=(LATEST,)) as here:
            for event_id, resource in (("1", "a"), ("2", "b"), ("3", "a")):
                payload = StringValue(value=event_id)
                await here.nats.publish(OF_EACH.of(resource), event_id=event_id, payload=payload)
            assert await here.nats.resource_ids(OF_EACH) == ["a", "b"]
            assert await here.nats.last(OF_EACH.of("a")) == (StringValue(value="3"), 3)
            assert await here.nats.last(OF_EACH.of("c")) is None
            got = here.follow(OF_EACH)
            await until(lambda: len(got) == 2)
            assert got == [("2", 2), ("3", 3)]

    asyncio.run(check())


def test_without_a_server_nothing_is_read() -> None:
    async def check() -> None:
        nats_connection = NatsConnection("nats://127.0.0.1:1", streams=())
        with pytest.raises(UnavailableError, match="not connected"):
            await nats_connection.last(SUBJECT)
        with pytest.raises(UnavailableError, match="not connected"):
            await nats_connection.resource_ids(OF_EACH)

    asyncio.run(check())
