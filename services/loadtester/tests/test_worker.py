"""A worker process, told what to do over its pipes as the supervisor does, against the real simulator."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from llmpilot_contracts.record_schema import STAMP_SOURCES, STATUSES, problems
from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import RecordBatch, joined
from llmpilot_loadtester.domain.spec import Load, LoadKind, Protocol, Target, UserStep
from llmpilot_loadtester.protocols.bodies import body_for
from llmpilot_loadtester.wire_tgis import write_single_request
from llmpilot_loadtester.worker_messages import (
    Failed,
    Kind,
    MessageReader,
    Probed,
    ProbeOrder,
    Pulse,
    QueuedRequest,
    StageOrder,
    pack_json,
    pack_message,
    pack_requests,
)

LIMIT_SECONDS = 30.0
MODEL = "meta-llama/Llama-3.1-8B-simulated"
WORKER = (sys.executable, "-P", "-m", "llmpilot_loadtester.engine.worker")
PRINTING_WORKER = (
    sys.executable,
    "-c",
    "import gevent; gevent.spawn_later(0.1, print, 'stray', flush=True);"
    "from llmpilot_loadtester.engine.worker import main; main()",
)


class Worker:
    """A worker and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.messages: list[tuple[Kind, bytes]] = []
        self._told = threading.Condition()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        reader = MessageReader()
        while data := os.read(self.process.stdout.fileno(), 1 << 20):
            with self._told:
                self.messages += reader.feed(data)
                self._told.notify_all()
        with self._told:
            self._told.notify_all()

    def tell(self, *messages: bytes) -> None:
        """Write messages."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(messages))
        self.process.stdin.flush()

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until what was said makes it true."""
        with self._told:
            assert self._told.wait_for(condition, LIMIT_SECONDS), self.messages[-3:]

    def payloads(self, kind: Kind) -> list[bytes]:
        """What was said of this kind."""
        return [payload for said, payload in self.messages if said is kind]

    def wait_for(self, kind: Kind) -> bytes:
        """The first message of this kind."""
        self.wait(lambda: self.payloads(kind))
        return self.payloads(kind)[0]

    @property
    def pulse(self) -> Pulse:
        """The newest."""
        pulses = self.payloads(Kind.PULSE)
        return msgspec.json.decode(pulses[-1], type=Pulse) if pulses else NO_PULSE

    @property
    def records(self) -> RecordBatch:
        """What was recorded until now."""
        return joined([unpack_records(frame) for frame in self.payloads(Kind.RECORDS)])

    def end(self) -> None:
        """Close its pipe; it must end without an error."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(LIMIT_SECONDS) == 0
        self._listener.join(LIMIT_SECONDS)

    @property
    def health(self) -> WorkerHealth:
        """What it said of itself at the end of the stage."""
        return msgspec.json.decode(self.payloads(Kind.STAGE_ENDED)[-1], type=WorkerHealth)


NO_PULSE = Pulse(
    users_count=0,
    in_flight_count=0,
    measured_in_flight_count=0,
    sent_count=0,
    queued_count=0,
    health=WorkerHealth(),
)


@contextmanager
def running(command: Sequence[str] = WORKER) -> Iterator[Worker]:
    """A worker; it is gone afterwards."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        worker = Worker(process)
        try:
            yield worker
        finally:
            process.kill()
            worker._listener.join(LIMIT_SECONDS)


@pytest.fixture(scope="module")
def shared() -> Iterator[Callable[[], Worker]]:
    """The worker that serves fact after fact, as starting one takes a second; none after a fact that ended it."""
    with ExitStack() as stack:
        workers: list[Worker] = []

        def start() -> Worker:
            if not workers or workers[-1].process.poll() is not None:
                workers.append(stack.enter_context(running()))
            return workers[-1]

        yield start


@pytest.fixture
def worker(shared: Callable[[], Worker]) -> Iterator[Worker]:
    """A worker that has nothing to do, and has said nothing."""
    idle = shared()
    idle.messages.clear()
    yield idle
    if idle.process.poll() is None and not idle.payloads(Kind.STAGE_ENDED):
        finish(idle)


def users(count: int) -> Load:
    return Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=count),))


POISSON = Load(kind=LoadKind.POISSON, rate_per_second=100.0)


