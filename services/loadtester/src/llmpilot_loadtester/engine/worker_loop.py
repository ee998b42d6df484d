"""Does what the supervisor says, message by message, while the stage runs beside it.

Invariant: it ends by itself when its supervisor is gone, and everything that was sent until then is recorded and said.
"""

import gc
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gevent
import msgspec
from gevent.queue import Queue

from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.engine.adapters import new_adapter_for
from llmpilot_loadtester.engine.client import LlmClient
from llmpilot_loadtester.engine.health import HealthWatch
from llmpilot_loadtester.engine.pacer import Pacer
from llmpilot_loadtester.engine.pipes import Inbox, Outbox
from llmpilot_loadtester.engine.probe import probe
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.recorder import Recorder
from llmpilot_loadtester.engine.stage import RequestQueue, RunningStage
from llmpilot_loadtester.engine.stage_runner import runner_of
from llmpilot_loadtester.worker_messages import (
    Failed,
    Kind,
    ProbeOrder,
    StageOrder,
    pack_json,
    pack_message,
    unpack_requests,
)

_PULSE_SECONDS = 0.05
_LAST_WORDS_SECONDS = 1.0
_YOUNG_OBJECTS = 50_000


class WorkerLoop:
    """A worker, from its start to its end."""

    def __init__(self, inbound: int, outbound: int) -> None:
        self._orders: Queue[Callable[[], None]] = Queue()
        self._exit_code: int | None = None
        self._reader = Reader()
        self._queue = RequestQueue()
        self._stage: _StageWork | None = None
        self._outbox = Outbox(outbound)
        self._inbox = Inbox(inbound, self._on_message, self._on_end)
        gevent.signal_handler(signal.SIGTERM, self._on_end, "")

    def run(self) -> int:
        """Serve; returns the exit code of the process."""
        try:
            while self._exit_code is None:
                self._orders.get()()
        except Exception as error:  # noqa: BLE001 the last thing that the supervisor hears
            self._fail(f"{type(error).__name__}: {error}")
        self._end_stage()
        self._outbox.drain(_LAST_WORDS_SECONDS)
        return self._exit_code or 0

    def _on_message(self, kind: Kind, payload: bytes) -> None:
        self._orders.put(partial(self._obey, kind, payload))

    def _on_end(self, problem: str) -> None:
        self._orders.put(partial(self._stop, problem))

    def _stop(self, problem: str) -> None:
        if problem:
            self._fail(problem)
        self._exit_code = self._exit_code or 0

    def _fail(self, message: str) -> None:
        self._exit_code = 1
        self._outbox.put(pack_json(Kind.FAILED, Failed(message=message)))

    def _obey(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.PROBE:
            _spawn(self._on_broken, self._probe, msgspec.json.decode(payload, type=ProbeOrder))
        elif kind is Kind.STAGE:
            self._begin_stage(msgspec.json.decode(payload, type=StageOrder))
        elif kind is Kind.REQUESTS:
            self._queue.extend(unpack_requests(payload))
        elif kind is Kind.NO_MORE_REQUESTS:
            self._queue.is_complete = True
        elif kind is Kind.END_STAGE:
            if self._stage is None:
                self._outbox.put(pack_json(Kind.STAGE_ENDED, WorkerHealth()))
            self._end_stage()
        else:
            self._fail(f"a worker is not told {kind.name}")

    def _probe(self, order: ProbeOrder) -> None:
        probed = probe(order.target, self._reader)
        problem = order.target.without_secrets(probed.problem)
        self._outbox.put(pack_json(Kind.PROBED, replace(probed, problem=problem)))

    def _begin_stage(self, order: StageOrder) -> None:
        if self._stage is not None:
            self._fail("a stage was to begin while another one runs")
            return
        self._stage = _StageWork(order, self._queue, self._reader, self._outbox, self._on_broken)

    def _on_broken(self, problem: str) -> None:
        self._orders.put(partial(self._fail, problem))

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._stage.end()
            self._stage = None
            self._queue = RequestQueue()


class _StageWork:
    """A stage, and what says how it goes."""

    def __init__(
        self,
        order: StageOrder,
        queue: RequestQueue,
        reader: Reader,
        outbox: Outbox,
        on_broken: Callable[[str], None],
    ) -> None:
        new_adapter = new_adapter_for(order.target, order.reply_tokenizer_json)
        self._outbox = outbox
        self._recorder = Recorder(
            self._give_away,
            asked_model=order.target.served_model,
            without_secrets=order.target.without_secrets,
        )
        gc.collect()
        gc.freeze()  # what lives until the end is not looked at again: a collection stops the loop for milliseconds
        gc.set_threshold(_YOUNG_OBJECTS)
        self._health = HealthWatch(reader, self._recorder)
        self._stage = RunningStage(
            order,
            queue,
            self._recorder,
            self._health,
            lambda: LlmClient(order.target, new_adapter(), reader),
        )
        self._runner = runner_of(self._stage, on_broken)
        self._greenlets = [_spawn(on_broken, self._begin), _spawn(on_broken, self._tell)]

    def end(self) -> None:
        """Cut off what is under way, record everything, say so."""
        gevent.killall(self._greenlets)
        self._runner.end()
        self._stage.close()
        self._recorder.drain()
        self._recorder.close()
        health = self._health.snapshot()
        self._health.close()
        self._outbox.put(pack_json(Kind.STAGE_ENDED, health))

    def _begin(self) -> None:
        pacer = Pacer()
        try:
            pacer.sleep_until(self._stage.order.start_nanos)
        finally:
            pacer.close()
        self._runner.begin()

    def _tell(self) -> None:
        while True:
            self._recorder.flush()
            self._outbox.put(pack_json(Kind.PULSE, self._stage.pulse()), droppable=True)
            gevent.sleep(_PULSE_SECONDS)

    def _give_away(self, frame: bytes, record_count: int) -> None:
        if not self._outbox.put(pack_message(Kind.RECORDS, frame), droppable=True):
            self._health.dropped_record_count += record_count


def _spawn(on_broken: Callable[[str], None], run: Callable[..., None], *arguments: object) -> gevent.Greenlet:
    """Start a greenlet; `on_broken` hears what it dies of."""
    greenlet = gevent.spawn(run, *arguments)
    greenlet.link_exception(lambda dead: on_broken(repr(dead.exception)))
    return greenlet
