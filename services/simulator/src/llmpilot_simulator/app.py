"""The simulator's composition root: one process that listens as OpenAI, TGI and TGIS at once.

Invariant: after `stop`, every token that left is in the write log.
"""

import asyncio
import gc
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, ProcessCollector

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import Policy, Vllm0Policy, Vllm1Policy
from llmpilot_servicekit.logs import get_logger
from llmpilot_simulator.clock import NANOS_PER_SECOND, SystemClock
from llmpilot_simulator.faults import Gate
from llmpilot_simulator.generation import Generator
from llmpilot_simulator.grpc_server import GrpcServer
from llmpilot_simulator.http_exchange import Service
from llmpilot_simulator.http_server import HttpServer, raise_file_limit
from llmpilot_simulator.metrics import VllmCollector
from llmpilot_simulator.pace import BatchedPace, FixedPace
from llmpilot_simulator.realtime import Pace, RealTimeServer
from llmpilot_simulator.settings import FixedTimes, ModelledTimes, SimulatorSettings, Times
from llmpilot_simulator.tokenizer import Tokenizer
from llmpilot_simulator.write_log import WriteLog

log = get_logger(__name__)

_ANY_BLOCK_SIZE = 16
_FLUSH_SECONDS = 0.25
"""How often the write log goes to its file."""
_LAST_MESSAGES_SECONDS = 0.5
"""How long gRPC calls may take to send what they have when every request has ended."""
_NOT_WRITTEN = "the write log ends here, it cannot be written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the server listens, with the real ports."""

    http: str
    grpc: str | None


def build(settings: SimulatorSettings) -> "Application":
    """Return a server that does not listen yet; raises InvalidInputError for an impossible one."""
    return Application(settings, _pace(settings.times))


def _pace(times: Times) -> Pace:
    if isinstance(times, FixedTimes):
        return FixedPace(ttft_seconds=times.ttft_seconds, itl_seconds=times.itl_seconds)
    _warm_up(times)
    engine = Engine(policy=times.policy, tables=times.tables, out_of_memory_tokens=times.out_of_memory_tokens)
    return BatchedPace(engine, frontend_seconds_per_token=times.frontend_seconds_per_token)


def _warm_up(times: ModelledTimes) -> None:
    """Have everything compiled that a step needs: the first request must not wait for it."""
    engine = Engine(policy=times.policy, tables=times.tables, capacity=1)
    for _ in range(2):
        slot = engine.submit(arrival_seconds=0.0, input_tokens=1, output_tokens=1)
    engine.cancel(slot)
    while engine.start_step(0.0) is not None:
        engine.finish_step()


def _policy(times: Times) -> Policy | None:
    return times.policy if isinstance(times, ModelledTimes) else None


def _block_size(times: Times) -> int:
    """Return the tokens in a block of the prefix cache, where there is one."""
    policy = _policy(times)
    return policy.block_size if isinstance(policy, Vllm0Policy | Vllm1Policy) else _ANY_BLOCK_SIZE


class Application:
    """A server, from `start` to `stop`, in the event loop that calls them."""

    def __init__(self, settings: SimulatorSettings, pace: Pace) -> None:
        self._settings = settings
        self._pace = pace
        self._started = AsyncExitStack()
        """What `stop` has to undo."""
        self._is_stopping = False

    async def start(self) -> Addresses:
        """Listen. Raises PreconditionError where an address is taken or the write log cannot be written."""
        settings = self._settings
        raise_file_limit()
        async with AsyncExitStack() as started:
            write_log = None if settings.write_log is None else WriteLog(settings.write_log)
            if write_log is not None:
                started.callback(_Flusher(write_log).close)
            self.service = service = self._service(write_log)
            started.callback(service.server.close)
            registry = _registry(service)
            self._http = HttpServer(service, registry)
            http_address = await self._http.start(settings.http_address)
            started.push_async_callback(self._http.stop)
            grpc_address = None
            if settings.grpc_address is not None:
                grpc_server = GrpcServer(service, registry)
                grpc_address = await grpc_server.start(settings.grpc_address)
                started.push_async_callback(grpc_server.stop, _LAST_MESSAGES_SECONDS)
            self.addresses = Addresses(http=http_address, grpc=grpc_address)
            self._started = started.pop_all()
        log.info("serving", model=service.public_model_id, simulated=True, http=http_address, grpc=grpc_address)
        return self.addresses

    async def stop(self) -> None:
        """Accept nothing more, let what is streaming end within the grace period, then close and write the log."""
        if self._is_stopping:
            return
        self._is_stopping = True
        server = self.service.server
        self.service.gate.close()
        await self._http.stop_accepting()
        try:
            async with asyncio.timeout(self._settings.shutdown_grace_seconds):
                await server.wait_idle()
        except TimeoutError:
            log.warning("closed before the end", requests=server.open_count)
        await self._started.aclose()
        log.info("stopped", http=self.addresses.http, grpc=self.addresses.grpc)

    def _service(self, write_log: WriteLog | None) -> Service:
        settings = self._settings
        clock = SystemClock()
        tokenizer = Tokenizer()
        return Service(
            model_id=settings.model_id,
            context_length=settings.context_length,
            is_encoder_decoder=settings.is_encoder_decoder,
            policy=_policy(settings.times),
            tokenizer=tokenizer,
            generator=Generator(
                tokenizer,
                seed=settings.seed,
                reply_lengths=settings.reply_lengths,
                block_size=_block_size(settings.times),
            ),
            server=RealTimeServer(self._pace, clock=clock),
            clock=clock,
            gate=Gate(settings.faults, start_seconds=clock.monotonic_nanos() / NANOS_PER_SECOND),
            faults=settings.faults,
            log=write_log,
            slow_reader_seconds=settings.slow_reader_seconds,
            start_seconds=clock.wall_nanos() // NANOS_PER_SECOND,
            version=version("llm-pilot-simulator"),
        )


def _registry(service: Service) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(
        VllmCollector(
            model_id=service.public_model_id,
            statistics=service.server.statistics,
            load=service.server.load,
            policy=service.policy,
        )
    )
    ProcessCollector(registry=registry)
    return registry


async def run(application: Application, *, ready: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT; for the main thread of a process of its own."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        addresses = await application.start()
        gc.collect()
        gc.freeze()  # what lives now lives as long as the process: collections need not look at it again
        ready(addresses)
        await stop.wait()
        await application.stop()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class _Flusher:
    """Moves the write log to its file every now and then, in a thread, as a disk may block."""

    def __init__(self, write_log: WriteLog) -> None:
        self._log = write_log
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "write-log")
        self._writing: Future[None] | None = None
        self._timer = self._loop.call_later(_FLUSH_SECONDS, self._flush)

    def close(self) -> None:
        """Write everything and close the file."""
        self._timer.cancel()
        self._thread.shutdown()
        try:
            self._log.close()
        except OSError as error:
            log.error(_NOT_WRITTEN, error=str(error))

    def _flush(self) -> None:
        self._timer = self._loop.call_later(_FLUSH_SECONDS, self._flush)
        writing = self._writing
        if writing is not None:
            if not writing.done():
                return
            if (error := writing.exception()) is not None:
                log.error(_NOT_WRITTEN, error=str(error))
        self._writing = self._thread.submit(self._log.write_block, self._log.take_block())