def stage(url: str, load: Load, *, start_nanos: int | None = None, **changes: object) -> StageOrder:
    """A stage that begins now and is measured from its beginning."""
    start = time.time_ns() if start_nanos is None else start_nanos
    order = StageOrder(
        target=Target(url=url, served_model=MODEL),
        load=load,
        first_user_index=10,
        start_nanos=start,
        measure_from_nanos=start,
        measure_until_nanos=start + 3_600_000_000_000,
        request_id_prefix=f"{start}-",
        spawn_per_second=1000.0,
    )
    return replace(order, **changes)  # type: ignore[arg-type]


def requests(count: int, *, tokens: int = 10, first: int = 0, times: Sequence[int] = ()) -> list[QueuedRequest]:
    body = body_for(
        Protocol.OPENAI_COMPLETIONS, prompt="hello", served_model=MODEL, output_tokens=tokens, fixed_output_length=True
    )
    return [
        QueuedRequest(index=first + index, body=body, input_tokens=7, scheduled_nanos=times[index] if times else -1)
        for index in range(count)
    ]


def assert_valid(records: RecordBatch) -> None:
    """The contract of records finds nothing wrong."""
    assert problems(records.since(int(records.scheduled_nanos.min())).table(origin="measured")) == []


def begin(worker: Worker, order: StageOrder, queue: list[QueuedRequest]) -> None:
    worker.tell(pack_json(Kind.STAGE, order), pack_requests(queue), pack_message(Kind.NO_MORE_REQUESTS))


def finish(worker: Worker) -> RecordBatch:
    """End the stage; returns all of its records."""
    ended_count = len(worker.payloads(Kind.STAGE_ENDED))
    worker.tell(pack_message(Kind.END_STAGE))
    worker.wait(lambda: len(worker.payloads(Kind.STAGE_ENDED)) > ended_count)
    return worker.records


def test_a_closed_loop_records_every_token_when_the_server_wrote_it(start_simulator: Any, worker: Any) -> None:
    with start_simulator() as simulator:
        order = stage(simulator.url, users(8))
        begin(worker, order, requests(48))
        worker.wait(lambda: len(worker.records) == 48)
        records = finish(worker)
        health = worker.health
        simulator.stop()
        written = simulator.written_nanos()
    assert_valid(records)
    assert records.is_ok.all()
    assert sorted(records.request_index.tolist()) == list(range(48))
    assert set(records.user_index.tolist()) == set(range(10, 18))
    assert (records.output_tokens == 10).all()
    lags = []
    for row, index in enumerate(records.request_index.tolist()):
        stamps = records.chunk_nanos[records.chunk_starts[row] : records.chunk_starts[row + 1]]
        lags += (stamps - np.array(written[f"{order.start_nanos}-{index}"])).tolist()
    # One in twenty for a busy machine: it may stop the server between reading its clock and writing, and a read that
    # comes 10 ms late has lost the time of the token before.
    assert np.quantile(lags, 0.95) < 200_000
    assert min(lags) > 0
    if STAMP_SOURCES[int(records.stamp_source[0])] == "kernel":
        assert health.read_count >= 480


def test_a_user_sends_its_next_request_when_the_last_reply_is_whole(simulator: Any, worker: Any) -> None:
    begin(worker, stage(simulator.url, users(2)), requests(8))
    worker.wait(lambda: len(worker.records) == 8)
    records = finish(worker)
    for user in (10, 11):
        rows = records.take(records.user_index == user)
        for (_, end), (send, _) in pairwise(zip(rows.send_nanos.tolist(), rows.end_nanos.tolist(), strict=True)):
            assert send >= end
        # When it should have been sent: when the user was free, which is when the reply before was whole.
        assert rows.scheduled_nanos[1:].tolist() == rows.end_nanos[:-1].tolist()


def test_an_open_loop_sends_at_the_given_times_whatever_becomes_of_replies(simulator: Any, worker: Any) -> None:
    start = time.time_ns() + 1_500_000_000
    gaps = np.random.default_rng(5).exponential(0.01, 100)
    times = (start + np.cumsum(gaps * 1e9).astype(int)).tolist()
    begin(worker, stage(simulator.url, POISSON, start_nanos=start), requests(100, times=times))
    worker.wait(lambda: len(worker.records) == 100)
    records = finish(worker)
    assert_valid(records)
    assert records.is_ok.all()
    by_index = records.take(np.argsort(records.request_index))
    assert by_index.scheduled_nanos.tolist() == times
    assert set(by_index.user_index.tolist()) == {-1}
    lateness_nanos = by_index.send_nanos - by_index.scheduled_nanos
    assert lateness_nanos.min() >= 0
    assert np.median(lateness_nanos) < 2_000_000


