"""Starts a worker, prints its process id, and waits to be killed."""

import asyncio
import sys

from llmpilot_loadtester.supervision.worker_process import WorkerProcess


async def main() -> None:
    worker = await WorkerProcess.start("worker 1", sys.argv[1:])
    await worker.send(b"")
    print(worker.pid, flush=True)  # noqa: T201 the test reads it
    await worker.receive(3600)


asyncio.run(main())
