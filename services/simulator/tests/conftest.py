import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import hypothesis
import pytest

from llmpilot_simulator.app import Addresses, Application, build
from llmpilot_simulator.settings import FixedTimes, SimulatorSettings

DEADLINE_SECONDS = 30
POLL_SECONDS = 0.005

hypothesis.settings.register_profile("any-machine", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("any-machine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    text: str

    def json(self) -> object:
        """The body, which is JSON."""
        return json.loads(self.text)

    @property
    def events(self) -> list[str]:
        """The data of the server-sent events of the body."""
        assert self.text.endswith("\n\n")
        lines = self.text.removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data:") for line in lines), self.text
        return [line.removeprefix("data:").strip() for line in lines]


class Client:
    """Speaks HTTP to the server, one connection per request."""

    def __init__(self, application: Application, loop: asyncio.AbstractEventLoop, addresses: Addresses) -> None:
        self.application = application
        self.addresses = addresses
        host, _, port = addresses.http.rpartition(":")
        self.peer = host, int(port)
        self._loop = loop

    def send(
        self, path: str, body: object = None, headers: Mapping[str, str] | None = None, *, method: str | None = None
    ) -> Reply:
        """Send a request and read the response. body: JSON, or bytes as they are; None: a GET."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(*self.peer, timeout=DEADLINE_SECONDS)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers or {}))
            response = connection.getresponse()
            return Reply(
                status=response.status,
                headers={name.lower(): value for name, value in response.getheaders()},
                text=response.read().decode(),
            )
        finally:
            connection.close()

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """Open a bare connection. receive_bytes: a small buffer makes a slow reader."""
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(DEADLINE_SECONDS)
        try:
            connection.connect(self.peer)
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, connection: socket.socket, path: str, body: object, headers: str = "") -> None:
        """Send a request over a bare connection. headers: lines that end in CRLF."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)

    def metric(self, name: str) -> float:
        """Read one number of /metrics; labels are those that the name carries, or any."""
        lines = [line for line in self.send("/metrics").text.splitlines() if line.startswith(name)]
        assert len(lines) == 1, (name, lines)
        return float(lines[0].rpartition(" ")[2])

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        asyncio.run_coroutine_threadsafe(self.application.stop(), self._loop).result(DEADLINE_SECONDS)


StartSimulator = Callable[..., AbstractContextManager[Client]]
Eventually = Callable[[Callable[[], bool]], None]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(POLL_SECONDS)


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    """Waits until a condition holds."""
    return _wait


DEFAULT = SimulatorSettings(
    model_id="llama-test",
    context_length=1000,
    times=FixedTimes(ttft_seconds=0.005, itl_seconds=0.001),
    http_address="127.0.0.1:0",
    grpc_address=None,
    shutdown_grace_seconds=1,
)


@pytest.fixture(scope="session")
def start_simulator() -> StartSimulator:
    """Runs a server with these changes of the default settings in a thread; gives its client while it serves."""

    @contextmanager
    def start(**changes: object) -> Iterator[Client]:
        application = build(replace(DEFAULT, **changes))  # type: ignore[arg-type]
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            addresses = asyncio.run_coroutine_threadsafe(application.start(), loop).result(DEADLINE_SECONDS)
            client = Client(application, loop, addresses)
            try:
                yield client
            finally:
                client.stop()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(DEADLINE_SECONDS)
            loop.close()

    return start


@pytest.fixture(scope="module")
def simulator(start_simulator: StartSimulator) -> Iterator[Client]:
    """The client of a server with the default settings."""
    with start_simulator() as client:
        yield client
