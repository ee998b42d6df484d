import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from llmpilot_contracts.errors import InvalidInputError, PilotError, UnavailableError, Violation
from llmpilot_servicekit.client import connect
from llmpilot_servicekit.server import run, serve
from llmpilot_servicekit.settings import ServiceSettings

Serving = Callable[..., AbstractAsyncContextManager[Any]]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def echo(request: StringValue, _context: object) -> StringValue:
    return request


def test_health_knows_the_server_and_each_service(serving: Serving) -> None:
    async def check() -> None:
        async with serving(echo) as running:
            stub: Any = health_pb2_grpc.HealthStub(running.channel)
            for service in ("", "test.Echo"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
                assert answer.status == SERVING
            with pytest.raises(grpc.RpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(check())


def test_health_says_not_serving_before_the_server_stops(serving: Serving) -> None:
    async def check() -> None:
        async with serving(echo, shutdown_grace_seconds=0.2) as running, asyncio.timeout(20):
            stub: Any = health_pb2_grpc.HealthStub(running.channel)
            watch = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
            assert (await anext(watch)).status == SERVING
            running.stop.set()
            assert (await anext(watch)).status == NOT_SERVING

    asyncio.run(check())


def test_reflection_lists_the_services_with_health(serving: Serving) -> None:
    async def check() -> None:
        async with serving(echo) as running:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)
            requests = iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
                ]
            )
            answers = [answer async for answer in stub.ServerReflectionInfo(requests, timeout=20)]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {"test.Echo", "grpc.health.v1.Health"} <= names
            assert answers[1].file_descriptor_response.file_descriptor_proto

    asyncio.run(check())


def test_metrics_are_served_as_prometheus_text(serving: Serving) -> None:
    async def check() -> str:
        async with serving(echo) as running:
            await running.call("unary_unary", "a", timeout=20)
            url = f"http://{running.metrics_address}/metrics"
            return await asyncio.to_thread(read, url)

    def read(url: str) -> str:
        with urllib.request.urlopen(url, timeout=20) as response:  # noqa: S310 our own server
            return str(response.read().decode())

    text = asyncio.run(check())
    assert '\nllmpilot_grpc_requests_total{code="OK",method="/test.Echo/unary_unary"} 1.0\n' in text
    assert '\nllmpilot_grpc_request_seconds_bucket{le="0.5",method="/test.Echo/unary_unary"} 1.0\n' in text


def test_a_request_of_10_mb_is_refused_and_the_server_lives(serving: Serving) -> None:
    async def check() -> None:
        async with serving(echo) as running:
            with pytest.raises(grpc.RpcError) as caught:
                await running.call("unary_unary", "x" * 10_000_000, timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await running.call("unary_unary", "x" * 4_000_000, timeout=20) == ["x" * 4_000_000]

    asyncio.run(check())


def test_the_address_file_lives_as_long_as_the_server(serving: Serving, tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(echo) as running:
            addresses = json.loads((tmp_path / "address.json").read_text())
            assert addresses == {"grpc": running.address, "metrics": running.metrics_address}
            assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", running.address)

    asyncio.run(check())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "variable"), [("listen", "LLMPILOT_LISTEN"), ("metrics_listen", "LLMPILOT_METRICS_LISTEN")]
)
def test_a_taken_port_is_named_with_its_variable(
    serving: Serving, capfd: pytest.CaptureFixture[str], field: str, variable: str
) -> None:
    async def check() -> tuple[str, str]:
        async with serving(echo) as running:
            taken: str = running.address
            settings = ServiceSettings.model_validate({"listen": "127.0.0.1:0", field: taken})
            with pytest.raises(PilotError) as caught:
                await serve(settings, registrations=[])
            return taken, str(caught.value)

    taken, message = asyncio.run(check())
    assert message.startswith(f"cannot listen on {taken}: Address already in use; set {variable}")
    assert "add_port" not in capfd.readouterr().err  # grpc's own complaint


def test_two_servers_live_in_one_process(serving: Serving) -> None:
    async def check() -> None:
        stop = asyncio.Event()
        async with serving(echo) as running, asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(ServiceSettings(listen="127.0.0.1:0"), registrations=[], stop=stop))
            await running.call("unary_unary", "a", timeout=20)
            stop.set()

    asyncio.run(check())


def test_background_work_is_cancelled_after_the_last_call() -> None:
    events: list[str] = []

    async def check() -> None:
        stop = asyncio.Event()

        async def work() -> None:
            stop.set()
            try:
                await asyncio.Event().wait()
            finally:
                events.append("cancelled")

        async def finished() -> None:
            events.append("finished")

        settings = ServiceSettings(listen="127.0.0.1:0")
        await serve(settings, registrations=[], background=[finished, work], stop=stop)

    asyncio.run(check())
    assert events == ["finished", "cancelled"]


