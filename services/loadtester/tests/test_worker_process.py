"""One worker process from its supervisor's side: what it says, how it dies, how it is ended."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmpilot_loadtester.supervision.worker_process import WorkerDiedError, WorkerProcess
from llmpilot_loadtester.worker_messages import Kind, pack_message

LIMIT_SECONDS = 30
PROGRAMS = Path(__file__).parent / "programs"


def odd_worker(what: str) -> tuple[str, ...]:
    return (sys.executable, str(PROGRAMS / "odd_worker.py"), what)


def talk(what: str, conversation: Callable[[WorkerProcess], Coroutine[Any, Any, None]]) -> None:
    """Start a worker, talk to it, stop it; none is left."""

    async def main() -> None:
        async with asyncio.timeout(LIMIT_SECONDS), await WorkerProcess.start("worker 1", odd_worker(what)) as worker:
            await conversation(worker)
        assert is_gone(worker.pid)

    asyncio.run(main())


def is_gone(pid: int) -> bool:
    """Whether a process has ended, whoever reaps it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_messages_of_any_size_go_both_ways_whole_and_in_order() -> None:
    payloads = [b"", b"one", bytes(range(256)) * 12_000, b"last"]

    async def conversation(worker: WorkerProcess) -> None:
        sending = asyncio.create_task(send_all(worker))
        received: list[tuple[Kind, bytes]] = []
        while len(received) < len(payloads):
            received += await worker.receive(LIMIT_SECONDS)
        await sending
        assert received == [(Kind.RECORDS, payload) for payload in payloads]

    async def send_all(worker: WorkerProcess) -> None:
        for payload in payloads:
            await worker.send(pack_message(Kind.REQUESTS, payload))

    talk("echo", conversation)


def test_a_worker_ends_by_itself_when_its_pipe_ends() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        await worker.stop(end_seconds=LIMIT_SECONDS)
        with pytest.raises(WorkerDiedError, match=r"^worker 1 ended with code 0$"):
            await worker.receive(LIMIT_SECONDS)

    talk("echo", conversation)


def test_a_death_is_told_with_the_exit_code_and_the_last_of_what_it_wrote() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        assert await worker.receive(LIMIT_SECONDS) == [(Kind.RECORDS, b"the last")]
        with pytest.raises(WorkerDiedError) as raised:
            await worker.receive(LIMIT_SECONDS)
        first, *lines = str(raised.value).splitlines()
        assert first == "worker 1 ended with code 3; the last of what it wrote:"
        assert lines == [f"  | line {number}" for number in range(980, 1000)]

    talk("die", conversation)


def test_a_worker_that_is_killed_is_told_by_the_signal() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        await worker.receive(LIMIT_SECONDS)
        psutil.Process(worker.pid).kill()
        with pytest.raises(WorkerDiedError, match=r"^worker 1 was killed by SIGKILL$"):
            await worker.receive(LIMIT_SECONDS)

    talk("hang", conversation)


def test_a_worker_that_says_nothing_for_too_long_is_killed() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        await worker.receive(LIMIT_SECONDS)
        with pytest.raises(WorkerDiedError, match=r"^worker 1 said nothing for 0.2 s and was killed$"):
            await worker.receive(0.2)
        assert is_gone(worker.pid)

    talk("hang", conversation)


def test_a_supervisor_that_was_held_up_itself_does_not_blame_the_worker() -> None:
    """The answer came long before the limit, and was not read because nothing ran."""

    async def conversation(worker: WorkerProcess) -> None:
        await worker.send(pack_message(Kind.REQUESTS, b"one"))
        await worker.receive(LIMIT_SECONDS)  # it has started
        await worker.send(pack_message(Kind.REQUESTS, b"two"))
        receiving = asyncio.create_task(worker.receive(0.1))
        await asyncio.sleep(0)  # it waits
        time.sleep(0.5)  # noqa: ASYNC251 that is the point
        assert await receiving == [(Kind.RECORDS, b"two")]

    talk("echo", conversation)


def test_a_worker_that_says_what_is_no_message_is_killed_and_what_it_said_before_counts() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        assert await worker.receive(LIMIT_SECONDS) == [(Kind.RECORDS, b"good")]
        with pytest.raises(WorkerDiedError, match=r"^worker 1 wrote what is no message \(a message of \d+ bytes\)$"):
            await worker.receive(LIMIT_SECONDS)
        assert is_gone(worker.pid)

    talk("garble", conversation)


def test_a_worker_that_cannot_go_on_says_why_and_what_it_recorded_still_counts() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        assert await worker.receive(LIMIT_SECONDS) == [(Kind.RECORDS, b"the rest")]
        with pytest.raises(WorkerDiedError, match=r"^worker 1 cannot go on: the sky fell$"):
            await worker.receive(LIMIT_SECONDS)

    talk("fail", conversation)


def test_a_worker_that_ignores_the_end_and_sigterm_is_killed_in_time() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        await worker.receive(LIMIT_SECONDS)
        before = time.monotonic()
        await worker.stop(end_seconds=0.1, terminate_seconds=0.1)
        assert time.monotonic() - before < 5
        assert is_gone(worker.pid)

    talk("hang", conversation)


def test_sending_waits_for_a_worker_that_does_not_read_and_ends_when_it_is_killed() -> None:
    async def conversation(worker: WorkerProcess) -> None:
        await worker.receive(LIMIT_SECONDS)
        sending = asyncio.create_task(worker.send(pack_message(Kind.REQUESTS, bytes(8 << 20))))
        done, _ = await asyncio.wait([sending], timeout=0.2)
        assert not done
        worker.kill()
        await sending

    talk("hang", conversation)


def test_a_worker_that_nobody_reads_has_to_keep_what_it_says() -> None:
    """Its pipe, what asyncio reads ahead, and what is on the way: a few MB, however much it has to say."""

    async def conversation(worker: WorkerProcess) -> None:
        while not worker.last_lines:  # noqa: ASYNC110 nothing says that it came
            await asyncio.sleep(0.01)
        written_bytes = int(worker.last_lines[-1].split()[0])
        assert 1 << 20 < written_bytes < 4 << 20

    talk("flood", conversation)


def test_no_worker_is_left_when_its_supervisor_is_killed() -> None:
    command = [sys.executable, str(PROGRAMS / "doomed_supervisor.py"), *odd_worker("echo")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert not is_gone(pid)
        supervisor.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not is_gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
