"""Locust's runner for one stage: it spawns users and follows the load shape, without Locust's web page and tables.

Invariant: users that are too many finish the request under way first, and nobody waits for them.
"""

import logging
from collections.abc import Callable

import gevent
from gevent.pool import Group
from locust import LoadTestShape
from locust.env import Environment
from locust.runners import STATE_INIT, STATE_RUNNING, STATE_SPAWNING, LocalRunner

from llmpilot_loadtester.domain.spec import Load
from llmpilot_loadtester.engine.load_shape import users_at
from llmpilot_loadtester.engine.queued_user import queued_user_of
from llmpilot_loadtester.engine.scheduled_user import scheduled_user_of
from llmpilot_loadtester.engine.stage import RunningStage

_TICK_SECONDS = 0.1
_LAST_SECONDS = 2.0

logging.getLogger("locust.runners").setLevel(logging.ERROR)  # it warns of spawn rates that `wait_for_turn` spreads


class StepShape(LoadTestShape):
    """Users by time, in steps or in straight lines between them."""

    abstract = False

    def __init__(self, load: Load) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._load = load

    def tick(self) -> tuple[int, float]:
        """Return the number of users for now and a rate at which Locust spawns them all at once."""
        users_count = users_at(self._load, self.get_run_time())  # type: ignore[no-untyped-call]
        return users_count, float(max(self._load.most_users or 0, 1))


class StageRunner(LocalRunner):
    """Runs the users of a stage."""

    def __init__(self, environment: Environment, stage: RunningStage) -> None:
        super().__init__(environment)
        self._stage = stage
        self._leaving = Group()

    def stop_users(self, user_classes_stop_count: dict[str, int]) -> None:
        """Ask the users with the highest numbers to leave; they are none of Locust's any more."""
        for user in self._stage.users.highest(sum(user_classes_stop_count.values())):
            self._leaving.add(user.greenlet)
            self.user_greenlets.discard(user.greenlet)
            user.leave()

    def shape_worker(self) -> None:
        """Follow the shape ten times a second; Locust's own does so once."""
        shape = self.environment.shape_class
        while isinstance(shape, StepShape) and self.state in {STATE_INIT, STATE_SPAWNING, STATE_RUNNING}:
            users_count, spawn_rate = shape.tick()
            if (users_count, spawn_rate) != self.shape_last_tick:
                self.start(user_count=users_count, spawn_rate=spawn_rate)
                self.shape_last_tick = users_count, spawn_rate
            gevent.sleep(_TICK_SECONDS)

    def begin(self) -> None:
        """Start the load."""
        if self.environment.shape_class is not None:
            self.start_shape()
        else:
            self.start(1, spawn_rate=1)

    def end(self) -> None:
        """Stop all users; what is under way is cut off, which records it."""
        self.quit()
        self.user_greenlets.kill(timeout=_LAST_SECONDS)
        self._leaving.kill(timeout=_LAST_SECONDS)
        self._stage.flying.kill(timeout=_LAST_SECONDS)


def runner_of(stage: RunningStage, on_error: Callable[[str], None]) -> StageRunner:
    """Return a runner for a stage. on_error: takes what a user died of, which is a mistake in this program."""
    load = stage.order.load
    user_class = queued_user_of(stage) if load.is_closed else scheduled_user_of(stage)
    shape = StepShape(load) if load.is_closed else None
    environment = Environment(user_classes=[user_class], shape_class=shape, catch_exceptions=False)
    environment.events.user_error.add_listener(lambda exception, **_: on_error(repr(exception)))  # type: ignore[no-untyped-call]
    runner = StageRunner(environment, stage)
    environment.runner = runner
    return runner
