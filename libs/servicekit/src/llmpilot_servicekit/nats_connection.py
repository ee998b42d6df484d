"""The connection to NATS JetStream: publish facts, follow streams, outlive every outage of the server.

Invariant: a follower hands over each message of its subject in stream order, at least once, whatever the server does.
nats-py's own reconnection is off: each connection is a new client, so there is one state to reason about.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import nats.errors
from google.protobuf.message import Message
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import BadRequestError, NotFoundError
from prometheus_client import CollectorRegistry, Counter, Gauge

from llmpilot_contracts.errors import (
    InvalidInputError,
    PilotError,
    PreconditionError,
    UnavailableError,
    Violation,
)
from llmpilot_contracts.subjects import Stream, Subject
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_follower import Follower, raise_if_cancelled

log = get_logger(__name__)

NATS_ERRORS = (nats.errors.Error, OSError, TimeoutError)
"""What nats-py raises when the server is away."""

_CONNECT_SECONDS = 2
_OPEN_SECONDS = 15
_FLUSH_SECONDS = 2
_PING_SECONDS = 10
_LOOK_SECONDS = 0.5
_FIRST_DELAY_SECONDS = 0.05
_LAST_DELAY_SECONDS = 2.0
_STREAM_EXISTS = 10058
_WRONG_LAST_SEQUENCE = 10071
"""JetStream's error codes: a stream of the same name and another configuration; the subject has a newer message."""


class StaleSequenceError(PreconditionError):
    """The last message of a subject is another one than the publisher expected."""


