"""A user of the closed loop: sends the next request of the queue when the reply to its last one is whole.

Invariant: one request at a time over one connection, and none is cut off because the number of users goes down.
"""

import time

import gevent
from locust import User, task
from locust.env import Environment

from llmpilot_contracts.record_schema import OK
from llmpilot_loadtester.engine.client import Generation
from llmpilot_loadtester.engine.stage import RunningStage

_SHORTEST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_LONGEST_OBEYED_SECONDS = 5.0
_FEW_PARTS = 3
_NOT_ASKED = ("timeout", "cancelled")


class QueuedUser(User):
    """Takes requests from the stage's queue."""

    abstract = True
    stage: RunningStage

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.index = self.stage.users.take(self)
        self._client = self.stage.open_client()
        self._is_sending = False
        self._has_begun = False
        self._pause_seconds = 0.0
        self._free_nanos = 0

    def on_start(self) -> None:
        """Wait until it is its turn to begin."""
        self.stage.wait_for_turn()
        self._has_begun = True
        self.stage.users_count += 1
        self._free_nanos = time.time_ns()

    @task
    def send_next(self) -> None:
        """Send the next request; after a failure, wait before another one."""
        request = self.stage.take_request()
        self._is_sending = True
        generation = self.stage.send(self._client, request, scheduled_nanos=self._free_nanos, user_index=self.index)
        self._is_sending = False
        pause_seconds = self._pause_after(generation)
        if pause_seconds:
            gevent.sleep(pause_seconds)
            self._free_nanos = time.time_ns()
        else:
            self._free_nanos = generation.raw.end_nanos

    def leave(self) -> None:
        """Stop after the request under way; at once without one."""
        self.stage.users.give_back(self.index)
        if self._is_sending:
            self.stop()
        else:
            self.greenlet.kill(block=False)

    def on_stop(self) -> None:
        """Give everything back."""
        self.stage.users.give_back(self.index)
        self.stage.close_client(self._client)
        if self._has_begun:
            self.stage.users_count -= 1

    def _pause_after(self, generation: Generation) -> float:
        """Return how long to wait, so that a server that is down or full does not get requests as fast as it refuses.

        Long replies are not looked at: what brought many parts was no refusal, and parsing is for later.
        """
        raw = generation.raw
        is_refusal = bool(raw.failure) or len(raw.parts) <= _FEW_PARTS
        if not is_refusal or generation.status in (OK, *_NOT_ASKED):
            self._pause_seconds = 0.0
            return 0.0
        self._pause_seconds = min(max(2 * self._pause_seconds, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        asked_seconds = generation.reply.retry_after_seconds
        return self._pause_seconds if asked_seconds is None else min(asked_seconds, _LONGEST_OBEYED_SECONDS)


def queued_user_of(stage: RunningStage) -> type[QueuedUser]:
    """Return the class of the users of one stage."""

    class StageUser(QueuedUser):
        abstract = False

    StageUser.stage = stage
    return StageUser
