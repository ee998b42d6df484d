import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import nats
import pytest
from nats.js.errors import ObjectNotFoundError

from llmpilot_contracts.errors import PilotError, UnavailableError
from llmpilot_contracts.subjects import Bucket
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import CHUNK_BYTES, NatsObjects, StoredObject
from llmpilot_servicekit.nats_server import NatsServer

StartNats = Callable[..., NatsServer]

BUCKET = Bucket(name="FILES", description="Files.")
STREAM = "OBJ_FILES"


@asynccontextmanager
async def opened(url: str, *, wait: bool = True) -> AsyncIterator[tuple[NatsObjects, NatsConnection]]:
    """A bucket over a connection that runs."""
    connection = NatsConnection(url, streams=())
    running = asyncio.create_task(connection.run())
    try:
        if wait:
            await connection.wait_connected(20)
        yield NatsObjects(connection, BUCKET), connection
    finally:
        running.cancel()
        await asyncio.wait([running])


def checked(start_nats: StartNats, check: Callable[[NatsObjects, Any], Awaitable[None]]) -> None:
    """Run a check with a bucket and a plain client, the independent witness."""
    url = start_nats().url

    async def run() -> None:
        witness = await nats.connect(url)
        try:
            async with opened(url) as (objects, _):
                await check(objects, witness.jetstream())
        finally:
            await witness.close()

    asyncio.run(run())


async def found(objects: NatsObjects, name: str) -> StoredObject:
    stored = await objects.find(name)
    assert stored is not None
    return stored


async def message_count(jetstream: Any) -> int:
    return int((await jetstream.stream_info(STREAM)).state.messages)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17])
