"""The server as a process of its own."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_simulator.write_log import read_write_log

DEADLINE_SECONDS = 60
StartSimulator = Callable[..., AbstractContextManager[Any]]

SERVE = """
import asyncio, sys
from pathlib import Path
from llmpilot_simulator.app import build, run
from llmpilot_simulator.settings import FixedTimes, SimulatorSettings

settings = SimulatorSettings(
    model_id="m",
    context_length=1000,
    times=FixedTimes(ttft_seconds=0.01, itl_seconds=0.03),
    http_address="127.0.0.1:0",
    grpc_address=None,
    write_log=Path(sys.argv[1]),
    shutdown_grace_seconds=30,
)
asyncio.run(run(build(settings), ready=lambda addresses: print(addresses.http, flush=True)))
"""


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_lets_its_streams_end_and_writes_its_log(tmp_path: Path, order: signal.Signals) -> None:
    log = tmp_path / "writes"
    with subprocess.Popen([sys.executable, "-c", SERVE, str(log)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            host, _, port = process.stdout.readline().strip().rpartition(":")
            with socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS) as connection:
                body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 20, "ignore_eos": True})
                head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((head + body).encode())
                received = connection.recv(65536)
                process.send_signal(order)
                while part := connection.recv(65536):
                    received += part
            printed = process.stdout.read()
            assert process.wait(DEADLINE_SECONDS) == 0
        finally:
            process.kill()

    assert received.count(b'"text"') == 20
    assert b"[DONE]" in received
    assert printed == ""
    assert read_write_log(log).token_index.tolist() == list(range(20))


def test_one_process_listens_to_http_and_grpc(start_simulator: StartSimulator) -> None:
    with start_simulator(grpc_address="127.0.0.1:0") as client:
        wait_until_serving(client.addresses.grpc, DEADLINE_SECONDS)
        assert client.send("/health").status == 200


def test_a_server_that_cannot_listen_to_grpc_leaves_nothing_behind(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    """Neither its HTTP port nor its write log stay open: a leaked one would be a warning, hence an error."""
    with start_simulator(grpc_address="127.0.0.1:0") as client:
        failing = start_simulator(grpc_address=client.addresses.grpc, write_log=tmp_path / "writes")
        with pytest.raises(PreconditionError, match="give gRPC another address"), failing:
            pass
