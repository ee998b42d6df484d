"""TGI's endpoints over real sockets. Expected shapes: router/src/{lib,server,validation}.rs of TGI."""

import json
from typing import Any

import pytest

from llmpilot_perfmodel.batching.policies import TgiPolicy, TgisPolicy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.settings import ModelledTimes

STREAM = "/generate_stream"
WHOLE = "/generate"


def ask(inputs: object = "a b c", **parameters: object) -> dict[str, object]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 5, "seed": 3} | parameters}


def test_a_stream_has_one_event_per_token_and_the_text_in_the_last_one(simulator: Any) -> None:
    reply = simulator.send(STREAM, ask(details=True))

    events = list(map(json.loads, reply.events))
    assert reply.headers["content-type"] == "text/event-stream"
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events)
    details = events[-1]["details"]
    assert details["generated_tokens"] == len(events) <= 5
    assert details["finish_reason"] in {"length", "eos_token"}
    assert (details["finish_reason"] == "length") == (len(events) == 5)
    assert details["input_length"] > 0
    assert details["seed"] == 3
    assert set(events[0]["token"]) == {"id", "text", "logprob", "special"}


def test_details_come_only_when_asked_for(simulator: Any) -> None:
    assert json.loads(simulator.send(STREAM, ask()).events[-1])["details"] is None
    assert "details" not in simulator.send(WHOLE, ask()).json()


def test_a_whole_reply_says_what_the_stream_says(simulator: Any) -> None:
    last = json.loads(simulator.send(STREAM, ask(details=True)).events[-1])

    whole = simulator.send(WHOLE, ask(details=True)).json()

    assert whole["generated_text"] == last["generated_text"]
    assert whole["details"]["generated_tokens"] == last["details"]["generated_tokens"]
    assert "".join(token["text"] for token in whole["details"]["tokens"]) == last["generated_text"]


def test_the_full_text_has_the_prompt_before_it(simulator: Any) -> None:
    plain = simulator.send(WHOLE, ask()).json()["generated_text"]

    assert simulator.send(WHOLE, ask(return_full_text=True)).json()["generated_text"] == "a b c" + plain


def test_the_root_answers_with_a_list_or_a_stream(simulator: Any) -> None:
    (whole,) = simulator.send("/", ask()).json()
    events = simulator.send("/", ask() | {"stream": True}).events

    assert whole["generated_text"] == json.loads(events[-1])["generated_text"]


def test_a_truncated_prompt_has_the_length_asked_for(simulator: Any) -> None:
    reply = simulator.send(STREAM, ask("a b c d e f g h i j k", truncate=4, details=True))

    assert json.loads(reply.events[-1])["details"]["input_length"] == 4


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 999. Given: 0"),
    ],
)
def test_a_wrong_parameter_is_a_422_in_tgis_words(simulator: Any, parameters: dict[str, object], message: str) -> None:
    reply = simulator.send(WHOLE, ask(**parameters))

    assert reply.status == 422
    assert reply.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}


def test_everything_wrong_is_said_at_once(simulator: Any) -> None:
    reply = simulator.send(WHOLE, ask("", temperature=0))

    assert reply.json()["error"] == (
        "Input validation error: `temperature` must be strictly positive; `inputs` cannot be empty"
    )


def test_a_prompt_beyond_the_context_gets_tgis_words_with_the_numbers(simulator: Any) -> None:
    reply = simulator.send(WHOLE, ask("a", max_new_tokens=2000))

    assert reply.status == 422
    error = reply.json()["error"]
    assert error.startswith("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1000. Given: ")
    assert error.endswith(" `inputs` tokens and 2000 `max_new_tokens`")


def test_a_stream_that_is_refused_is_an_event_inside_a_200(simulator: Any) -> None:
    """TGI has sent the head of the response before it looks at the parameters."""
    reply = simulator.send(STREAM, ask(temperature=0))

    (event,) = reply.events
    assert reply.status == 200
    assert json.loads(event) == {
        "error": "Input validation error: `temperature` must be strictly positive",
        "error_type": "validation",
    }


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "Invalid JSON"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": 5}', "inputs: Input should be a valid string"),
        (b'{"inputs": "a", "parameters": {"max_new_tokens": "many"}}', "parameters.max_new_tokens"),
        (b'{"inputs": "a", "parameters": {"best_of": 2}}', "parameters.best_of: is not simulated; leave it out"),
        (b'{"inputs": "a", "parameters": {"seed": -1}}', "parameters.seed"),
    ],
)
@pytest.mark.parametrize("path", [WHOLE, STREAM, "/"])
def test_a_body_of_another_shape_is_a_422_that_says_why(simulator: Any, path: str, body: bytes, complaint: str) -> None:
    reply = simulator.send(path, body)

    assert reply.status == 422
    assert complaint in reply.json()["error"]
    assert reply.json()["error_type"] == "validation"


def test_info_says_that_the_server_is_simulated(simulator: Any) -> None:
    info = simulator.send("/info").json()

    assert info["model_id"] == "llama-test-simulated"
    assert info["model_device_type"] == "simulated"
    assert info["simulated"] is True
    assert info["max_total_tokens"] == 1000


def test_info_has_the_limits_of_the_batch_where_it_is_tgis(start_simulator: Any) -> None:
    """Under the names of TGI's router, which does not tell its prefill limit; another server's are not TGI's."""
    constants = StepConstants(
        decode_seconds=0.001,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=0.001,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    )
    policy = TgiPolicy(max_batch_total_tokens=4810, max_batch_prefill_tokens=2048, max_batch_size=16)
    with start_simulator(times=ModelledTimes(policy=policy, tables=constants.tables())) as client:
        info = client.send("/info").json()
    assert (info["max_batch_total_tokens"], info["max_batch_size"]) == (4810, 16)
    assert (info["max_waiting_tokens"], info["waiting_served_ratio"]) == (20, 0.3)
    with start_simulator(
        times=ModelledTimes(policy=TgisPolicy(max_batch_weight=4810), tables=constants.tables())
    ) as client:
        assert "max_batch_total_tokens" not in client.send("/info").json()