def test_an_answer_that_nobody_reads_does_not_take_the_grace_period(serving: Serving) -> None:
    """It cannot be delivered, and its status waits behind it."""
    told = asyncio.Event()

    async def much(_: StringValue, context: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(write_for_ever(context))
            await told.wait()
            writing.cancel()
        raise UnavailableError("stopping")

    async def write_for_ever(context: Any) -> None:
        while True:
            await context.write(StringValue(value="x" * 1_000_000))

    async def check() -> None:
        async with asyncio.timeout(20), serving(much, kind="unary_stream", shutdown_grace_seconds=100) as running:
            method = running.channel.unary_stream(
                "/test.Echo/unary_stream",
                request_serializer=StringValue.SerializeToString,
                response_deserializer=StringValue.FromString,
            )
            call = method(StringValue())
            assert await call.read()
            told.set()

    asyncio.run(check())


def test_failing_background_work_ends_the_server_with_its_error(tmp_path: Path) -> None:
    async def fail() -> None:
        raise UnavailableError("the store is gone")

    settings = ServiceSettings(listen="127.0.0.1:0", address_file=tmp_path / "a.json")
    with pytest.raises(UnavailableError, match="the store is gone"):
        asyncio.run(serve(settings, registrations=[], background=[fail]))
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("error", "exit_code", "lines"),
    [
        (None, 0, ""),
        (UnavailableError("away: try again"), 1, "error: away: try again\n"),
        (InvalidInputError([Violation("a", "b"), Violation("c", "d")]), 2, "error: a: b\nerror: c: d\n"),
        (ExceptionGroup("tasks", [PilotError("no")]), 1, "error: no\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_exit_code_and_the_lines_follow_the_error(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, exit_code: int, lines: str
) -> None:
    async def main() -> None:
        if error:
            raise error

    assert run(main) == exit_code
    assert capsys.readouterr().err == lines


def test_an_unexpected_error_keeps_its_traceback() -> None:
    async def main() -> None:
        raise ExceptionGroup("tasks", [KeyError("x"), PilotError("y")])

    with pytest.raises(ExceptionGroup):
        run(main)


class Process:
    """The echo service as a process of its own."""

    def __init__(self, directory: Path, mode: str = "healthy", **environment: str) -> None:
        self.entered_file = directory / "entered"
        self.address_file = directory / "address.json"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("echo_process.py"), mode, self.entered_file],
            env={
                **os.environ,
                "LLMPILOT_LISTEN": "127.0.0.1:0",
                "LLMPILOT_ADDRESS_FILE": str(self.address_file),
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        """Wait until it serves; give its gRPC address."""
        wait_until(self.address_file.exists)
        return str(json.loads(self.address_file.read_text())["grpc"])

    def end(self) -> tuple[int, str]:
        """Wait for its end; give the exit code and what it wrote to stderr."""
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(mode: str = "healthy", **environment: str) -> Process:
        started.append(Process(tmp_path, mode, **environment))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def call_in_flight(channel: grpc.Channel, process: Process, text: str) -> Any:
    call: Any = channel.unary_unary(
        "/test.Echo/unary_unary",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )
    future = call.future(StringValue(value=text), timeout=20)
    wait_until(process.entered_file.exists)
    return future


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_call_in_flight_end(start_process: Callable[..., Process], number: signal.Signals) -> None:
    process = start_process()
    with connect(process.address()) as channel:
        future = call_in_flight(channel, process, "slow")
        process.process.send_signal(number)
        assert future.result().value == "slow answered"
    code, err = process.end()
    assert code == 0
    assert not process.address_file.exists()
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["serving", "stopped"]


def test_a_call_that_does_not_end_is_cut_after_the_grace_period(start_process: Callable[..., Process]) -> None:
    process = start_process(LLMPILOT_SHUTDOWN_GRACE_SECONDS="0.1")
    with connect(process.address()) as channel:
        future = call_in_flight(channel, process, "stuck")
        process.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            future.result()
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    code, err = process.end()
    assert code == 0
    assert "Traceback" not in err


def test_a_process_whose_background_work_fails_exits_with_one_line(start_process: Callable[..., Process]) -> None:
    code, err = start_process("failing").end()
    assert code == 1
    assert err.splitlines()[-1] == "error: the store is gone: mount it again"
    assert "Traceback" not in err


def test_a_process_with_bad_settings_exits_2_with_a_line_each(start_process: Callable[..., Process]) -> None:
    code, err = start_process(LLMPILOT_LISTEN="x", LLMPILOT_LOG_LEVEL="y").end()
    assert code == 2
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["error", "LLMPILOT_LISTEN"],
        ["error", "LLMPILOT_LOG_LEVEL"],
    ]


def test_the_background_is_there_until_what_finishes_is_over(tmp_path: Path) -> None:
    async def check() -> list[str]:
        said: list[str] = []
        stop = asyncio.Event()

        async def background() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                said.append("background ends")

        async def finish() -> None:
            said.append("finishing")
            await asyncio.sleep(0.05)
            said.append("finished")

        settings = ServiceSettings(listen="127.0.0.1:0", address_file=tmp_path / "address.json")
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(settings, registrations=[], background=[background], finishing=[finish], stop=stop))
            while not (tmp_path / "address.json").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert said == []
            stop.set()
        return said

    assert asyncio.run(check()) == ["finishing", "finished", "background ends"]
