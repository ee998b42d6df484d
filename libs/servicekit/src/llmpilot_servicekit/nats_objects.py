"""Files in a JetStream object store: written once, shared by every replica, gone when deleted.

Invariant: a file is there with all its bytes or not at all: the message that names it is written last, deleted first.
The layout is that of the NATS object store (ADR-20), so that `nats object` reads it. nats-py's own client is not used:
it replaces files of the same name, and waits without end for a part that is not there.
"""

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from nats.js import JetStreamContext, api
from nats.js.errors import BadRequestError, NotFoundError

from llmpilot_contracts.errors import PilotError, UnavailableError
from llmpilot_contracts.subjects import Bucket
from llmpilot_servicekit.nats_connection import NATS_ERRORS, NatsConnection
from llmpilot_servicekit.nats_follower import raise_if_cancelled

CHUNK_BYTES = 128 * 1024
_AT_ONCE_COUNT = 32
_MOST_SUBJECTS = 100_000
"""JetStream lists no more of them at once."""
_DIGEST_PREFIX = "SHA-256="
_STREAM_EXISTS = 10058
_WRONG_LAST_SEQUENCE = 10071
"""JetStream's error codes: a stream of the same name and another configuration; the subject has a message already."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What is known of a file without reading it."""

    name: str
    id: str
    """Of these bytes: a file of the same name that is written after a deletion has another."""
    size_bytes: int
    digest: str
    labels: Mapping[str, str]
    """What the writer said of it."""
    sequence: int
    """Of the message that names it."""


