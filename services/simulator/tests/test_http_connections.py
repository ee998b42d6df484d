"""Clients that leave, do not read, or only keep a connection open; and the end of the server."""

import asyncio
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.batching.policies import Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.settings import FixedTimes, ModelledTimes
from llmpilot_simulator.write_log import read_write_log

COMPLETIONS = "/v1/completions"
LONG_STREAM = {"prompt": "a b c", "stream": True, "max_tokens": 900, "ignore_eos": True}
TICK_STEPS = StepConstants(
    decode_seconds=0.005,
    decode_seconds_per_sequence=0,
    decode_seconds_per_cached_token=0,
    prefill_seconds=0.005,
    prefill_seconds_per_token=0,
    prefill_seconds_per_request=0,
).tables()
ONE_AT_A_TIME = ModelledTimes(
    policy=Vllm1Policy(block_count=64, max_num_seqs=1, enable_prefix_caching=False), tables=TICK_STEPS
)
IDLE_CONNECTIONS = 10_000
LEAST_IDLE_CONNECTIONS = 5_000
SPARE_FILES = 500


def receive_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


def leave_by_closing(connection: socket.socket) -> None:
    connection.close()


def leave_by_reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_reset])
def test_a_client_that_leaves_in_the_middle_frees_its_place_at_once(
    start_simulator: Any, eventually: Any, leave: Any
) -> None:
    """One sequence at a time: the second client is served only because the first one's place is free."""
    with start_simulator(times=ONE_AT_A_TIME) as client:
        first = client.connect()
        client.ask(first, COMPLETIONS, LONG_STREAM)
        receive_until(first, b"data: ")
        leave(first)
        second = client.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 3})

        server = client.application.service.server
        assert second.events[-1] == "[DONE]"
        eventually(lambda: server.open_count == 0)
        assert client.metric('vllm:request_success_total{engine="0",finished_reason="abort"') == 1
        assert client.metric("vllm:num_requests_running") == 0
        assert client.metric("vllm:kv_cache_usage_perc") == 0


def test_a_client_that_leaves_while_it_waits_is_forgotten(start_simulator: Any, eventually: Any) -> None:
    with start_simulator(times=ONE_AT_A_TIME) as client, client.connect() as first:
        load = client.application.service.server.load
        client.ask(first, COMPLETIONS, LONG_STREAM)
        eventually(lambda: load.running_count == 1)
        second = client.connect()
        client.ask(second, COMPLETIONS, LONG_STREAM)
        eventually(lambda: load.waiting_count == 1)
        second.close()
        eventually(lambda: load.waiting_count == 0)
        assert load.running_count == 1


def test_a_client_that_leaves_before_a_whole_reply_frees_its_place(start_simulator: Any, eventually: Any) -> None:
    with start_simulator(times=ONE_AT_A_TIME) as client:
        connection = client.connect()
        client.ask(connection, COMPLETIONS, LONG_STREAM | {"stream": False, "n": 3})
        server = client.application.service.server
        eventually(lambda: server.open_count == 3)
        connection.close()
        eventually(lambda: server.open_count == 0)


