"""Where jobs are in their lives, shared by all replicas: the latest snapshot of each, in a JetStream stream.

Invariant: of two processes that change the same snapshot at once one is told so, and looks again.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

from google.protobuf.message import Message

from llmpilot_contracts.errors import NotFoundError, UnavailableError
from llmpilot_servicekit.jobs.job_wire import J, JobWire
from llmpilot_servicekit.nats_connection import NatsConnection

_POLL_SECONDS = 0.02
_LONGEST_END_SECONDS = 5.0
_READ_AT_ONCE = 32
_PAGE_BYTES = 1024 * 1024
"""Of a page, before what is read at once is added: gRPC clients take 4 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob(Generic[J]):
    """A job as it was read."""

    job: J
    sequence: int
    """Of its snapshot in the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage(Generic[J]):
    """Some jobs, by id."""

    jobs: Sequence[J]
    next_after: str
    """After which id the next page begins; empty: there is none."""


class JobStates(Generic[J]):
    """The snapshots. Every method but `follow` raises UnavailableError while NATS is away."""

    def __init__(self, nats: NatsConnection, kind: type[J], wire: JobWire[J]) -> None:
        self._nats = nats
        self._kind = kind
        self._wire = wire

    async def find(self, job_id: str) -> StoredJob[J] | None:
        """Return a job; None where there is none."""
        found = await self._nats.last(self._wire.state.of(job_id))
        return StoredJob(job=self._wire.read_snapshot(found[0]), sequence=found[1]) if found else None

    async def get(self, job_id: str) -> StoredJob[J]:
        """Return a job; raises NotFoundError."""
        found = await self.find(job_id)
        if found is None:
            raise NotFoundError(self._kind.kind, f"{self._kind.collection}{job_id}", hint=self._wire.find_hint)
        return found

    async def wait_ended(self, job_id: str) -> None:
        """Wait until a job has ended whose log says so; not long, as its owner may die before it can tell."""
        with suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(_LONGEST_END_SECONDS):
                while not (await self.get(job_id)).job.state.is_end:  # noqa: ASYNC110 NATS tells nobody
                    await asyncio.sleep(_POLL_SECONDS)

    async def put(self, job: J, *, after_sequence: int) -> StoredJob[J]:
        """Write a snapshot in the place of the one that was read (0: none).

        StaleSequenceError: another was written meanwhile. After UnavailableError it may be written or not.
        """
        sequence = await self._nats.publish(
            self._wire.state.of(job.id),
            event_id=uuid.uuid4().hex,
            payload=self._wire.write_snapshot(job),
            after_sequence=after_sequence,
        )
        return StoredJob(job=job, sequence=sequence)

    async def page(self, *, after: str, count: int) -> JobPage[J]:
        """Return the next jobs after this id, in short: at most `count`, fewer where they are large."""
        ids = [each for each in await self._nats.resource_ids(self._wire.state) if each > after]
        jobs: list[J] = []
        taken_count = size_bytes = 0
        while taken_count < min(count, len(ids)) and size_bytes < _PAGE_BYTES:
            some = ids[taken_count : min(taken_count + _READ_AT_ONCE, count)]
            taken_count += len(some)
            for found in await asyncio.gather(*map(self.find, some)):
                if found is not None:
                    jobs.append(self._wire.in_list(found.job))
                    size_bytes += self._wire.write_snapshot(jobs[-1]).ByteSize()
        return JobPage(jobs=jobs, next_after=ids[taken_count - 1] if len(ids) > taken_count else "")

    async def follow(self, see: Callable[[StoredJob[J]], None]) -> None:
        """Hand over every snapshot there is, and those that come. Ends only by cancellation."""

        async def take(message: Message, sequence: int) -> None:
            see(StoredJob(job=self._wire.read_snapshot(message), sequence=sequence))

        await self._nats.follow(self._wire.state, take)