class NatsObjects:
    """The files of one bucket. Every method raises UnavailableError while NATS is away."""

    def __init__(self, connection: NatsConnection, bucket: Bucket) -> None:
        self._connection = connection
        self._bucket = bucket
        self._stream = f"OBJ_{bucket.name}"

    async def create(self, name: str, content: bytes, *, labels: Mapping[str, str] | None = None) -> bool:
        """Write a file; False, and nothing changes, where there is one of that name. Of two at once one wins.

        After UnavailableError the file may be there or not: `find` tells.
        """
        object_id = uuid.uuid4().hex
        chunks = self._chunks_subject(object_id)
        digest = await asyncio.to_thread(_digest, content)
        with self._asking(f"to store {name}") as jetstream:
            await self._ensure_stream(jetstream)
            chunk_count = 0
            try:
                for start in range(0, len(content), CHUNK_BYTES):
                    await _to_its_end(self._publish(jetstream, chunks, content[start : start + CHUNK_BYTES]))
                    chunk_count += 1
                    raise_if_cancelled()
            except BaseException:
                await self._forget_chunks(jetstream, object_id)
                raise
            info = {
                "name": name,
                "bucket": self._bucket.name,
                "nuid": object_id,
                "size": len(content),
                "chunks": chunk_count,
                "digest": digest,
                "mtime": datetime.now(UTC).isoformat(),
                "options": {"max_chunk_size": CHUNK_BYTES},
                "metadata": dict(labels or {}),
            }
            created = await _to_its_end(self._name_or_forget(jetstream, info))
        raise_if_cancelled()
        return created

    async def find(self, name: str) -> StoredObject | None:
        """Return what is known of a file; None where there is none."""
        with self._asking(f"for {name}") as jetstream:
            found = await self._find(jetstream, name)
        raise_if_cancelled()
        return found

    async def find_all(self, names: Iterable[str]) -> Sequence[StoredObject]:
        """Return what is known of these files, in this order, without those that are not there."""
        slots = asyncio.Semaphore(_AT_ONCE_COUNT)

        async def find(jetstream: JetStreamContext, name: str) -> StoredObject | None:
            async with slots:
                return await self._find(jetstream, name)

        with self._asking("for the list of files") as jetstream:
            found = await asyncio.gather(*(find(jetstream, name) for name in names))
        raise_if_cancelled()
        return [each for each in found if each is not None]

    async def names(self) -> Sequence[str]:
        """Return the names of all files, sorted."""
        return sorted(base64.urlsafe_b64decode(name).decode() for name in await self._below(self._name_subject("")))

    async def read(self, stored: StoredObject) -> bytes | None:
        """Return the bytes of a file; None where it has been deleted since it was found."""
        subject = self._chunks_subject(stored.id)
        parts: list[bytes] = []
        missing_bytes, sequence = stored.size_bytes, 0
        with self._asking(f"for {stored.name}") as jetstream:
            while missing_bytes > 0:
                try:
                    message = await jetstream.get_msg(self._stream, seq=sequence + 1, subject=subject, next=True)
                except NotFoundError:
                    return None
                parts.append(message.data or b"")
                missing_bytes -= len(parts[-1])
                sequence = int(message.seq or 0)
                raise_if_cancelled()
        content, digest = await asyncio.to_thread(_joined, parts)
        if digest != stored.digest:
            raise PilotError(f"{stored.name} in {self._bucket.name} is damaged: delete it and make it again")
        return content

    async def delete(self, stored: StoredObject) -> None:
        """Delete this file; one of the same name that was written after it stays."""
        with self._asking(f"to delete {stored.name}") as jetstream:
            subject = self._name_subject(stored.name)
            await jetstream.purge_stream(self._stream, seq=stored.sequence + 1, subject=subject)
            await jetstream.purge_stream(self._stream, subject=self._chunks_subject(stored.id))
        raise_if_cancelled()

    async def remove_unnamed(self, *, idle: timedelta) -> int:
        """Remove what writers left that ended before they named their file, and wrote nothing for so long.

        Returns of how many files.
        """
        unnamed = await self._below(self._chunks_subject(""))
        names = await self.names()
        if len(names) >= _MOST_SUBJECTS:
            return 0  # there may be more, whose parts these are
        unnamed -= {each.id for each in await self.find_all(names)}
        removed_count = 0
        with self._asking("for parts of no file") as jetstream:
            for object_id in unnamed:
                with suppress(NotFoundError):  # another replica was faster
                    last = await jetstream.get_last_msg(self._stream, self._chunks_subject(object_id))
                    if last.time is not None and datetime.now(UTC) - last.time >= idle:
                        await jetstream.purge_stream(self._stream, subject=self._chunks_subject(object_id))
                        removed_count += 1
                raise_if_cancelled()
        return removed_count

    async def _below(self, prefix: str) -> set[str]:
        """Return how the subjects go on that begin so and have a message."""
        with self._asking("for the list of files") as jetstream:
            try:
                info = await jetstream.stream_info(self._stream, subjects_filter=f"{prefix}>")
            except NotFoundError:
                return set()
        raise_if_cancelled()
        return {subject.removeprefix(prefix) for subject in info.state.subjects or ()}

    async def _find(self, jetstream: JetStreamContext, name: str) -> StoredObject | None:
        try:
            message = await jetstream.get_last_msg(self._stream, self._name_subject(name))
        except NotFoundError:
            return None
        info = json.loads(message.data or b"{}")
        if info.get("deleted"):  # by another client of the bucket
            return None
        return StoredObject(
            name=name,
            id=info["nuid"],
            size_bytes=info.get("size", 0),
            digest=info.get("digest", ""),
            labels=info.get("metadata") or {},
            sequence=int(message.seq or 0),
        )

    async def _name_or_forget(self, jetstream: JetStreamContext, info: Mapping[str, Any]) -> bool:
        """Write the message that names a file; where there is one, remove the chunks instead."""
        expected = {api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: "0"}
        try:
            await self._publish(jetstream, self._name_subject(info["name"]), json.dumps(info).encode(), expected)
        except BadRequestError as error:
            if error.err_code != _WRONG_LAST_SEQUENCE:
                raise
            await self._forget_chunks(jetstream, info["nuid"])
            return False
        return True

    async def _publish(
        self, jetstream: JetStreamContext, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> None:
        await jetstream.publish(subject, payload, stream=self._stream, headers=headers)

    async def _ensure_stream(self, jetstream: JetStreamContext) -> None:
        config = api.StreamConfig(
            name=self._stream,
            description=self._bucket.description,
            subjects=[self._chunks_subject(">"), f"{self._name_subject('')}>"],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            allow_direct=True,
        )
        try:
            await jetstream.add_stream(config)
        except BadRequestError as error:
            if error.err_code != _STREAM_EXISTS:  # as an operator configured it, with replicas for example
                raise

    async def _forget_chunks(self, jetstream: JetStreamContext, object_id: str) -> None:
        with suppress(*NATS_ERRORS):
            await jetstream.purge_stream(self._stream, subject=self._chunks_subject(object_id))

    def _chunks_subject(self, object_id: str) -> str:
        return f"$O.{self._bucket.name}.C.{object_id}"

    def _name_subject(self, name: str) -> str:
        return f"$O.{self._bucket.name}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    @contextmanager
    def _asking(self, purpose: str) -> Iterator[JetStreamContext]:
        try:
            yield self._connection.client.jetstream()
        except NATS_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(
                f"NATS at {self._connection.url} was asked {purpose} and did not answer ({reason}): try again"
            ) from error


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, also when cancelled meanwhile: JetStream may purge before it stores what was published earlier."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        running.exception()  # known: the cancellation matters more
        raise


def _joined(parts: Sequence[bytes]) -> tuple[bytes, str]:
    content = b"".join(parts)
    return content, _digest(content)


def _digest(content: bytes) -> str:
    return _DIGEST_PREFIX + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