def test_a_server_that_dies_is_counted_and_not_hammered(start_simulator: Any, worker: Any) -> None:
    with start_simulator() as simulator:
        begin(worker, stage(simulator.url, users(4)), requests(2000, tokens=50))
        worker.wait(lambda: worker.pulse.health.read_count > 40)
        simulator.process.kill()
        killed_nanos = time.time_ns()
        worker.wait(lambda: (~worker.records.is_ok).sum() >= 16)
        records = finish(worker)
    assert_valid(records)
    failed = records.take(~records.is_ok)
    assert {STATUSES[code] for code in failed.status.tolist()} == {"disconnected"}
    assert "refuses connections" in failed.errors[-1]
    # Four users fail at once, and after pauses of 50, 100, 200, 400 ms.
    for user in range(10, 14):
        sends = failed.send_nanos[(failed.user_index == user) & (failed.send_nanos > killed_nanos)]
        pauses = np.diff(sends)
        assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses[:4].tolist()))


def test_a_user_waits_as_long_as_the_server_asks(simulator: Any, worker: Any) -> None:
    rejecting = Target(url=simulator.url, served_model=MODEL, headers=(("x-simulate-fault", "reject=429"),))
    begin(worker, stage(simulator.url, users(1), target=rejecting), requests(50))
    worker.wait(lambda: len(worker.records) == 2)
    records = finish(worker)
    assert {STATUSES[code] for code in records.status.tolist()} == {"rejected"}
    assert np.diff(records.send_nanos)[0] >= 1_000_000_000  # Retry-After: 1


def test_the_end_of_a_stage_cuts_off_what_is_under_way_and_keeps_its_tokens(simulator: Any, worker: Any) -> None:
    begin(worker, stage(simulator.url, users(3)), requests(3, tokens=500))
    worker.wait(lambda: worker.pulse.health.read_count > 30)
    assert worker.pulse.measured_in_flight_count == worker.pulse.in_flight_count == 3
    records = finish(worker)
    assert_valid(records)
    assert [STATUSES[code] for code in records.status.tolist()] == ["cancelled"] * 3
    assert (records.output_tokens >= 5).all()
    assert (records.output_tokens < 500).all()


def test_what_was_sent_before_the_window_is_not_measured(simulator: Any, worker: Any) -> None:
    order = stage(simulator.url, users(3))
    begin(worker, replace(order, measure_from_nanos=order.measure_until_nanos), requests(3, tokens=500))
    worker.wait(lambda: worker.pulse.in_flight_count == 3)
    assert worker.pulse.measured_in_flight_count == 0


@pytest.mark.parametrize("load", [users(3), POISSON], ids=["closed", "open"])
@pytest.mark.parametrize("by", ["SIGTERM", "the end of its pipe"])
def test_a_worker_that_must_stop_records_what_there_is(simulator: Any, worker: Any, load: Any, by: Any) -> None:
    times = [] if load.is_closed else [time.time_ns()] * 3
    begin(worker, stage(simulator.url, load), requests(3, tokens=500, times=times))
    worker.wait(lambda: worker.pulse.health.read_count > 30)
    began = time.monotonic()
    if by == "SIGTERM":
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(LIMIT_SECONDS) == 0
    worker.end()
    assert time.monotonic() - began < 1.5  # what the supervisor waits before it kills
    assert [STATUSES[code] for code in worker.records.status.tolist()] == ["cancelled"] * 3
    assert (worker.records.output_tokens >= 5).all()


def test_ctrl_c_is_for_the_supervisor(simulator: Any, worker: Any) -> None:
    begin(worker, stage(simulator.url, users(1)), requests(2))
    worker.wait(lambda: worker.pulse.in_flight_count == 1)
    worker.process.send_signal(signal.SIGINT)
    worker.wait(lambda: len(worker.records) == 2)