class NatsConnection:
    """A connection that `run` keeps up; everything else works while it does."""

    def __init__(self, url: str, *, streams: Sequence[Stream], registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self._url = url
        self._streams = tuple(streams)
        self._client: Client | None = None
        self._connected = asyncio.Event()
        self._followers: set[Follower] = set()
        self._gauge = Gauge("llmpilot_nats_connected", "1 while connected to NATS.", registry=registry)
        self._failed = Counter(
            "llmpilot_nats_messages_failed",
            "Messages skipped because they do not parse or their handler failed.",
            ["subject"],
            registry=registry,
        )

    @property
    def connected(self) -> bool:
        """Whether the server is connected and its streams exist."""
        return self._connected.is_set()

    @property
    def client(self) -> Client:
        """The client of this connection, for one exchange. UnavailableError while NATS is away."""
        if self._client is None or not self.connected:
            raise UnavailableError(f"NATS at {self._url} is not connected: try again")
        return self._client

    @property
    def url(self) -> str:
        """Where NATS is, for messages."""
        return self._url

    async def wait_connected(self, timeout_seconds: float = 5) -> None:
        """Return once `connected`; UnavailableError after `timeout_seconds`."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._connected.wait()
        except TimeoutError as error:
            raise UnavailableError(
                f"NATS at {self._url} does not answer after {timeout_seconds:g} s: check the URL and that it runs"
            ) from error

    async def run(self) -> None:
        """Connect, and connect again after every outage, until cancelled; then flush and close."""
        delays_seconds = _delays_seconds()
        outage_logged = False
        while True:
            raise_if_cancelled()
            try:
                client, lost = await self._open()
            except NATS_ERRORS as error:
                if not outage_logged:
                    log.warning("NATS is away, trying on", url=self._url, error=str(error) or type(error).__name__)
                outage_logged = True
            else:
                delays_seconds = _delays_seconds()
                outage_logged = True  # by the line below, once the connection is lost
                try:
                    self._set_connected(client)
                    await _until_lost(client, lost)
                finally:
                    self._set_disconnected()
                    await _close(client)
                log.warning("connection to NATS lost", url=self._url)
            await asyncio.sleep(next(delays_seconds))

    async def publish(
        self,
        subject: Subject,
        *,
        event_id: str,
        payload: Message,
        timeout_seconds: float = 5,
        after_sequence: int | None = None,
    ) -> int:
        """Publish once per `event_id` and give the message's sequence in its stream.

        UnavailableError: no acknowledgement came; publishing again under the same id is safe. With `after_sequence`
        only if the last message of the subject has that sequence (0: there is none), else StaleSequenceError: also
        where the last message is this one, published before without an acknowledgement.
        """
        if not isinstance(payload, subject.payload):
            expected, actual = subject.payload.DESCRIPTOR.full_name, type(payload).__name__
            raise PilotError(f"{subject.name} carries {expected}, not {actual}: a bug of the caller")
        if self._client is None or not self.connected:
            raise UnavailableError(f"NATS at {self._url} is not connected, {subject.name} was not published: try again")
        headers = {api.Header.MSG_ID.value: event_id}
        if after_sequence is not None:
            headers[api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(after_sequence)
        try:
            ack = await self._client.jetstream().publish(
                subject.name,
                payload.SerializeToString(),
                timeout=timeout_seconds,
                stream=subject.stream.name,
                headers=headers,
            )
        except nats.errors.MaxPayloadError as error:
            size = f"{payload.ByteSize()} bytes, NATS takes at most {self._client.max_payload}"
            raise InvalidInputError([Violation(subject.name, f"the message has {size}")]) from error
        except NATS_ERRORS as error:
            if isinstance(error, BadRequestError) and error.err_code == _WRONG_LAST_SEQUENCE:
                raise StaleSequenceError(f"{subject.name} was written by another meanwhile: read it again") from error
            reason = str(error) or type(error).__name__
            raise UnavailableError(
                f"NATS at {self._url} did not acknowledge {subject.name} ({reason}): try again"
            ) from error
        raise_if_cancelled()
        return int(ack.seq)

    async def last(self, subject: Subject) -> tuple[Message, int] | None:
        """Give the last message of a subject and its sequence; None: there is none. UnavailableError."""
        with self._asking(subject) as jetstream:
            try:
                message = await jetstream.get_last_msg(subject.stream.name, subject.name)
            except NotFoundError:
                return None
        raise_if_cancelled()
        return subject.payload.FromString(message.data or b""), int(message.seq or 0)

    async def resource_ids(self, subject: Subject) -> list[str]:
        """Give the ids for which a subject with "*" has messages, sorted. UnavailableError."""
        start, _, end = subject.name.partition("*")
        with self._asking(subject) as jetstream:
            info = await jetstream.stream_info(subject.stream.name, subjects_filter=subject.name)
        raise_if_cancelled()
        return sorted(name.removeprefix(start).removesuffix(end) for name in info.state.subjects or ())

    async def follow(self, subject: Subject, handle: Callable[[Message, int], Awaitable[None]]) -> None:
        """Hand every message of `subject` and its stream sequence to `handle`: all since the first, then live.

        Messages that do not parse or whose handler raises are logged, counted and skipped. Ends only by cancellation.
        """
        follower = Follower(subject, handle, count_failed=self._failed.labels(subject.name).inc)
        self._followers.add(follower)
        delays_seconds = _delays_seconds()
        outage_logged = False
        try:
            while True:
                raise_if_cancelled()
                await self._connected.wait()
                client, position = self._client, follower.sequence
                assert client is not None, "connected"  # noqa: S101 set together
                try:
                    await follower.run(client, await ensure_stream(client, subject.stream))
                except NATS_ERRORS as error:
                    if self.connected and not outage_logged:
                        outage_logged = True
                        log.warning("following interrupted, trying on", subject=subject.name, error=str(error))
                if follower.sequence != position:
                    delays_seconds, outage_logged = _delays_seconds(), False
                await asyncio.sleep(next(delays_seconds))
        finally:
            self._followers.discard(follower)

    @contextmanager
    def _asking(self, subject: Subject) -> Iterator[JetStreamContext]:
        try:
            yield self.client.jetstream()
        except NATS_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(
                f"NATS at {self._url} was asked for {subject.name} and did not answer ({reason}): try again"
            ) from error

    async def _open(self) -> tuple[Client, asyncio.Event]:
        lost = asyncio.Event()

        async def on_closed() -> None:
            self._set_disconnected()
            lost.set()

        client = Client()
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await client.connect(
                    self._url,
                    error_cb=_ignore,
                    closed_cb=on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=_CONNECT_SECONDS,
                    ping_interval=_PING_SECONDS,
                )
                for stream in self._streams:
                    await ensure_stream(client, stream)
                raise_if_cancelled()
        except BaseException:
            await client.close()
            raise
        return client, lost

    def _set_connected(self, client: Client) -> None:
        if client.is_closed:
            return
        self._client = client
        self._connected.set()
        self._gauge.set(1)
        log.info("connected to NATS", url=self._url)

    def _set_disconnected(self) -> None:
        self._client = None
        self._connected.clear()
        self._gauge.set(0)
        for follower in self._followers:
            follower.disconnect()


async def ensure_stream(client: Client, stream: Stream) -> api.StreamInfo:
    """Create the stream or bring it up to the table; what the table does not name, as its replicas, stays."""
    jetstream = client.jetstream()
    wanted = {
        "subjects": list(stream.subjects),
        "description": stream.description,
        "max_age": stream.max_age.total_seconds() if stream.max_age else 0,
        "duplicate_window": stream.duplicate_window.total_seconds(),
        "max_msgs_per_subject": 1 if stream.latest_only else -1,
    }
    try:
        return await jetstream.add_stream(api.StreamConfig(name=stream.name, storage=api.StorageType.FILE), **wanted)
    except BadRequestError as error:
        if error.err_code != _STREAM_EXISTS:
            raise
    info = await jetstream.stream_info(stream.name)
    if all(getattr(info.config, key) == value for key, value in wanted.items()):
        return info
    return await jetstream.update_stream(info.config, **wanted)


async def _close(client: Client) -> None:
    try:
        # Not nats-py's drain: against a frozen server it leaves tasks behind. Publishers wait for their
        # acknowledgements and followers replay, so what was written reaching the server is all there is to drain.
        await client.flush(timeout=_FLUSH_SECONDS)
    except NATS_ERRORS:
        pass  # nobody there to flush to
    finally:
        with suppress(*NATS_ERRORS):  # what was pending could not be written
            await client.close()


async def _until_lost(client: Client, lost: asyncio.Event) -> None:
    """Wait until the client has closed; it does not call back where closing failed to write what was pending."""
    while not client.is_closed:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await lost.wait()
        except TimeoutError:
            pass  # look again


async def _ignore(_: Exception) -> None:
    """Errors surface where they are raised; nats-py would log each a second time."""


def _delays_seconds() -> Iterator[float]:
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        yield delay_seconds
        delay_seconds = min(2 * delay_seconds, _LAST_DELAY_SECONDS)
