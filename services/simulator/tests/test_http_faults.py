"""Injected faults, as clients see them over real sockets."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from llmpilot_perfmodel.batching.policies import Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.faults import Faults, ServerFaults
from llmpilot_simulator.settings import FixedTimes, ModelledTimes
from llmpilot_simulator.write_log import read_write_log

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
STREAM_OF_6 = {"prompt": "a b c", "stream": True, "max_tokens": 6, "ignore_eos": True}
CHAT_OF_3 = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 3, "ignore_eos": True}
TIMEOUT_SECONDS = 30

STEPS = StepConstants(
    decode_seconds=0.002,
    decode_seconds_per_sequence=0,
    decode_seconds_per_cached_token=0,
    prefill_seconds=0.002,
    prefill_seconds_per_token=0,
    prefill_seconds_per_request=0,
).tables()


def fault(text: str) -> dict[str, str]:
    return {"x-simulate-fault": text}


def texts(events: list[str]) -> list[str]:
    return [json.loads(event)["choices"][0]["text"] for event in events if event != "[DONE]"]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/generate_stream"])
def test_a_rejected_request_is_told_when_to_come_again(simulator: Any, path: str, status: int) -> None:
    reply = simulator.send(path, {"anything": "goes"}, fault(f"reject={status}"))

    assert reply.status == status
    assert reply.headers["retry-after"] == "1"
    assert reply.headers["x-llm-pilot-simulated"] == "true"
    assert "error" in reply.json()


def test_an_overloaded_tgi_says_so_in_its_own_words(simulator: Any) -> None:
    reply = simulator.send("/generate", {"inputs": "a"}, fault("reject=429"))

    assert reply.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


def test_a_bad_fault_header_is_refused_in_the_dialect_of_the_endpoint(simulator: Any) -> None:
    as_openai = simulator.send(COMPLETIONS, STREAM_OF_6, fault("explode=1"))
    as_tgi = simulator.send("/generate", {"inputs": "a"}, fault("explode=1"))

    assert (as_openai.status, as_tgi.status) == (400, 422)
    assert "'explode' is none of" in as_openai.json()["error"]["message"]
    assert "'explode' is none of" in as_tgi.json()["error"]


def read_to_the_end(client: Any, path: str, body: object, header: str) -> bytes:
    """Send a request and return all bytes up to the end of the connection, clean or not."""
    with client.connect() as connection:
        client.ask(connection, path, body, f"x-simulate-fault: {header}\r\n")
        received = b""
        while True:
            try:
                part = connection.recv(65536)
            except ConnectionResetError:
                return received + b"<reset>"
            if not part:
                return received
            received += part


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_dropped_stream_ends_after_exactly_so_many_tokens(simulator: Any, count: int) -> None:
    received = read_to_the_end(simulator, COMPLETIONS, STREAM_OF_6, f"drop-after={count}")

    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.count(b"data: ") == count
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")


def test_a_reset_stream_ends_with_a_tcp_reset(simulator: Any) -> None:
    received = read_to_the_end(simulator, COMPLETIONS, STREAM_OF_6, "reset-after=2")

    assert received.endswith(b"<reset>")


def test_a_drop_after_the_last_token_is_none(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, STREAM_OF_6, fault("drop-after=6"))

    assert reply.events[-1] == "[DONE]"


def test_a_whole_reply_that_is_dropped_never_comes(simulator: Any) -> None:
    assert read_to_the_end(simulator, COMPLETIONS, STREAM_OF_6 | {"stream": False}, "drop-after=2") == b""


def test_a_client_of_the_standard_library_sees_an_incomplete_read(simulator: Any) -> None:
    with pytest.raises(http.client.IncompleteRead):
        simulator.send(COMPLETIONS, STREAM_OF_6, fault("drop-after=3"))


def test_a_dropped_request_leaves_the_batch(simulator: Any, eventually: Any) -> None:
    body = STREAM_OF_6 | {"n": 3, "max_tokens": 900}
    read_to_the_end(simulator, COMPLETIONS, body, "drop-after=1")

    eventually(lambda: simulator.application.service.server.open_count == 0)


def test_out_of_memory_in_a_stream_is_an_error_event(simulator: Any) -> None:
    *tokens, error, done = simulator.send(COMPLETIONS, STREAM_OF_6, fault("out-of-memory-after=2")).events

    assert len(tokens) == 2
    assert done == "[DONE]"
    body = json.loads(error)["error"]
    assert body["type"] == "InternalServerError"
    assert body["code"] == 500
    assert "out of memory" in body["message"]


def test_out_of_memory_in_a_whole_reply_is_a_500(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, STREAM_OF_6 | {"stream": False}, fault("out-of-memory-after=0"))

    assert reply.status == 500
    assert "out of memory" in reply.json()["error"]["message"]


def test_out_of_memory_at_tgi_is_a_generation_error(simulator: Any) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 5}}

    whole = simulator.send("/generate", body, fault("out-of-memory-after=0"))
    (event,) = simulator.send("/generate_stream", body, fault("out-of-memory-after=0")).events

    assert whole.status == 424
    assert whole.json() == json.loads(event)
    assert whole.json()["error"].startswith("Request failed during generation: Server error: CUDA out of memory")
    assert whole.json()["error_type"] == "generation"


def test_a_batch_beyond_the_memory_fails_as_a_gpu_does(start_simulator: Any) -> None:
    """The prompt of 40 tokens does not fit 20; the next request, of 3, does."""
    policy = Vllm1Policy(block_count=64, enable_prefix_caching=False)
    with start_simulator(times=ModelledTimes(policy=policy, tables=STEPS, out_of_memory_tokens=20)) as client:
        too_large = client.send(COMPLETIONS, STREAM_OF_6 | {"prompt": [1] * 40})
        small = client.send(COMPLETIONS, STREAM_OF_6 | {"prompt": [1] * 3})

    error, done = too_large.events
    assert too_large.status == 200
    assert "out of memory" in json.loads(error)["error"]["message"]
    assert done == "[DONE]"
    assert len(texts(small.events)) == 6


def test_a_request_that_the_scheduler_can_never_take_is_refused_with_the_numbers(start_simulator: Any) -> None:
    policy = Vllm1Policy(block_count=4, block_size=16, enable_prefix_caching=False)
    with start_simulator(times=ModelledTimes(policy=policy, tables=STEPS)) as client:
        reply = client.send(COMPLETIONS, STREAM_OF_6 | {"prompt": [1] * 100})
        as_tgi = client.send("/generate", {"inputs": "a " * 300, "parameters": {"max_new_tokens": 5}})

    assert reply.status == 400
    assert "need 7 blocks of 16 tokens, the server has 4" in reply.json()["error"]["message"]
    assert as_tgi.status == 422
    assert as_tgi.json()["error_type"] == "validation"


def test_several_tokens_share_a_chunk_but_the_first_leaves_alone(start_simulator: Any, tmp_path: Path) -> None:
    log = tmp_path / "writes"
    with start_simulator(write_log=log) as client:
        plain = client.send(COMPLETIONS, STREAM_OF_6 | {"seed": 1, "max_tokens": 8})
        grouped = client.send(
            COMPLETIONS, STREAM_OF_6 | {"seed": 1, "max_tokens": 8}, fault("stream-interval=3") | {"x-request-id": "g"}
        )

    assert len(texts(grouped.events)) == 4
    assert "".join(texts(grouped.events)) == "".join(texts(plain.events))
    writes = read_write_log(log)
    rows = writes.of("g")
    assert writes.chunk_tokens[rows].tolist() == [1, 3, 3, 3, 3, 3, 3, 1]
    assert len(set(writes.written_nanos[rows].tolist())) == 4
    assert (writes.lateness_nanos[rows] >= 0).all()


def test_tgi_keeps_one_event_per_token_in_a_shared_chunk(simulator: Any) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 5, "seed": 3}}

    plain = simulator.send("/generate_stream", body)
    grouped = simulator.send("/generate_stream", body, fault("stream-interval=4"))

    assert grouped.events == plain.events


def test_every_third_token_has_no_text_and_none_is_lost(simulator: Any) -> None:
    body = STREAM_OF_6 | {"seed": 1, "max_tokens": 7}
    plain = texts(simulator.send(COMPLETIONS, body).events)

    held = texts(simulator.send(COMPLETIONS, body, fault("empty-every=3")).events)

    assert [text == "" for text in held] == [False, False, True, False, False, True, False]
    assert "".join(held) == "".join(plain)


def test_the_role_chunk_can_be_left_out(simulator: Any) -> None:
    events = simulator.send(CHAT, CHAT_OF_3, fault("role-chunk=off")).events

    assert len(events) == 3 + len(["[DONE]"])
    assert "role" not in json.loads(events[0])["choices"][0]["delta"]


def test_the_role_chunk_can_come_before_the_first_token(start_simulator: Any) -> None:
    """The first token is an hour away: whoever takes the role chunk for it measures nonsense."""
    with (
        start_simulator(times=FixedTimes(ttft_seconds=3600, itl_seconds=1), shutdown_grace_seconds=0) as client,
        client.connect() as connection,
    ):
        client.ask(connection, CHAT, CHAT_OF_3, "x-simulate-fault: role-chunk=early\r\n")
        received = b""
        while b'"role":"assistant"' not in received:
            received += connection.recv(65536)

    assert received.count(b"data: ") == 1


def test_faults_of_the_settings_hold_for_every_request(start_simulator: Any) -> None:
    faults = ServerFaults(each_request=Faults(stream_interval=5))
    with start_simulator(faults=faults) as client:
        assert len(texts(client.send(COMPLETIONS, STREAM_OF_6).events)) == 2
        assert len(texts(client.send(COMPLETIONS, STREAM_OF_6, fault("stream-interval=1")).events)) == 6


def test_a_slow_start_answers_503_to_health_and_requests(start_simulator: Any) -> None:
    with start_simulator(faults=ServerFaults(slow_start_seconds=3600)) as client:
        health = client.send("/health")
        reply = client.send(COMPLETIONS, STREAM_OF_6)

    assert health.status == 503
    assert health.headers["retry-after"] == "1"
    assert health.json() == {"status": "starting", "simulated": True}
    assert reply.status == 503


def test_requests_are_rejected_while_others_wait(start_simulator: Any, eventually: Any) -> None:
    """One sequence at a time; steps of an hour: the second request waits, so the third is one too many."""
    hour = StepConstants(
        decode_seconds=3600,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=3600,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    ).tables()
    times = ModelledTimes(policy=Vllm1Policy(block_count=64, max_num_seqs=1), tables=hour)
    faults = ServerFaults(reject_above_waiting=0)
    with start_simulator(times=times, faults=faults, shutdown_grace_seconds=0) as client:
        load = client.application.service.server.load
        with client.connect() as first, client.connect() as second:
            client.ask(first, COMPLETIONS, STREAM_OF_6)
            eventually(lambda: load.running_count == 1)
            client.ask(second, COMPLETIONS, STREAM_OF_6)
            eventually(lambda: load.waiting_count == 1)
            assert client.send(COMPLETIONS, STREAM_OF_6).status == 429
            assert client.metric("llmpilot:rejected_requests_total") == 1


def test_a_reset_connection_is_not_mistaken_for_an_error_of_the_server(simulator: Any) -> None:
    """A client that resets in the middle of its request body."""
    with simulator.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    assert simulator.send("/health").status == 200
