"""OpenAI's endpoints over real sockets. Expected shapes: what vLLM sends (its stream generators and error handlers)."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.settings import FixedTimes, ModelledTimes
from llmpilot_simulator.write_log import read_write_log

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
EXACTLY_4 = {"max_tokens": 4, "ignore_eos": True}


def chunks(reply: Any) -> list[dict[str, Any]]:
    """The JSON events of a stream that ended as it should."""
    *events, done = reply.events
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_completion_streams_one_chunk_a_token_and_says_why_it_ended(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, {"model": "llama-test", "prompt": "a b c", "stream": True, **EXACTLY_4})

    events = chunks(reply)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["transfer-encoding"] == "chunked"
    assert [event["object"] for event in events] == ["text_completion"] * 4
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert all("usage" not in event for event in events)
    assert events[0]["id"] == f"cmpl-{reply.headers['x-request-id']}"
    assert {event["model"] for event in events} == {"llama-test-simulated"}


def test_a_stream_and_a_whole_reply_say_the_same(simulator: Any) -> None:
    body = {"prompt": "a b c", "seed": 7, **EXACTLY_4}
    whole = simulator.send(COMPLETIONS, body).json()
    streamed = chunks(simulator.send(COMPLETIONS, body | {"stream": True}))

    assert "".join(event["choices"][0]["text"] for event in streamed) == whole["choices"][0]["text"]
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 4
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 4


def test_usage_comes_last_in_a_chunk_without_choices(simulator: Any) -> None:
    body = {"prompt": [5, 6, 7], "stream": True, "stream_options": {"include_usage": True}, **EXACTLY_4}

    *tokens, last = chunks(simulator.send(COMPLETIONS, body))

    assert len(tokens) == 4
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_continuous_usage_counts_the_tokens_so_far(simulator: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [5, 6, 7], "stream": True, "stream_options": options, **EXACTLY_4}

    events = chunks(simulator.send(COMPLETIONS, body))

    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 4]
    assert [event["usage"]["total_tokens"] for event in events] == [4, 5, 6, 7, 7]


def test_continuous_usage_without_usage_is_ignored(simulator: Any) -> None:
    """In vLLM it needs include_usage."""
    options = {"include_usage": False, "continuous_usage_stats": True}
    events = chunks(
        simulator.send(COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": options, **EXACTLY_4})
    )

    assert all("usage" not in event for event in events)


def test_several_prompts_and_several_choices_are_numbered_prompt_by_prompt(simulator: Any) -> None:
    body = {"prompt": [[1, 2], [3, 4, 5]], "n": 2, "stream": True, "stream_options": {}, **EXACTLY_4}

    *tokens, last = chunks(simulator.send(COMPLETIONS, body))

    counts = [sum(event["choices"][0]["index"] == index for event in tokens) for index in range(4)]
    assert counts == [4, 4, 4, 4]
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
    whole = simulator.send(COMPLETIONS, body | {"stream": False, "stream_options": None}).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"] == last["usage"]


def test_an_echoed_prompt_comes_before_the_first_token(simulator: Any) -> None:
    body = {"prompt": "a b c", "seed": 7, **EXACTLY_4}
    plain = simulator.send(COMPLETIONS, body).json()["choices"][0]["text"]

    echoed = simulator.send(COMPLETIONS, body | {"echo": True}).json()["choices"][0]["text"]
    streamed = chunks(simulator.send(COMPLETIONS, body | {"echo": True, "stream": True}))

    assert echoed == "a b c" + plain
    assert "".join(event["choices"][0]["text"] for event in streamed) == echoed
    assert len(streamed) == 4


def test_a_completion_has_16_tokens_unless_told_otherwise(simulator: Any) -> None:
    """OpenAI's and vLLM's default of max_tokens."""
    reply = simulator.send(COMPLETIONS, {"prompt": "a", "ignore_eos": True}).json()

    assert reply["usage"]["completion_tokens"] == 16


def test_a_chat_starts_with_a_chunk_that_has_only_the_role(simulator: Any) -> None:
    first, *tokens = chunks(simulator.send(CHAT, {"messages": HELLO, "stream": True, **EXACTLY_4}))

    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [list(event["choices"][0]["delta"]) for event in tokens] == [["content"]] * 4
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None, None, None, "length"]
    assert {event["object"] for event in [first, *tokens]} == {"chat.completion.chunk"}


def test_the_role_chunk_counts_no_token(simulator: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = chunks(simulator.send(CHAT, {"messages": HELLO, "stream": True, "stream_options": options, **EXACTLY_4}))

    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 4, 4]


def test_a_whole_chat_reply_is_a_message_of_the_assistant(simulator: Any) -> None:
    reply = simulator.send(CHAT, {"messages": HELLO, "max_completion_tokens": 3, "ignore_eos": True}).json()

    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["choices"][0]["message"]["content"]
    assert reply["usage"]["completion_tokens"] == 3


def test_the_newer_name_of_the_limit_wins(simulator: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 3, "ignore_eos": True}

    assert simulator.send(CHAT, body).json()["usage"]["completion_tokens"] == 3


def test_a_chat_may_fill_the_context(simulator: Any) -> None:
    reply = simulator.send(CHAT, {"messages": HELLO, "ignore_eos": True}).json()

    assert reply["usage"]["total_tokens"] == 1000


def test_message_parts_count_as_their_text(simulator: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello, who are you?"}]}]
    body = {"ignore_eos": True, "max_tokens": 1}

    as_text = simulator.send(CHAT, body | {"messages": HELLO}).json()
    as_parts = simulator.send(CHAT, body | {"messages": parts}).json()

    assert as_parts["usage"] == as_text["usage"]


def test_a_truncated_prompt_has_the_length_asked_for(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, {"prompt": [1] * 50, "truncate_prompt_tokens": 10, **EXACTLY_4}).json()

    assert reply["usage"]["prompt_tokens"] == 10


@pytest.mark.parametrize("model", ["llama-test", "llama-test-simulated", None])
def test_the_model_is_known_with_and_without_its_suffix(simulator: Any, model: str | None) -> None:
    assert simulator.send(COMPLETIONS, {"model": model, "prompt": "a", **EXACTLY_4}).status == 200


def test_another_model_is_not_found(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, {"model": "gpt-4", "prompt": "a"})

    assert reply.status == 404
    assert reply.json() == {
        "error": {
            "message": "The model `gpt-4` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }


def test_a_prompt_beyond_the_context_gets_vllms_words_with_the_numbers(simulator: Any) -> None:
    reply = simulator.send(COMPLETIONS, {"prompt": [1] * 990, "max_tokens": 20, "stream": True})

    assert reply.status == 400
    assert reply.json() == {
        "error": {
            "message": "This model's maximum context length is 1000 tokens. However, you requested 20 output tokens "
            "and your prompt contains 990 input tokens, for a total of 1010 tokens. Please reduce the length of the "
            "input prompt or the number of requested output tokens.",
            "type": "BadRequestError",
            "param": "input_tokens",
            "code": 400,
        }
    }


def test_a_prompt_that_just_fits_is_served(simulator: Any) -> None:
    assert simulator.send(COMPLETIONS, {"prompt": [1] * 990, "max_tokens": 10}).status == 200
    assert simulator.send(COMPLETIONS, {"prompt": [1] * 1000, "max_tokens": None}).status == 400


def test_everything_wrong_with_a_body_is_one_message(simulator: Any) -> None:
    reply = simulator.send(CHAT, {"messages": [{"role": "user", "content": 5}], "max_tokens": "x", "n": 0})

    assert reply.status == 400
    error = reply.json()["error"]
    assert error["type"] == "BadRequestError"
    assert "n: Input should be greater than or equal to 1" in error["message"]
    assert "messages.0.content: Input should be a valid array" in error["message"]
    assert "max_tokens: Input should be a valid integer" in error["message"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "Invalid JSON"),
        (b'{"prompt": "a"', "Invalid JSON: EOF while parsing"),
        (b"[1, 2]", "body: Input should be an object"),
        (b'{"prompt": "\xff"}', "Invalid JSON"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
        (b"{}", "prompt: Field required"),
        (b'{"prompt": []}', "prompt: must be a text"),
        (b'{"prompt": [1, "a"]}', "prompt: must be a text"),
        (b'{"prompt": [-1]}', "prompt: must be a text"),
        (b'{"prompt": [true]}', "prompt: must be a text"),
        (b'{"prompt": [99999999999999999999]}', "prompt: must be a text"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens: Input should be greater than or equal to 1"),
        (b'{"prompt": "a", "n": 1000000000}', "n: Input should be less than or equal to 128"),
        (
            b'{"n": 100, "prompt": [' + b",".join([b'"a"'] * 50) + b"]}",
            "prompt: at most 4096 choices in all, here are 5000",
        ),
        (b'{"prompt": "a", "temperature": -1}', "temperature: Input should be greater than or equal to 0"),
        (b'{"prompt": "a", "logprobs": 3}', "logprobs: is not simulated; leave it out"),
        (b'{"prompt": "a", "seed": 1e300}', "seed: "),
        (b'{"prompt": "a", "stream_options": {}}', "Stream options can only be defined when `stream=True`."),
        (
            b'{"prompt": "a", "max_tokens": 3, "min_tokens": 4}',
            "min_tokens must be less than or equal to max_tokens=3, got 4.",
        ),
    ],
)
def test_a_bad_body_is_a_400_that_says_why(simulator: Any, body: bytes, complaint: str) -> None:
    reply = simulator.send(COMPLETIONS, body)

    assert reply.status == 400
    assert complaint in reply.json()["error"]["message"]
    assert reply.headers["x-llm-pilot-simulated"] == "true"


def test_parts_other_than_text_are_refused(simulator: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://example.com"}}
    reply = simulator.send(CHAT, {"messages": [{"role": "user", "content": [image]}]})

    assert reply.status == 400
    assert "only parts of type \"text\" are simulated, this is 'image_url'" in reply.json()["error"]["message"]


def test_a_conversation_of_nothing_is_refused(simulator: Any) -> None:
    assert simulator.send(CHAT, {"messages": []}).status == 400


def test_the_models_endpoint_lists_the_model_as_simulated(simulator: Any) -> None:
    (card,) = simulator.send("/v1/models").json()["data"]

    assert card["id"] == "llama-test-simulated"
    assert card["root"] == "llama-test"
    assert card["max_model_len"] == 1000
    assert card["simulated"] is True
    assert simulator.send("/v1/models/llama-test").json() == card
    assert simulator.send("/v1/models/gpt-4").status == 404


def test_tokens_are_due_at_the_fixed_times_and_no_earlier(start_simulator: Any, tmp_path: Path) -> None:
    """TTFT 20 ms and ITL 5 ms: token i is due 20 + 5 i ms after the request was taken in."""
    log = tmp_path / "writes"
    times = FixedTimes(ttft_seconds=0.020, itl_seconds=0.005)
    with start_simulator(times=times, write_log=log) as client:
        client.send(COMPLETIONS, {"prompt": "a", "stream": True, **EXACTLY_4}, {"x-request-id": "mine"})
        client.send(COMPLETIONS, {"prompt": "a", "n": 2, **EXACTLY_4}, {"x-request-id": "whole"})

    writes = read_write_log(log)
    mine = writes.of("mine")
    assert writes.token_index[mine].tolist() == [0, 1, 2, 3]
    arrival = writes.arrival_nanos[writes.request_ids.index("mine")]
    after = (writes.due_nanos[mine] - arrival) / 1e6
    assert after == pytest.approx([20, 25, 30, 35], abs=0.2)  # the wall clock may be slewed in the meantime
    assert (writes.lateness_nanos >= 0).all()
    assert writes.chunk_tokens[mine].tolist() == [1, 1, 1, 1]
    for choice in (0, 1):  # a whole reply is written once, after its last token was due
        whole = writes.of("whole", choice)
        assert writes.token_index[whole].tolist() == [0, 1, 2, 3]
        assert len(set(writes.written_nanos[whole].tolist())) == 1
        assert writes.chunk_tokens[whole].tolist() == [4, 4, 4, 4]


def test_tokens_of_a_modelled_server_are_due_at_the_ends_of_its_steps(start_simulator: Any, tmp_path: Path) -> None:
    """A step with a prompt takes 20 ms, one without 10 ms: tokens after 20, 30, 40 and 50 ms."""
    log = tmp_path / "writes"
    constants = StepConstants(
        decode_seconds=0.010,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=0.020,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    )
    times = ModelledTimes(policy=TgisPolicy(max_batch_weight=10_000), tables=constants.tables())
    with start_simulator(times=times, write_log=log) as client:
        client.send(COMPLETIONS, {"prompt": "a", "stream": True, **EXACTLY_4})

    writes = read_write_log(log)
    after = (writes.due_nanos - writes.arrival_nanos[0]) / 1e6
    assert after == pytest.approx([20, 30, 40, 50], abs=0.2)
    assert (writes.lateness_nanos >= 0).all()


def test_tokens_due_at_once_still_follow_the_head_of_the_response(start_simulator: Any) -> None:
    with start_simulator(times=FixedTimes(ttft_seconds=0, itl_seconds=0)) as client:
        reply = client.send(COMPLETIONS, {"prompt": "a", "stream": True, "max_tokens": 300, "ignore_eos": True})

    assert reply.status == 200
    assert len(chunks(reply)) == 300
