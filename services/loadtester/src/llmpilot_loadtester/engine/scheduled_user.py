"""The one user of an open loop: sends every request at its time, whatever became of those before.

Invariant: it never waits for a reply; a request that cannot be sent in time is sent late, and its record says by how
much.
"""

import time

from locust import User, task
from locust.env import Environment

from llmpilot_loadtester.engine.client import LlmClient
from llmpilot_loadtester.engine.pacer import Pacer
from llmpilot_loadtester.engine.stage import RunningStage
from llmpilot_loadtester.worker_messages import QueuedRequest


class ScheduledUser(User):
    """Sends requests of the stage's queue at their times, over as many connections as that takes."""

    abstract = True
    stage: RunningStage

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._index = self.stage.users.take(self)
        self._pacer = Pacer()
        self._idle: list[LlmClient] = []

    @task
    def dispatch(self) -> None:
        """Send the next request when it is its time."""
        request = self.stage.take_request()
        due_nanos = request.scheduled_nanos if request.scheduled_nanos >= 0 else time.time_ns()
        self._pacer.sleep_until(due_nanos)
        self.stage.flying.spawn(self._send, request, due_nanos)

    def leave(self) -> None:
        """Stop at once; what was sent goes on."""
        self.greenlet.kill(block=False)

    def on_stop(self) -> None:
        """Give everything back but connections in use."""
        self.stage.users.give_back(self._index)
        self._pacer.close()

    def _send(self, request: QueuedRequest, due_nanos: int) -> None:
        # The connection used last is the one that its server is least likely to have closed.
        client = self._idle.pop() if self._idle else self.stage.open_client()
        self.stage.send(client, request, scheduled_nanos=due_nanos)
        self._idle.append(client)


def scheduled_user_of(stage: RunningStage) -> type[ScheduledUser]:
    """Return the class of the user of one stage."""

    class StageUser(ScheduledUser):
        abstract = False

    StageUser.stage = stage
    return StageUser
