"""Where load tests are in their lives, shared by all replicas: the latest snapshot of each, in a JetStream stream.

Invariant: of two processes that change the same snapshot at once one is told so, and looks again.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from llmpilot_contracts.errors import NotFoundError, UnavailableError
from llmpilot_contracts.subjects import LOAD_TEST_STATE
from llmpilot_loadtester.domain.load_test import COLLECTION, KIND, LoadTest
from llmpilot_loadtester.wire_events import read_snapshot, write_snapshot
from llmpilot_servicekit.nats_connection import NatsConnection

_POLL_SECONDS = 0.02
_LONGEST_END_SECONDS = 5.0
_READ_AT_ONCE = 32
_PAGE_BYTES = 1024 * 1024
"""Of a page, before what is read at once is added: gRPC clients take 4 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLoadTest:
    """A load test as it was read."""

    load_test: LoadTest
    sequence: int
    """Of its snapshot in the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTestPage:
    """Some load tests, by id."""

    load_tests: Sequence[LoadTest]
    next_after: str
    """After which id the next page begins; empty: there is none."""


class LoadTestStates:
    """The snapshots. Every method but `follow` raises UnavailableError while NATS is away."""

    def __init__(self, nats: NatsConnection) -> None:
        self._nats = nats

    async def find(self, load_test_id: str) -> StoredLoadTest | None:
        """Return a load test; None where there is none."""
        found = await self._nats.last(LOAD_TEST_STATE.of(load_test_id))
        return StoredLoadTest(load_test=read_snapshot(found[0]), sequence=found[1]) if found else None

    async def get(self, load_test_id: str) -> StoredLoadTest:
        """Return a load test; raises NotFoundError."""
        found = await self.find(load_test_id)
        if found is None:
            raise NotFoundError(KIND, f"{COLLECTION}{load_test_id}", hint="ListLoadTests names all")
        return found

    async def wait_ended(self, load_test_id: str) -> None:
        """Wait until a load test has ended whose log says so; not long, as its owner may die before it can tell."""
        with suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(_LONGEST_END_SECONDS):
                while not (await self.get(load_test_id)).load_test.state.is_end:  # noqa: ASYNC110 NATS tells nobody
                    await asyncio.sleep(_POLL_SECONDS)

    async def put(self, load_test: LoadTest, *, after_sequence: int) -> StoredLoadTest:
        """Write a snapshot in the place of the one that was read (0: none).

        StaleSequenceError: another was written meanwhile. After UnavailableError it may be written or not.
        """
        sequence = await self._nats.publish(
            LOAD_TEST_STATE.of(load_test.id),
            event_id=uuid.uuid4().hex,
            payload=write_snapshot(load_test),
            after_sequence=after_sequence,
        )
        return StoredLoadTest(load_test=load_test, sequence=sequence)

    async def page(self, *, after: str, count: int) -> LoadTestPage:
        """Return the next load tests after this id, without results: at most `count`, fewer where they are large."""
        ids = [each for each in await self._nats.resource_ids(LOAD_TEST_STATE) if each > after]
        load_tests: list[LoadTest] = []
        taken_count = size_bytes = 0
        while taken_count < min(count, len(ids)) and size_bytes < _PAGE_BYTES:
            some = ids[taken_count : min(taken_count + _READ_AT_ONCE, count)]
            taken_count += len(some)
            for found in await asyncio.gather(*map(self.find, some)):
                if found is not None:
                    load_tests.append(replace(found.load_test, results=()))
                    size_bytes += write_snapshot(load_tests[-1]).ByteSize()
        return LoadTestPage(load_tests=load_tests, next_after=ids[taken_count - 1] if len(ids) > taken_count else "")

    async def follow(self, see: Callable[[StoredLoadTest], None]) -> None:
        """Hand over every snapshot there is, and those that come. Ends only by cancellation."""

        async def take(message: Message, sequence: int) -> None:
            see(StoredLoadTest(load_test=read_snapshot(message), sequence=sequence))

        await self._nats.follow(LOAD_TEST_STATE, take)
