"""The measurements of a load test, published for the recommender: one per valid stage of constant users.

Invariant: a measurement's id follows from its load test and stage, so that publishing it again changes nothing.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from google.protobuf.message import Message

from llmpilot_contracts.subjects import MEASUREMENT_RECORDED
from llmpilot_loadtester.domain.events import Noted
from llmpilot_loadtester.domain.load_test import LogEvent, MeasurementPublished
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.patience import patiently

_NAMESPACE = uuid.UUID("0d0b7c52-5a0f-4f5c-9a59-2f6d1d9f0a71")
WriteMeasurement = Callable[[StageResult, str], Message]
"""Makes the event of a result under an event id."""


def event_id_of(load_test_id: str, stage_index: int) -> str:
    """Return the event id of a stage's measurement."""
    return str(uuid.uuid5(_NAMESPACE, f"{load_test_id}/{stage_index}"))


def is_measurement(result: StageResult) -> bool:
    """Whether a stage had one number of users all the time: what the dataset has rows of."""
    load = result.stage.load
    return load.is_closed and len({step.users_count for step in load.user_steps}) == 1


class Measuring:
    """Publishes in the background what the stages of one load test measured; `run` does it."""

    def __init__(
        self,
        nats: NatsConnection,
        load_test_id: str,
        write: WriteMeasurement,
        append: Callable[[LogEvent], Awaitable[None]],
    ) -> None:
        self._nats = nats
        self._id = load_test_id
        self._write = write
        self._append = append
        self._waiting: asyncio.Queue[StageResult] = asyncio.Queue()

    async def take(self, result: StageResult) -> None:
        """Take what a stage measured; says in the log why it is not published, if it is not."""
        if not is_measurement(result):
            await self._note(result, "its number of users was not constant")
        elif not result.verdict.is_valid:
            await self._note(result, f"its numbers do not count ({'; '.join(result.verdict.reasons)})")
        else:
            self._waiting.put_nowait(result)

    async def run(self) -> None:
        """Publish what was taken, for ever."""
        while True:
            result = await self._waiting.get()
            try:
                event_id = event_id_of(self._id, result.stage_index)
                publish = partial(self._nats.publish, MEASUREMENT_RECORDED, event_id=event_id)
                await patiently(partial(publish, payload=self._write(result, event_id)))
                await self._append(MeasurementPublished(stage_index=result.stage_index, event_id=event_id))
            finally:
                self._waiting.task_done()

    async def flush(self) -> None:
        """Wait until everything that was taken is published."""
        await self._waiting.join()

    async def _note(self, result: StageResult, why: str) -> None:
        text = f"stage {result.stage_index + 1}, {result.stage.load.label}: no measurement was published, as {why}"
        await self._append(Noted(text=text))