def test_a_client_that_leaves_before_the_reply_begins_is_no_error(
    start_simulator: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Some of many clients that reset at once are gone when the server would send the head of its reply."""
    with start_simulator() as client:
        for _ in range(100):
            connection = client.connect()
            client.ask(connection, COMPLETIONS, LONG_STREAM)
            leave_by_reset(connection)
        server = client.application.service.server
        eventually(lambda: server.open_count == 0)
        assert client.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 3}).events[-1] == "[DONE]"
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_connection_serves_one_stream_after_the_other(simulator: Any) -> None:
    with simulator.connect() as connection:
        for _ in range(3):
            simulator.ask(connection, COMPLETIONS, LONG_STREAM | {"max_tokens": 3})
            assert receive_until(connection, b"\r\n0\r\n\r\n").count(b"data: ") == 4


def test_a_client_of_http_1_0_gets_plain_events_and_the_end_of_the_connection(simulator: Any) -> None:
    content = json.dumps(LONG_STREAM | {"max_tokens": 2}).encode()
    with simulator.connect() as connection:
        request = f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(request.encode() + content)
        received = b""
        while part := connection.recv(65536):
            received += part

    head, _, body = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_client_of_curls_habits_is_told_to_continue(simulator: Any) -> None:
    """The command curl asks before it sends a large body."""
    content = json.dumps(LONG_STREAM | {"max_tokens": 1, "prompt": "a " * 900}).encode()
    with simulator.connect() as connection:
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert receive_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sendall(content)
        assert b"[DONE]" in receive_until(connection, b"[DONE]")


def test_a_client_keeps_its_own_request_id(simulator: Any) -> None:
    given = simulator.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 1}, {"x-request-id": "mine-1"})
    strange = simulator.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 1}, {"x-request-id": "x" * 5000})
    refused = simulator.send(COMPLETIONS, {}, {"x-request-id": "mine-2"})

    assert given.headers["x-request-id"] == "mine-1"
    assert json.loads(given.events[0])["id"] == "cmpl-mine-1"
    assert len(strange.headers["x-request-id"]) == 32
    assert refused.headers["x-request-id"] == "mine-2"


SMALL_BUFFER_BYTES = 4096
MANY_CHOICES = {
    "prompt": "a b c",
    "n": 128,
    "max_tokens": 900,
    "seed": 1,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
"""Replies of many lengths, whose frames, some 10 MB, do not fit the kernel's buffers on both sides."""
AT_ONCE = FixedTimes(ttft_seconds=0, itl_seconds=0.0001)


def test_a_slow_reader_delays_itself_alone_and_loses_nothing(start_simulator: Any, tmp_path: Path) -> None:
    """Its tokens wait as numbers; when it reads again they arrive, many in a chunk."""
    log = tmp_path / "writes"
    with start_simulator(times=AT_ONCE, write_log=log) as client:
        whole = client.send(COMPLETIONS, MANY_CHOICES | {"stream": False, "stream_options": None}).json()
        token_count = whole["usage"]["completion_tokens"]
        statistics = client.application.service.server.statistics
        with client.connect(receive_bytes=SMALL_BUFFER_BYTES) as connection:
            client.ask(connection, COMPLETIONS, MANY_CHOICES, "x-request-id: slow\r\n")
            while statistics.generation_tokens < 2 * token_count:  # those of quick readers are more than the margin
                quick = client.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 1})
                assert quick.events[-1] == "[DONE]"
            assert statistics.slow_reader_pauses >= 1
            received = receive_until(connection, b"[DONE]").decode()

    events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    for choice in whole["choices"]:
        own = [each for each in choices if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    assert events[-1]["usage"] == whole["usage"]
    writes = read_write_log(log)
    rows = np.isin(writes.reply, [i for i, name in enumerate(writes.request_ids) if name == "slow"])
    assert rows.sum() == token_count
    assert writes.chunk_tokens[rows].max() > 1


def test_a_client_that_never_reads_is_disconnected(start_simulator: Any, eventually: Any) -> None:
    with start_simulator(times=AT_ONCE, slow_reader_seconds=0.05) as client:
        server = client.application.service.server
        with client.connect(receive_bytes=SMALL_BUFFER_BYTES) as connection:
            client.ask(connection, COMPLETIONS, MANY_CHOICES)
            eventually(lambda: server.statistics.slow_reader_drops == 1)
            eventually(lambda: server.open_count == 0)


@pytest.fixture
def idle_connection_count() -> Iterator[int]:
    """As many connections as the limits of this machine allow; both ends of each are files of this process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    count = min(IDLE_CONNECTIONS, (limits[1] - SPARE_FILES) // 2)
    if count < LEAST_IDLE_CONNECTIONS:
        pytest.skip(f"only {limits[1]} files may be open here")
    yield count
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_thousands_of_idle_connections_do_not_keep_others_from_being_served(
    simulator: Any, idle_connection_count: int
) -> None:
    idle = [simulator.connect() for _ in range(idle_connection_count)]
    try:
        assert simulator.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 3}).events[-1] == "[DONE]"
        simulator.ask(idle[-1], COMPLETIONS, LONG_STREAM | {"max_tokens": 3})
        assert receive_until(idle[-1], b"[DONE]").startswith(b"HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()


def test_health_version_and_every_answer_say_that_the_server_is_simulated(simulator: Any) -> None:
    health = simulator.send("/health")

    assert health.status == 200
    assert health.json() == {"status": "ok", "simulated": True}
    assert simulator.send("/version").json()["simulated"] is True
    for path in ("/health", "/version", "/metrics", "/info", "/v1/models", "/nowhere"):
        assert simulator.send(path).headers["x-llm-pilot-simulated"] == "true"
    assert simulator.send("/nowhere").status == 404
    assert simulator.send(COMPLETIONS, method="GET").status == 405


@pytest.mark.parametrize("path", [COMPLETIONS, "/generate"])
def test_a_body_larger_than_any_prompt_that_fits_is_refused(simulator: Any, path: str) -> None:
    reply = simulator.send(path, b" " * 2_000_001)
    assert reply.status == 413
    assert "send a shorter prompt" in reply.text
    assert "x-request-id" in reply.headers


@pytest.mark.parametrize("path", [COMPLETIONS, "/generate"])
def test_a_body_in_a_broken_encoding_is_the_clients_error(
    simulator: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = simulator.send(path, b"abc", {"Content-Encoding": "gzip"})
    assert reply.status == 400
    assert "Content-Encoding" in reply.text
    assert not caplog.records


def test_a_long_prompt_is_counted_as_a_short_one_is(simulator: Any) -> None:
    reply = simulator.send("/generate", {"inputs": "word " * 10_000, "parameters": {"max_new_tokens": 1}})
    assert reply.status == 422
    assert "10001 `inputs` tokens" in reply.text


def test_metrics_count_what_was_served(start_simulator: Any) -> None:
    """Three tokens of prompt; TTFT 20 ms; 4 tokens, so three gaps of 10 ms; 50 ms in all."""
    with start_simulator(times=FixedTimes(ttft_seconds=0.020, itl_seconds=0.010)) as client:
        client.send(COMPLETIONS, LONG_STREAM | {"prompt": [1, 2, 3], "max_tokens": 4})

        assert client.metric("vllm:prompt_tokens_total") == 3
        assert client.metric("vllm:generation_tokens_total") == 4
        assert client.metric("vllm:time_to_first_token_seconds_sum") == pytest.approx(0.020)
        assert client.metric("vllm:inter_token_latency_seconds_count") == 3
        assert client.metric("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.030)
        assert client.metric("vllm:e2e_request_latency_seconds_sum") == pytest.approx(0.050)
        assert client.metric('vllm:request_success_total{engine="0",finished_reason="length"') == 1


def test_a_stopping_server_lets_streams_end_and_takes_nothing_new(
    start_simulator: Any, eventually: Any, tmp_path: Path
) -> None:
    """A stream of half a second; a connection opened before sends its request after the order to stop."""
    log = tmp_path / "writes"
    times = FixedTimes(ttft_seconds=0.05, itl_seconds=0.05)
    with start_simulator(times=times, write_log=log, shutdown_grace_seconds=20) as client:
        with client.connect() as running, client.connect() as late:
            client.ask(running, COMPLETIONS, LONG_STREAM | {"max_tokens": 10}, "x-request-id: last\r\n")
            receive_until(running, b"data: ")
            stopping = threading.Thread(target=client.stop)
            stopping.start()
            gate = client.application.service.gate
            eventually(lambda: not gate.is_ready(time.monotonic()))
            client.ask(late, COMPLETIONS, LONG_STREAM)
            assert receive_until(late, b"\r\n\r\n").startswith(b"HTTP/1.1 503")
            assert b"[DONE]" in receive_until(running, b"[DONE]")
            stopping.join()
        with pytest.raises(ConnectionRefusedError):
            client.connect()

    writes = read_write_log(log)
    assert writes.token_index[writes.of("last")].tolist() == list(range(10))


def test_a_stream_that_outlasts_the_grace_period_is_cut(start_simulator: Any) -> None:
    times = FixedTimes(ttft_seconds=0, itl_seconds=3600)
    with (
        start_simulator(times=times, shutdown_grace_seconds=0.01) as client,
        client.connect() as connection,
    ):
        client.ask(connection, COMPLETIONS, LONG_STREAM)
        receive_until(connection, b"data: ")
        client.stop()
        while connection.recv(65536):
            pass


def test_an_address_that_is_taken_is_an_error_that_says_so(
    simulator: Any, start_simulator: Any, tmp_path: Path
) -> None:
    with (
        pytest.raises(PreconditionError, match="choose another address"),
        start_simulator(http_address=simulator.addresses.http, write_log=tmp_path / "writes"),
    ):
        pass


def test_the_server_runs_on_the_loops_own_timers_too(start_simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no timerfd."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with start_simulator() as client:
        assert client.send(COMPLETIONS, LONG_STREAM | {"max_tokens": 20}).events[-1] == "[DONE]"


def test_a_thousand_requests_at_once_are_all_served(simulator: Any) -> None:
    """Whole replies and streams of two choices, over a hundred connections."""

    async def ask(gate: asyncio.Semaphore, number: int) -> bytes:
        async with gate:
            reader, writer = await asyncio.open_connection(*simulator.peer)
            content = json.dumps(
                {"prompt": [1, 2], "max_tokens": 3, "ignore_eos": True, "n": 2, "stream": bool(number % 2)}
            )
            head = (
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            writer.write((head + content).encode())
            received = await reader.read()
            writer.close()
            await writer.wait_closed()
            return received

    async def ask_all() -> list[bytes]:
        gate = asyncio.Semaphore(100)
        async with asyncio.timeout(60):
            return await asyncio.gather(*(ask(gate, number) for number in range(1000)))

    replies = asyncio.run(ask_all())

    assert all(reply.startswith(b"HTTP/1.1 200") for reply in replies)
    assert all(reply.count(b'"finish_reason":"length"') == 2 for reply in replies[1::2])
    assert all(b'"completion_tokens": 6' in reply for reply in replies[::2])
