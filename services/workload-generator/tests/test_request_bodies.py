import json

import pytest

from llmpilot_workload_generator.prompts.request_bodies import BodyWriter, Server, TgisParameters, tgis_parameters
from llmpilot_workload_generator.prompts.sampling_parameters import SamplingParameters

DEFAULTS = SamplingParameters()
GREEDY = SamplingParameters(greedy=True)
UNLIMITED = SamplingParameters(greedy=False, temperature=1.0, top_p=1.0, top_k=0)
LIMITED = SamplingParameters(greedy=False, temperature=0.7, top_p=0.73, top_k=31)
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
FIXED = {"max_tokens": 9, "min_tokens": 9, "ignore_eos": True}
AWKWARD = 'She said: "é\\n"\n\t\u2028\U0001f642'


def parsed(server: Server, sampling: SamplingParameters, *, fixed: bool = True) -> dict[str, object]:
    (body,) = BodyWriter(server, served_model='a "model"', fixed_output_length=fixed).write(["hi"], sampling, 9)
    content = json.loads(body)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (DEFAULTS, {}),
        (GREEDY, {"temperature": 0.0}),
        (UNLIMITED, {"temperature": 1.0, "top_p": 1.0, "top_k": -1}),
        (LIMITED, {"temperature": 0.7, "top_p": 0.73, "top_k": 31}),
    ],
)
def test_completions_say_what_differs_from_the_servers_defaults(
    sampling: SamplingParameters, expected: dict[str, float]
) -> None:
    content = parsed(Server.OPENAI_COMPLETIONS, sampling)
    assert content == {"model": 'a "model"', "prompt": "hi", **FIXED, **expected, **STREAM}


def test_chat_sends_the_prompt_as_the_users_message() -> None:
    content = parsed(Server.OPENAI_CHAT, GREEDY)
    messages = [{"role": "user", "content": "hi"}]
    assert content == {"model": 'a "model"', "messages": messages, **FIXED, "temperature": 0.0, **STREAM}


def test_replies_may_end_early_unless_their_length_is_fixed() -> None:
    content = parsed(Server.OPENAI_COMPLETIONS, DEFAULTS, fixed=False)
    assert content == {"model": 'a "model"', "prompt": "hi", "max_tokens": 9, **STREAM}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (DEFAULTS, {}),
        (GREEDY, {}),
        (UNLIMITED, {"do_sample": True, "temperature": 1.0}),
        (LIMITED, {"do_sample": True, "temperature": 0.7, "top_p": 0.73, "top_k": 31}),
        (SamplingParameters(top_k=5), {"do_sample": True, "top_k": 5}),
    ],
)
def test_tgi_gets_no_value_that_it_refuses(sampling: SamplingParameters, expected: dict[str, float]) -> None:
    """TGI takes top_p strictly between 0 and 1, top_k and temperature above 0 only."""
    content = parsed(Server.TGI, sampling)
    assert content == {"inputs": "hi", "parameters": {"max_new_tokens": 9, "details": True, **expected}}


def test_one_body_for_all_prompts_of_completions_and_one_for_each_elsewhere() -> None:
    prompts = ["one", "two", "three"]
    (body,) = BodyWriter(Server.OPENAI_COMPLETIONS, served_model="m").write(prompts, DEFAULTS, 9)
    assert json.loads(body)["prompt"] == prompts
    chats = BodyWriter(Server.OPENAI_CHAT, served_model="m").write(prompts, DEFAULTS, 9)
    assert [json.loads(body)["messages"][0]["content"] for body in chats] == prompts
    assert [json.loads(body)["inputs"] for body in BodyWriter(Server.TGI).write(prompts, DEFAULTS, 9)] == prompts
    assert BodyWriter(Server.TGIS).write(prompts, DEFAULTS, 9) == ()


@pytest.mark.parametrize("server", [Server.OPENAI_COMPLETIONS, Server.OPENAI_CHAT, Server.TGI])
def test_any_text_comes_through(server: Server) -> None:
    (body,) = BodyWriter(server, served_model=AWKWARD).write([AWKWARD], DEFAULTS, 9)
    content = json.loads(body)
    found = content.get("prompt") or content.get("inputs") or content["messages"][0]["content"]
    assert found == AWKWARD
    assert content.get("model", AWKWARD) == AWKWARD


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (DEFAULTS, (False, None, 0, 0.0)),
        (GREEDY, (False, None, 0, 0.0)),
        (UNLIMITED, (True, 1.0, 0, 1.0)),
        (LIMITED, (True, 0.7, 31, 0.73)),
        (SamplingParameters(greedy=False), (True, None, 0, 0.0)),
        (SamplingParameters(temperature=0.5), (True, 0.5, 0, 0.0)),
    ],
)
def test_tgis_samples_only_when_asked(
    sampling: SamplingParameters, expected: tuple[bool, float | None, int, float]
) -> None:
    is_sampled, temperature, top_k, top_p = expected
    assert tgis_parameters(sampling, 9) == TgisParameters(
        is_sampled=is_sampled,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=9,
        min_new_tokens=9,
    )
    assert tgis_parameters(sampling, 9, fixed_output_length=False).min_new_tokens == 0


def test_unknown_server_is_refused() -> None:
    with pytest.raises(ValueError, match="tgit"):
        BodyWriter("tgit")  # type: ignore[arg-type]
