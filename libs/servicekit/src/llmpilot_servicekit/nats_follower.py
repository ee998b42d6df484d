"""Follows one subject over one connection after another, and remembers how far it came.

An ephemeral pull consumer per connection, started after the last handled sequence; JetStream's own protocol
("Pull consumers", JetStream wire API), because nats-py's fetch hides the difference between idle and broken.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime

import nats.errors
from google.protobuf.message import Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

from llmpilot_contracts.subjects import Subject
from llmpilot_servicekit.logs import get_logger

log = get_logger(__name__)

_BATCH_COUNT = 256
_PULL_SECONDS = 30
_SLACK_SECONDS = 5
_INACTIVE_SECONDS = 300
_PULL_EXPIRED = "408"


def raise_if_cancelled() -> None:
    """Raise the cancellation that nats-py lost.

    It waits with `asyncio.wait_for`, which up to Python 3.11 drops a cancellation that meets the awaited answer.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Follower:
    """One reader of a subject."""

    def __init__(
        self,
        subject: Subject,
        handle: Callable[[Message, int], Awaitable[None]],
        *,
        count_failed: Callable[[], None],
    ) -> None:
        self.sequence = 0
        """Stream sequence of the last message handled or skipped; 0: none yet."""
        self._subject = subject
        self._handle = handle
        self._count_failed = count_failed
        self._stream_created: datetime | None = None
        self._feed: asyncio.Queue[Msg | None] = asyncio.Queue()

    def disconnect(self) -> None:
        """Tell `run` that its connection is gone."""
        self._feed.put_nowait(None)

    async def run(self, client: Client, stream: api.StreamInfo) -> None:
        """Hand messages over until the connection is gone (returns) or the consumer is (raises)."""
        feed = self._feed = asyncio.Queue()
        if client.is_closed:
            return

        async def enqueue(message: Msg) -> None:
            feed.put_nowait(message)

        inbox = client.new_inbox()
        # The batch bounds what is pending; nats-py's limit would drop messages.
        subscription = await client.subscribe(inbox, cb=enqueue, pending_msgs_limit=0, pending_bytes_limit=0)
        try:
            await self._pull(client, inbox, await self._create_consumer(client, stream))
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _create_consumer(self, client: Client, stream: api.StreamInfo) -> str:
        if stream.created != self._stream_created or stream.state.last_seq < self.sequence:
            self.sequence = 0  # another stream than before: nothing of it was handled
        self._stream_created = stream.created
        consumer = await client.jetstream().add_consumer(
            self._subject.stream.name,
            api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self.sequence + 1,
                ack_policy=api.AckPolicy.NONE,
                filter_subject=self._subject.name,
                inactive_threshold=_INACTIVE_SECONDS,
                mem_storage=True,
                num_replicas=1,
            ),
        )
        return consumer.name

    async def _pull(self, client: Client, inbox: str, consumer: str) -> None:
        next_subject = f"{api.DEFAULT_PREFIX}.CONSUMER.MSG.NEXT.{self._subject.stream.name}.{consumer}"
        request = json.dumps({"batch": _BATCH_COUNT, "expires": _PULL_SECONDS * 1_000_000_000}).encode()
        delivered_count = 0
        while True:
            await client.publish(next_subject, request, reply=inbox)
            for _ in range(_BATCH_COUNT):
                raise_if_cancelled()
                async with asyncio.timeout(_PULL_SECONDS + _SLACK_SECONDS):
                    message = await self._feed.get()
                if message is None:
                    return
                if not message.reply:  # no message of the stream but a status
                    headers = message.headers or {}
                    if headers.get(api.Header.STATUS) == _PULL_EXPIRED:
                        break
                    raise nats.errors.Error(f"consumer lost: {headers.get(api.Header.DESCRIPTION)}")
                delivered_count += 1
                position = message.metadata.sequence
                if position.consumer != delivered_count:
                    raise nats.errors.Error(f"message {delivered_count} of the consumer got lost")
                await self._hand_over(message, position.stream)
                self.sequence = position.stream

    async def _hand_over(self, message: Msg, sequence: int) -> None:
        try:
            await self._handle(self._subject.payload.FromString(message.data), sequence)
        except Exception:  # one bad message must not stop the stream
            self._count_failed()
            log.exception("message skipped", subject=self._subject.name, sequence=sequence)