def test_what_prints_does_not_reach_the_supervisor(simulator: Any) -> None:
    with running(PRINTING_WORKER) as worker:
        begin(worker, stage(simulator.url, users(1)), requests(4))
        worker.wait(lambda: len(worker.records) == 4)
        assert finish(worker).is_ok.all()


def test_users_without_requests_are_counted_as_starved(simulator: Any, worker: Any) -> None:
    worker.tell(pack_json(Kind.STAGE, stage(simulator.url, users(2))))
    worker.wait(lambda: worker.pulse.users_count == 2)
    worker.tell(pack_requests(requests(2)), pack_message(Kind.NO_MORE_REQUESTS))
    worker.wait(lambda: len(worker.records) == 2)
    finish(worker)
    assert worker.health.starved_count == 2


def test_users_that_have_sent_the_last_request_are_not_starved(simulator: Any, worker: Any) -> None:
    begin(worker, stage(simulator.url, users(2)), requests(4))
    worker.wait(lambda: len(worker.records) == 4)
    finish(worker)
    assert worker.health.starved_count == 0


def test_users_come_and_go_in_steps_and_finish_what_they_sent(simulator: Any, worker: Any) -> None:
    steps = (UserStep(at_seconds=0, users_count=2), UserStep(at_seconds=0.5, users_count=6))
    load = Load(kind=LoadKind.USERS, user_steps=(*steps, UserStep(at_seconds=1.0, users_count=1)))
    begin(worker, stage(simulator.url, load), requests(200))
    worker.wait(lambda: worker.pulse.users_count == 2)
    worker.wait(lambda: worker.pulse.users_count == 6)
    worker.wait(lambda: worker.pulse.users_count == 1)
    records = worker.records
    assert records.is_ok.all()
    assert set(records.user_index.tolist()) == set(range(10, 16))


def test_stages_follow_one_another_in_one_worker(simulator: Any, worker: Any) -> None:
    begin(worker, stage(simulator.url, users(2)), requests(2))
    worker.wait(lambda: len(worker.records) == 2)
    finish(worker)
    begin(worker, stage(simulator.url, users(2)), requests(2, first=2))
    worker.wait(lambda: len(worker.records) == 4)
    assert finish(worker).is_ok.all()
    assert worker.health.read_count < 40  # of this stage, not of both


def test_tgis_is_driven_over_grpc(simulator: Any, worker: Any) -> None:
    body = write_single_request("hello", output_tokens=10, fixed_output_length=True)
    target = Target(url=simulator.grpc_url, protocol=Protocol.TGIS)
    queue = [replace(request, body=body) for request in requests(6)]
    begin(worker, stage(simulator.grpc_url, users(2), target=target), queue)
    worker.wait(lambda: len(worker.records) == 6)
    records = finish(worker)
    assert_valid(records)
    assert (records.output_tokens == 10).all()


def test_a_worker_looks_at_the_target(simulator: Any, worker: Any) -> None:
    worker.tell(pack_json(Kind.PROBE, ProbeOrder(target=Target(url=simulator.url))))
    found = msgspec.json.decode(worker.wait_for(Kind.PROBED), type=Probed)
    assert found == Probed(served_models=(MODEL,), simulated=True)


def test_a_target_that_cannot_be_asked_ends_the_worker_with_a_reason(worker: Any) -> None:
    target = Target(url="http://127.0.0.1:1", headers=(("no name", "x"),))
    worker.tell(pack_json(Kind.PROBE, ProbeOrder(target=target)))
    failed = msgspec.json.decode(worker.wait_for(Kind.FAILED), type=Failed)
    assert "'no name' is no name of a header" in failed.message
    assert worker.process.wait(LIMIT_SECONDS) == 1


def test_what_is_no_message_ends_the_worker_with_a_reason(worker: Any) -> None:
    worker.tell(b"\xff" * 100)
    assert worker.process.wait(LIMIT_SECONDS) == 1
    failed = msgspec.json.decode(worker.wait_for(Kind.FAILED), type=Failed)
    assert "cannot be read" in failed.message


def test_a_mistaken_order_ends_the_worker_with_a_reason(worker: Any) -> None:
    worker.tell(pack_message(Kind.STAGE, b"{}"))
    assert worker.process.wait(LIMIT_SECONDS) == 1
    failed = msgspec.json.decode(worker.wait_for(Kind.FAILED), type=Failed)
    assert "missing required field" in failed.message
