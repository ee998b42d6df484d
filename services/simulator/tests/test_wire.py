"""TGIS's messages, read without a server."""

from typing import Any

import pytest

from fmaas import generation_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError
from llmpilot_simulator.tokenizer import Tokenizer
from llmpilot_simulator.wire import Limits, Prompt, Wishes, read_generation_request

CONTEXT_LENGTH = 1000
TOKENIZER = Tokenizer()


def read(prompt: str = "Tell me.", **params: Any) -> tuple[Wishes, Prompt]:
    """Read a call; the parameters are those of StoppingCriteria unless they are of Parameters."""
    names = set(pb.Parameters.DESCRIPTOR.fields_by_name)
    parameters = pb.Parameters(**{name: value for name, value in params.items() if name in names})
    stopping = {name: value for name, value in params.items() if name not in names}
    parameters.stopping.MergeFrom(pb.StoppingCriteria(**stopping))
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=prompt), params=parameters)
    limits = Limits(context_length=CONTEXT_LENGTH, max_new_tokens=900)
    wishes, (read_prompt,) = read_generation_request(request, tokenizer=TOKENIZER, limits=limits)
    return wishes, read_prompt


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"method": 7}, "method: must be 0 (GREEDY) or 1 (SAMPLE), is 7"),
        ({"max_new_tokens": 901}, "max_new_tokens must be <= 900"),
        ({"min_new_tokens": 21}, "min_new_tokens must be <= max_new_tokens (20)"),
        ({"stop_sequences": [""]}, "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"),
        ({"stop_sequences": ["é" * 121]}, "at most 6 non-empty stop sequences"),
        ({"stop_sequences": list("abcdefg")}, "at most 6 non-empty stop sequences"),
        ({"method": 1, "sampling": pb.SamplingParameters(temperature=0.01)}, "temperature must be >= 0.05"),
        ({"method": 1, "sampling": pb.SamplingParameters(temperature=float("nan"))}, "temperature must be >= 0.05"),
        ({"method": 1, "sampling": pb.SamplingParameters(top_p=-0.5)}, "top_p must be > 0.0 and <= 1.0"),
        ({"method": 1, "sampling": pb.SamplingParameters(typical_p=1.5)}, "typical_p must be <= 1.0"),
        ({"decoding": pb.DecodingParameters(repetition_penalty=-1)}, "repetition_penalty must be > 0.0"),
        (
            {"decoding": pb.DecodingParameters(length_penalty=pb.DecodingParameters.LengthPenalty(decay_factor=11))},
            "length_penalty must be >= 1.0 and <= 10.0",
        ),
        ({"decoding": pb.DecodingParameters(regex="a+")}, "guided decoding is not simulated; leave it out"),
        ({"decoding": pb.DecodingParameters(format=pb.DecodingParameters.JSON)}, "guided decoding is not simulated"),
        ({"response": pb.ResponseOptions(token_ranks=True)}, "must request input and/or generated tokens"),
    ],
)
def test_a_bad_parameter_is_refused_in_the_words_of_tgis(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(**params)

    assert complaint in str(caught.value)
    assert len(caught.value.violations) == 1


def test_sampling_parameters_of_a_greedy_call_are_ignored() -> None:
    wishes, _ = read(sampling=pb.SamplingParameters(temperature=0.01, top_p=9, seed=5))

    assert not wishes.is_sampled
    assert wishes.seed is None


def test_zero_is_unset() -> None:
    wishes, prompt = read(method=pb.SAMPLE, sampling=pb.SamplingParameters(temperature=0, top_p=0, typical_p=0))

    assert wishes.time_limit_seconds is None
    assert wishes.includes_stop
    assert prompt.max_tokens == 20


def test_plain_text_is_no_guided_decoding() -> None:
    read(decoding=pb.DecodingParameters(format=pb.DecodingParameters.TEXT))


@pytest.mark.parametrize(
    ("prompt_tokens", "min_new_tokens", "complaint"),
    [
        (CONTEXT_LENGTH, 0, "input tokens (1000) plus prefix length (0) must be < 1000"),
        (
            CONTEXT_LENGTH - 5,
            6,
            "input tokens (995) plus prefix length (0) plus min_new_tokens (6) must be <= 1000",
        ),
    ],
)
def test_a_prompt_without_room_for_its_reply_is_refused(
    prompt_tokens: int, min_new_tokens: int, complaint: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(" word" * prompt_tokens, min_new_tokens=min_new_tokens)

    assert str(caught.value) == f"request.text: {complaint}"


def test_truncation_makes_room() -> None:
    _, prompt = read(" word" * 5000, truncate_input_tokens=CONTEXT_LENGTH - 1)

    assert len(prompt.ids) == CONTEXT_LENGTH - 1
    assert prompt.max_tokens == 1
    assert prompt.is_cut_by_context


def test_truncation_to_more_than_there_is_changes_nothing() -> None:
    _, prompt = read("one two", truncate_input_tokens=10)

    assert TOKENIZER.decode(prompt.ids) == "one two"
