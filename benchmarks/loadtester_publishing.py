"""What it costs the load tester to publish every token: CPU of this process per token, through the real log and NATS.

    python benchmarks/loadtester_publishing.py

Frames as they come ten times a second from 128 and 512 streams of 100 tokens a second; one message per token through
the same connection beside it.
"""

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from llmpilot_contracts.subjects import STREAMS
from llmpilot_loadtester.domain.events import RecordsCame
from llmpilot_loadtester.domain.record_frames import pack_records
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch
from llmpilot_loadtester.load_test_log import load_test_log
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_server import start_nats_server

TOKENS = 100
ITL_NANOS = 10_000_000
JITTER_NANOS = 50_000
FRAMES = 300


def records(request_count: int, rng: np.random.Generator) -> RecordBatch:
    """Return requests that ended in the same tenth of a second."""
    sends = np.sort(rng.integers(0, 100_000_000, request_count)) + time.time_ns()
    gaps = np.cumsum(ITL_NANOS + rng.normal(0, JITTER_NANOS, (request_count, TOKENS)), axis=1).astype(np.int64)
    chunks = sends[:, None] + gaps
    columns = dict.fromkeys(REQUEST_COLUMNS, np.zeros(request_count, np.int64))
    columns |= {
        "send_nanos": sends,
        "scheduled_nanos": sends,
        "first_byte_nanos": chunks[:, 0],
        "end_nanos": chunks[:, -1],
    }
    return RecordBatch(
        **columns,
        errors=("",) * request_count,
        chunk_starts=np.arange(0, request_count * TOKENS + 1, TOKENS, dtype=np.int64),
        chunk_nanos=chunks.ravel(),
        chunk_tokens=np.ones(request_count * TOKENS, np.int64),
    )


async def publish_frames(nats: NatsConnection, streams: int) -> tuple[float, float]:
    """Return CPU microseconds and bytes per token of what so many streams send in a tenth of a second."""
    rng = np.random.default_rng(0)
    request_count = streams // 10
    batch = records(request_count, rng)
    frame = pack_records(batch)
    event = RecordsCame(stage_index=0, attempt=1, request_count=request_count, columns=frame)
    log = load_test_log(nats, f"streams-{streams}", next_index=0, last_sequence=0)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(log.run())
        began = time.process_time()
        for _ in range(FRAMES):
            await log.append(event)
            await log.flush()
        used = time.process_time() - began
        running.cancel()
    tokens = FRAMES * request_count * TOKENS
    return used / tokens * 1e6, len(frame) / (request_count * TOKENS)


async def publish_tokens(nats: NatsConnection) -> float:
    """Return CPU microseconds per token of a message each, sent without waiting for an acknowledgement."""
    count = 50_000
    began = time.process_time()
    for index in range(count):
        await nats.client.publish("one.token", index.to_bytes(24, "little"))
    await nats.client.flush()
    return (time.process_time() - began) / count * 1e6


async def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder, start_nats_server(Path(folder)) as server:
        nats = NatsConnection(server.url, streams=STREAMS)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(nats.run())
            await nats.wait_connected()
            print("| | CPU us/token | bytes/token |\n|---|---|---|")
            for streams in (128, 512):
                cost, size = await publish_frames(nats, streams)
                print(f"| a frame every 100 ms, {streams} streams, stored and acknowledged | {cost:.3f} | {size:.2f} |")
            print(f"| a message per token, not acknowledged | {await publish_tokens(nats):.2f} | 24 |")
            running.cancel()


if __name__ == "__main__":
    asyncio.run(main())
