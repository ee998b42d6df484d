import asyncio
import platform
import time
from collections.abc import Callable

import pytest

from llmpilot_simulator.clock import Alarm, LoopAlarm, SystemClock, TimerFdAlarm, create_alarm, nanos

MILLISECOND = 1_000_000
Kind = Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Alarm]

needs_linux = pytest.mark.skipif(platform.system() != "Linux", reason="timerfd is Linux's")
kinds = pytest.mark.parametrize("kind", [LoopAlarm, pytest.param(TimerFdAlarm, marks=needs_linux)])


def rung_at(kind: Kind, settings: list[int | None]) -> int:
    """Set an alarm to these delays one after the other; returns how long after the start it rang."""

    async def wait() -> int:
        loop = asyncio.get_running_loop()
        rung: asyncio.Future[int] = loop.create_future()

        def ring() -> None:
            alarm.set(None)
            rung.set_result(time.monotonic_ns())  # a second ring would raise

        alarm = kind(loop, ring)
        start = time.monotonic_ns()
        for delay in settings:
            alarm.set(None if delay is None else start + delay)
        try:
            async with asyncio.timeout(10):
                return await rung - start
        finally:
            alarm.close()

    return asyncio.run(wait())


@kinds
def test_an_alarm_is_never_early(kind: Kind) -> None:
    assert rung_at(kind, [5 * MILLISECOND]) >= 5 * MILLISECOND


@kinds
def test_an_alarm_in_the_past_rings_at_once_but_not_from_within_set(kind: Kind) -> None:
    assert rung_at(kind, [-5 * MILLISECOND]) >= 0


@kinds
def test_setting_an_alarm_again_replaces_its_time(kind: Kind) -> None:
    assert rung_at(kind, [None, 3600 * 1000 * MILLISECOND, 2 * MILLISECOND]) < 3600 * 1000 * MILLISECOND
    assert rung_at(kind, [1 * MILLISECOND, 8 * MILLISECOND]) >= 8 * MILLISECOND


@needs_linux
def test_linux_has_an_alarm_finer_than_the_loops() -> None:
    async def kind() -> Alarm:
        return create_alarm(asyncio.get_running_loop(), lambda: None)

    alarm = asyncio.run(kind())

    assert isinstance(alarm, TimerFdAlarm)


def test_seconds_become_whole_nanoseconds() -> None:
    assert nanos(0.05) == 50_000_000
    assert nanos(1e-9) == 1


def test_the_clocks_are_the_systems() -> None:
    before = time.time_ns()
    assert before <= SystemClock.wall_nanos() <= time.time_ns()
    assert SystemClock.monotonic_nanos() <= time.monotonic_ns()
