"""What the users of a stage share: the requests that wait, the moments, the requests under way, the records.

Invariant: a request that was taken is recorded once, and when the stage has ended nothing of it is under way.
"""

import heapq
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import gevent
from gevent.pool import Group
from gevent.queue import Queue

from llmpilot_loadtester.engine.client import Generation, LlmClient
from llmpilot_loadtester.engine.health import HealthWatch
from llmpilot_loadtester.engine.recorder import EndedRequest, Recorder
from llmpilot_loadtester.worker_messages import Pulse, QueuedRequest, StageOrder

NANOS = 1_000_000_000
_NOBODY = -1


class RequestQueue:
    """Requests to send, in order."""

    def __init__(self) -> None:
        self.is_complete = False
        """Whether no more will come."""
        self._waiting: Queue[QueuedRequest] = Queue()

    def __len__(self) -> int:
        return int(self._waiting.qsize())

    def extend(self, requests: Iterable[QueuedRequest]) -> None:
        """Append requests."""
        for request in requests:
            self._waiting.put(request)

    def take(self) -> tuple[QueuedRequest, bool]:
        """Return the next request and whether there was none at first. Blocks the greenlet until there is one."""
        was_empty = not len(self)
        return self._waiting.get(), was_empty


class StageUser(Protocol):
    """A Locust user of a stage."""

    @property
    def greenlet(self) -> Any:
        """What it runs in."""

    def leave(self) -> None:
        """Stop after the request under way; at once without one."""


class UserIndices:
    """The users of a stage that have not been asked to leave, by number: a new one gets the lowest that is free."""

    def __init__(self, first: int) -> None:
        self.by_index: dict[int, StageUser] = {}
        self._free: list[int] = []
        self._next = first

    def take(self, user: StageUser) -> int:
        """Return the number of a new user."""
        if self._free:
            index = heapq.heappop(self._free)
        else:
            index = self._next
            self._next += 1
        self.by_index[index] = user
        return index

    def give_back(self, index: int) -> None:
        """Make a number free; nothing happens the second time."""
        if self.by_index.pop(index, None) is not None:
            heapq.heappush(self._free, index)

    def highest(self, count: int) -> list[StageUser]:
        """Return the users with the highest numbers."""
        return [self.by_index[index] for index in sorted(self.by_index, reverse=True)[:count]]


class RunningStage:
    """A stage, from its order to its end."""

    def __init__(
        self,
        order: StageOrder,
        queue: RequestQueue,
        recorder: Recorder,
        health: HealthWatch,
        new_client: Callable[[], LlmClient],
    ) -> None:
        self.order = order
        self.queue = queue
        self.users = UserIndices(order.first_user_index)
        self.users_count = 0
        """Users that have begun and not left."""
        self.flying = Group()
        """Greenlets of requests that a schedule sent."""
        self._recorder, self._health = recorder, health
        self._new_client = new_client
        self._clients: set[LlmClient] = set()
        self._in_flight_count = 0
        self._sent_count = 0
        self._turn_nanos = order.start_nanos

    def open_client(self) -> LlmClient:
        """Return a client for one user; closed by `close_client`, or when the stage ends."""
        client = self._new_client()
        self._clients.add(client)
        return client

    def close_client(self, client: LlmClient) -> None:
        """Give a client's connection back."""
        self._clients.discard(client)
        client.close()

    def wait_for_turn(self) -> None:
        """Sleep so that users begin one after another at the spawn rate, not in lockstep."""
        turn_nanos = max(self._turn_nanos, time.time_ns())
        self._turn_nanos = turn_nanos + int(NANOS / self.order.spawn_per_second)
        gevent.sleep(max(turn_nanos - time.time_ns(), 0) / NANOS)

    def take_request(self) -> QueuedRequest:
        """Return the next request; waits for it. A user that had to wait was starved, unless there are no more."""
        request, was_empty = self.queue.take()
        if was_empty and (request.scheduled_nanos < 0 or request.scheduled_nanos < time.time_ns()):
            self._health.starved_count += 1
        return request

    def send(
        self, client: LlmClient, request: QueuedRequest, *, scheduled_nanos: int, user_index: int = _NOBODY
    ) -> Generation:
        """Send a request and return what came of it, recorded. Blocks the greenlet until it has ended."""

        def record(generation: Generation) -> None:
            self._in_flight_count -= 1
            self._recorder.add(
                EndedRequest(
                    request_index=request.index,
                    user_index=user_index,
                    scheduled_nanos=scheduled_nanos,
                    input_tokens=request.input_tokens,
                    generation=generation,
                )
            )

        self._in_flight_count += 1
        self._sent_count += 1
        return client.send(request.body, f"{self.order.request_id_prefix}{request.index}", record)

    def pulse(self) -> Pulse:
        """Return how it goes."""
        begin, end = self.order.measure_from_nanos, self.order.measure_until_nanos
        return Pulse(
            users_count=self.users_count,
            in_flight_count=self._in_flight_count,
            measured_in_flight_count=sum(
                client.is_busy and begin <= client.send_nanos < end for client in self._clients
            ),
            sent_count=self._sent_count,
            queued_count=len(self.queue),
            health=self._health.snapshot(),
        )

    def close(self) -> None:
        """Give every connection back; nobody may send any more."""
        for client in list(self._clients):
            self.close_client(client)