def test_what_was_written_is_read_by_us_and_by_the_nats_client(start_nats: StartNats, size: int) -> None:
    content = bytes(range(251)) * (size // 251) + bytes(range(size % 251))

    async def check(objects: NatsObjects, jetstream: Any) -> None:
        assert await objects.create("a file", content, labels={"made by": "a test"})
        stored = await found(objects, "a file")
        assert (stored.size_bytes, stored.labels) == (size, {"made by": "a test"})
        assert await objects.read(stored) == content
        if size:
            theirs = await (await jetstream.object_store("FILES")).get("a file")
            assert theirs.data == content

    checked(start_nats, check)


def test_an_empty_bucket_answers(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, _: Any) -> None:
        assert await objects.names() == []
        assert await objects.find("nothing") is None
        assert await objects.find_all(["nothing"]) == []

    checked(start_nats, check)


def test_names_are_sorted_and_may_be_anything(start_nats: StartNats) -> None:
    names = ["b", "a.b>*", "ä ö/ü", "c" * 200]

    async def check(objects: NatsObjects, _: Any) -> None:
        for name in names:
            assert await objects.create(name, name.encode())
        assert await objects.names() == sorted(names)
        assert [each.name for each in await objects.find_all([*names, "none"])] == names

    checked(start_nats, check)


def test_a_file_is_not_replaced_and_the_second_one_leaves_nothing(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        assert await objects.create("file", b"first")
        assert not await objects.create("file", b"second")
        assert await objects.read(await found(objects, "file")) == b"first"
        assert await message_count(jetstream) == 2

    checked(start_nats, check)


def test_of_many_writers_at_once_one_wins(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        won = await asyncio.gather(*(objects.create("file", bytes([index])) for index in range(20)))
        assert won.count(True) == 1
        assert await objects.read(await found(objects, "file")) == bytes([won.index(True)])
        assert await message_count(jetstream) == 2

    checked(start_nats, check)


def test_a_deleted_file_is_gone_and_its_name_is_free(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        await objects.create("file", bytes(3 * CHUNK_BYTES))
        stored = await found(objects, "file")
        await objects.delete(stored)
        assert await objects.find("file") is None
        assert await objects.names() == []
        assert await objects.read(stored) is None
        assert await message_count(jetstream) == 0
        assert await objects.create("file", b"new")
        await objects.delete(stored)  # late: means the one before
        assert await objects.read(await found(objects, "file")) == b"new"

    checked(start_nats, check)


def test_a_file_that_the_nats_client_deleted_is_gone(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        await objects.create("file", b"content")
        bucket = await jetstream.object_store("FILES")
        await bucket.delete("file")
        with pytest.raises(ObjectNotFoundError):
            await bucket.get_info("file")
        assert await objects.find("file") is None
        assert await objects.find_all(["file"]) == []

    checked(start_nats, check)


def test_a_write_that_is_cancelled_leaves_nothing(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        await objects.create("other", b"")
        writing = asyncio.create_task(objects.create("file", bytes(500 * CHUNK_BYTES)))
        async with asyncio.timeout(20):
            while await message_count(jetstream) < 3:
                pass
        writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        assert await objects.names() == ["other"]
        assert await message_count(jetstream) == 1

    checked(start_nats, check)


def test_a_write_that_is_cancelled_at_any_moment_leaves_a_whole_file_or_nothing(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        await objects.create("before", b"")
        for step_count in range(100):
            name = f"file {step_count}"
            writing = asyncio.create_task(objects.create(name, b"content"))
            for _ in range(step_count):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.wait([writing])
            stored = await objects.find(name)
            if stored is not None:
                assert await objects.read(stored) == b"content"
                await objects.delete(stored)
            assert await message_count(jetstream) == 1

    checked(start_nats, check)


def test_what_a_killed_writer_left_is_removed_once_it_is_old(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        assert await objects.remove_unnamed(idle=timedelta(0)) == 0
        await objects.create("file", b"content")
        for part in (b"one", b"two"):
            await jetstream.publish("$O.FILES.C.left", part)
        assert await objects.remove_unnamed(idle=timedelta(hours=1)) == 0
        assert await message_count(jetstream) == 4
        assert await objects.remove_unnamed(idle=timedelta(0)) == 1
        assert await message_count(jetstream) == 2
        assert await objects.read(await found(objects, "file")) == b"content"

    checked(start_nats, check)


def test_a_damaged_file_is_refused(start_nats: StartNats) -> None:
    async def check(objects: NatsObjects, jetstream: Any) -> None:
        await objects.create("file", b"content")
        stored = await found(objects, "file")
        await jetstream.purge_stream(STREAM, subject=f"$O.FILES.C.{stored.id}")
        await jetstream.publish(f"$O.FILES.C.{stored.id}", b"CONTENT")
        with pytest.raises(PilotError, match="file in FILES is damaged: delete it and make it again"):
            await objects.read(stored)

    checked(start_nats, check)


def test_a_file_outlives_the_server(start_nats: StartNats) -> None:
    async def check() -> None:
        first = start_nats()
        port = int(first.url.rpartition(":")[2])
        async with opened(first.url) as (objects, connection):
            await objects.create("file", b"content")
            first.kill()
            with pytest.raises(UnavailableError):
                await objects.find("file")
            start_nats(port)
            async with asyncio.timeout(20):
                while not connection.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            assert await objects.read(await found(objects, "file")) == b"content"

    asyncio.run(check())


@pytest.mark.parametrize(
    "ask",
    [
        lambda objects: objects.names(),
        lambda objects: objects.find("file"),
        lambda objects: objects.find_all(["file"]),
        lambda objects: objects.create("file", b""),
        lambda objects: objects.remove_unnamed(idle=timedelta(0)),
    ],
)
def test_without_nats_every_question_is_refused_at_once(ask: Callable[[NatsObjects], Awaitable[object]]) -> None:
    async def check() -> None:
        async with opened("nats://127.0.0.1:1", wait=False) as (objects, _):
            with pytest.raises(UnavailableError, match=r"NATS at nats://127\.0\.0\.1:1 is not connected: try again"):
                await ask(objects)

    asyncio.run(check())
