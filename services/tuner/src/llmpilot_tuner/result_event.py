"""Tells NATS that `llm-pilot tune` has found a weight, with the same event as the service's."""

import asyncio
import secrets
from datetime import UTC, datetime, timedelta

from llmpilot_contracts.errors import UnavailableError
from llmpilot_contracts.job import State
from llmpilot_contracts.subjects import TUNING_COMPLETED, TUNING_RESULTS
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.domain.tuning import Tuning
from llmpilot_tuner.wire_events import write_completed

_CONNECT_SECONDS = 3.0


async def publish_completed(result: TuningResult, spec: TuningSpec, report_json: str, url: str) -> str:
    """Publish the event, and return the id of its tuning; raises UnavailableError where NATS is away."""
    now = datetime.now(UTC)
    tuning_id = f"tn-{secrets.token_hex(8)}"
    tuning = Tuning(
        id=tuning_id,
        request_id=tuning_id,
        spec=spec,
        create_time=now - timedelta(seconds=result.elapsed_seconds),
        end_time=now,
        state=State.SUCCEEDED,
        max_batch_weight=result.max_batch_weight,
        report_json=report_json,
        measured=result.facts.kind.is_measured,
        probe_count=len(result.probes),
    )
    connection = NatsConnection(url, streams=(TUNING_RESULTS,))
    failure: UnavailableError | None = None
    async with asyncio.TaskGroup() as group:
        running = group.create_task(connection.run())
        try:
            await connection.wait_connected(_CONNECT_SECONDS)
            await connection.publish(TUNING_COMPLETED, event_id=tuning_id, payload=write_completed(tuning, tuning_id))
        except UnavailableError as error:
            failure = error
        finally:
            running.cancel()
    if failure is not None:
        raise failure
    return tuning_id
