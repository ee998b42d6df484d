"""TGIS's interface over a real channel."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fmaas import generation_pb2 as pb
from fmaas.generation_pb2_grpc import GenerationServiceStub
from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_servicekit.status import error_from_rpc
from llmpilot_simulator.faults import Faults, ServerFaults
from llmpilot_simulator.settings import FixedTimes, ModelledTimes
from llmpilot_simulator.tokenizer import Tokenizer
from llmpilot_simulator.write_log import read_write_log

StartSimulator = Callable[..., AbstractContextManager[Any]]
Eventually = Callable[[Callable[[], bool]], None]

DEADLINE_SECONDS = 30
TOKENIZER = Tokenizer()
CONTEXT_LENGTH = 1000
PROMPT = "How many tokens does this prompt have?"
SLOW = FixedTimes(ttft_seconds=0.0, itl_seconds=60.0)
"""A first token at once, the next one never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tgis:
    """A client, and the simulator that it talks to."""

    simulator: Any
    stub: GenerationServiceStub
    channel: grpc.Channel

    def stream(self, prompt: str = PROMPT, *, headers: tuple[tuple[str, str], ...] = (), **params: Any) -> Any:
        """Start a stream; the parameters are those of StoppingCriteria unless they are of Parameters."""
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=prompt), params=parameters(**params))
        return self.stub.GenerateStream(request, timeout=DEADLINE_SECONDS, metadata=headers)

    def generate(self, *prompts: str, **params: Any) -> list[pb.GenerationResponse]:
        """Continue texts."""
        request = pb.BatchedGenerationRequest(
            requests=[pb.GenerationRequest(text=prompt) for prompt in prompts], params=parameters(**params)
        )
        return list(self.stub.Generate(request, timeout=DEADLINE_SECONDS).responses)


def parameters(**fields: Any) -> pb.Parameters:
    names = set(pb.Parameters.DESCRIPTOR.fields_by_name)
    params = pb.Parameters(**{name: value for name, value in fields.items() if name in names})
    stopping = {name: value for name, value in fields.items() if name not in names}
    params.stopping.MergeFrom(pb.StoppingCriteria(**stopping))
    return params


def pinned(tokens: int) -> dict[str, Any]:
    """Say that a reply has exactly so many tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


StartTgis = Callable[..., AbstractContextManager[Tgis]]


@pytest.fixture(scope="session")
def start_tgis(start_simulator: StartSimulator) -> StartTgis:
    """Runs a server with these changes of the default settings; gives its client while it serves."""

    @contextmanager
    def start(**changes: Any) -> Iterator[Tgis]:
        with (
            start_simulator(grpc_address="127.0.0.1:0", context_length=CONTEXT_LENGTH, **changes) as simulator,
            grpc.insecure_channel(simulator.addresses.grpc) as channel,
        ):
            yield Tgis(simulator=simulator, stub=GenerationServiceStub(channel), channel=channel)

    return start


@pytest.fixture(scope="module")
def tgis(start_tgis: StartTgis) -> Iterator[Tgis]:
    """The client of a server with the default settings."""
    with start_tgis() as client:
        yield client


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """How a call was refused."""

    code: grpc.StatusCode
    message: str
    error: grpc.RpcError


def refused(call: Callable[[], object]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    return Refusal(code=error.code(), message=error.details() or "", error=error)


def counted(stream: Any, counts: list[int]) -> None:
    """Read a stream to its end; keeps what it has counted up to."""
    for message in stream:
        counts.append(message.generated_token_count)  # noqa: PERF401 what came before an error is kept


def test_the_first_message_has_the_number_of_input_tokens_alone(tgis: Tgis) -> None:
    first = next(iter(tgis.stream(max_new_tokens=3)))

    assert first == pb.GenerationResponse(input_token_count=TOKENIZER.count(PROMPT))


def test_then_a_message_per_token_counts_them_up_and_the_last_says_why(tgis: Tgis) -> None:
    _, *messages = tgis.stream(**pinned(5))

    assert [message.generated_token_count for message in messages] == [1, 2, 3, 4, 5]
    assert [message.stop_reason for message in messages] == [pb.NOT_FINISHED] * 4 + [pb.MAX_TOKENS]
    assert all(message.text and not message.input_token_count for message in messages)
    assert TOKENIZER.count("".join(message.text for message in messages)) == 5


def test_a_call_says_that_it_is_simulated_and_what_its_id_is(tgis: Tgis) -> None:
    call = tgis.stream(headers=(("x-correlation-id", "a-b-c"),), max_new_tokens=1)
    list(call)

    metadata = dict(call.initial_metadata())
    assert metadata["x-llm-pilot-simulated"] == "true"
    assert metadata["x-request-id"] == "a-b-c"


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "ModelInfo"])
def test_every_method_says_that_it_is_simulated(tgis: Tgis, method: str) -> None:
    requests = {
        "Generate": pb.BatchedGenerationRequest(),
        "Tokenize": pb.BatchedTokenizeRequest(),
        "ModelInfo": pb.ModelInfoRequest(),
    }
    _, call = getattr(tgis.stub, method).with_call(requests[method], timeout=DEADLINE_SECONDS)

    assert ("x-llm-pilot-simulated", "true") in call.initial_metadata()


def test_a_refused_call_says_it_too(tgis: Tgis) -> None:
    call = tgis.stream(truncate_input_tokens=5, min_new_tokens=CONTEXT_LENGTH, max_new_tokens=CONTEXT_LENGTH)
    refused(lambda: list(call))

    assert ("x-llm-pilot-simulated", "true") in call.initial_metadata()


def test_without_a_limit_a_reply_has_twenty_tokens_at_most(tgis: Tgis) -> None:
    assert list(tgis.stream(min_new_tokens=20))[-1].generated_token_count == 20
    (reply,) = tgis.generate(PROMPT)
    assert reply.generated_token_count <= 20


def test_the_end_of_the_text_is_a_token_without_text(tgis: Tgis) -> None:
    """Of 50 replies that may have 999 tokens each, the median is 145: nearly all end by themselves."""
    replies = [tgis.generate(PROMPT, max_new_tokens=990, method=pb.SAMPLE)[0] for _ in range(5)]

    for reply in replies:
        ended = reply.stop_reason == pb.EOS_TOKEN
        assert TOKENIZER.count(reply.text) == reply.generated_token_count - ended
    assert any(reply.stop_reason == pb.EOS_TOKEN for reply in replies)


def test_a_limit_beyond_the_context_is_lowered_and_the_reply_says_so(tgis: Tgis) -> None:
    prompt = " word" * (CONTEXT_LENGTH - 10)

    *_, last = tgis.stream(prompt, min_new_tokens=10, max_new_tokens=50)

    assert last.generated_token_count == 10
    assert last.stop_reason == pb.TOKEN_LIMIT


def test_a_limit_that_the_context_just_holds_is_an_ordinary_one(tgis: Tgis) -> None:
    *_, last = tgis.stream(" word" * (CONTEXT_LENGTH - 10), **pinned(10))

    assert last.stop_reason == pb.MAX_TOKENS


def test_truncation_keeps_the_end_of_the_prompt(tgis: Tgis) -> None:
    asked = pb.ResponseOptions(input_tokens=True, generated_tokens=True)

    (reply,) = tgis.generate("one two three four", truncate_input_tokens=2, response=asked, **pinned(1))

    assert reply.input_token_count == 2
    assert [token.text for token in reply.input_tokens] == [" three", " four"]


def test_truncation_saves_a_prompt_that_is_too_long(tgis: Tgis) -> None:
    first = next(iter(tgis.stream(" word" * 5000, truncate_input_tokens=300)))

    assert first.input_token_count == 300


def test_a_stop_sequence_ends_the_reply_with_itself(tgis: Tgis) -> None:
    _, *messages = tgis.stream(max_new_tokens=200, min_new_tokens=0, stop_sequences=[".", "zebra"])

    last = messages[-1]
    assert (last.stop_reason, last.stop_sequence) == (pb.STOP_SEQUENCE, ".")
    assert "".join(message.text for message in messages).endswith(".")


def test_a_stop_sequence_can_be_left_out_and_what_waits_for_it_is_no_message(tgis: Tgis) -> None:
    """TGIS drops messages without text, so a message may stand for several tokens."""
    _, *messages = tgis.stream(max_new_tokens=200, stop_sequences=["a very long stop."], include_stop_sequence=False)
    counts = [message.generated_token_count for message in messages]

    assert counts[0] > 1
    assert counts == sorted(set(counts))
    assert all(message.text for message in messages[:-1])


def test_a_least_length_hides_stop_sequences(tgis: Tgis) -> None:
    *_, last = tgis.stream(stop_sequences=["."], **pinned(60))

    assert last.generated_token_count == 60
    assert last.stop_reason == pb.MAX_TOKENS


def test_the_input_comes_back_where_asked_for(tgis: Tgis) -> None:
    asked = pb.ResponseOptions(input_text=True)

    first, *_ = tgis.stream(response=asked, **pinned(2))
    (whole,) = tgis.generate(PROMPT, response=asked, **pinned(2))

    assert first.text == PROMPT
    assert whole.text.startswith(PROMPT)
    assert TOKENIZER.count(whole.text.removeprefix(PROMPT)) == 2


def test_token_details_come_where_asked_for(tgis: Tgis) -> None:
    asked = pb.ResponseOptions(
        input_tokens=True, generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=1
    )

    first, inputs, *messages = tgis.stream(response=asked, **pinned(3))

    assert first.input_token_count == inputs.input_token_count == len(inputs.input_tokens)
    assert "".join(token.text for token in inputs.input_tokens) == PROMPT
    for message in messages:
        (token,) = message.tokens
        assert token.text == message.text
        assert token.rank == 1
        assert [each.text for each in token.top_tokens] == [token.text]


def test_with_token_details_nothing_is_dropped(tgis: Tgis) -> None:
    asked = pb.ResponseOptions(generated_tokens=True)

    _, *messages = tgis.stream(response=asked, stop_sequences=["x" * 100], include_stop_sequence=False, **pinned(5))

    assert [message.generated_token_count for message in messages] == [1, 2, 3, 4, 5]
    assert not messages[0].text
    assert messages[0].tokens[0].text


def test_the_token_that_ends_the_text_has_a_name_among_the_details(tgis: Tgis) -> None:
    asked = pb.ResponseOptions(generated_tokens=True)
    (reply,) = tgis.generate("Say something short.", response=asked, max_new_tokens=999 - 5)

    ended = reply.stop_reason == pb.EOS_TOKEN
    assert len(reply.tokens) == reply.generated_token_count
    assert (reply.tokens[-1].text == "</s>") == ended


def test_a_sampled_reply_names_its_seed_and_the_seed_repeats_it(tgis: Tgis) -> None:
    first, *messages = tgis.stream(method=pb.SAMPLE, max_new_tokens=30)
    (again,) = tgis.generate(
        PROMPT, method=pb.SAMPLE, sampling=pb.SamplingParameters(seed=first.seed), max_new_tokens=30
    )

    assert first.seed == messages[-1].seed == again.seed > 0
    assert again.text == "".join(message.text for message in messages)


def test_a_greedy_reply_depends_on_the_prompt_alone_and_has_no_seed(tgis: Tgis) -> None:
    (one,), (two,), (other,) = (tgis.generate(prompt, max_new_tokens=40) for prompt in ("One.", "One.", "Two."))

    assert one == two
    assert one.text != other.text
    assert one.seed == 0


def test_a_batch_is_answered_in_its_order(tgis: Tgis) -> None:
    replies = tgis.generate("one", "one two", "one two three", **pinned(4))

    assert [reply.input_token_count for reply in replies] == [1, 2, 3]
    assert [reply.generated_token_count for reply in replies] == [4, 4, 4]
    assert [reply.stop_reason for reply in replies] == [pb.MAX_TOKENS] * 3


def test_no_texts_get_no_replies_as_from_tgis(tgis: Tgis) -> None:
    assert tgis.generate() == []


def test_an_empty_prompt_still_has_the_token_that_begins_it(tgis: Tgis) -> None:
    first = next(iter(tgis.stream("", max_new_tokens=1)))

    assert first.input_token_count == 1


def test_tokens_are_counted_listed_and_placed(tgis: Tgis) -> None:
    text = "Four tokens, naïve"
    request = pb.BatchedTokenizeRequest(
        requests=[pb.TokenizeRequest(text=text), pb.TokenizeRequest()], return_tokens=True, return_offsets=True
    )

    first, empty = tgis.stub.Tokenize(request, timeout=DEADLINE_SECONDS).responses

    assert list(first.tokens) == ["Four", " tokens", ",", " na", "ï", "ve"]
    assert first.token_count == 6
    assert [text[offset.start : offset.end] for offset in first.offsets] == list(first.tokens)
    assert empty == pb.TokenizeResponse()


def test_only_the_count_comes_unasked_and_truncation_keeps_the_end(tgis: Tgis) -> None:
    texts = [pb.TokenizeRequest(text="one two three")]
    counted = pb.BatchedTokenizeRequest(requests=texts, truncate_input_tokens=2)
    listed = pb.BatchedTokenizeRequest(requests=texts, truncate_input_tokens=2, return_tokens=True, return_offsets=True)

    assert list(tgis.stub.Tokenize(counted).responses) == [pb.TokenizeResponse(token_count=2)]
    (reply,) = tgis.stub.Tokenize(listed).responses
    assert list(reply.tokens) == [" two", " three"]
    assert [(offset.start, offset.end) for offset in reply.offsets] == [(3, 7), (7, 13)]


def test_the_model_says_its_limits(tgis: Tgis) -> None:
    assert tgis.stub.ModelInfo(pb.ModelInfoRequest(), timeout=DEADLINE_SECONDS) == pb.ModelInfoResponse(
        model_kind=pb.ModelInfoResponse.DECODER_ONLY,
        max_sequence_length=CONTEXT_LENGTH,
        max_new_tokens=CONTEXT_LENGTH,
    )


def test_an_encoder_decoder_says_that_it_is_one(start_tgis: StartTgis) -> None:
    with start_tgis(is_encoder_decoder=True) as tgis:
        reply = tgis.stub.ModelInfo(pb.ModelInfoRequest(), timeout=DEADLINE_SECONDS)
    assert reply.model_kind == pb.ModelInfoResponse.ENCODER_DECODER


def test_everything_wrong_with_a_call_is_said_at_once(tgis: Tgis) -> None:
    request = pb.BatchedGenerationRequest(
        prefix_id="mine",
        requests=[pb.GenerationRequest(text="fine"), pb.GenerationRequest(text=" long" * CONTEXT_LENGTH)],
        params=parameters(method=9, min_new_tokens=30, stop_sequences=[""]),
    )

    error = error_from_rpc(refused(lambda: tgis.stub.Generate(request, timeout=DEADLINE_SECONDS)).error)

    assert isinstance(error, InvalidInputError)
    assert [violation.field for violation in error.violations] == [
        "params.method",
        "params.stopping.min_new_tokens",
        "params.stopping.stop_sequences",
        "prefix_id",
        "requests[1].text",
    ]


def test_a_stream_without_a_request_is_refused(tgis: Tgis) -> None:
    error = refused(lambda: list(tgis.stub.GenerateStream(pb.SingleGenerationRequest(), timeout=DEADLINE_SECONDS)))

    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "missing request" in error.message


def test_a_request_that_the_batch_can_never_hold_is_refused_before_any_message(start_tgis: StartTgis) -> None:
    times = ModelledTimes(policy=TgisPolicy(max_batch_weight=100), tables=steps(0.001))
    with start_tgis(times=times) as tgis:
        error = refused(lambda: next(iter(tgis.stream(" word" * 90, max_new_tokens=20))))

    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "100" in error.message


def steps(seconds: float) -> Any:
    return StepConstants(
        decode_seconds=seconds,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=seconds,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    ).tables()


def test_a_modelled_batch_serves_the_stream(start_tgis: StartTgis) -> None:
    times = ModelledTimes(policy=TgisPolicy(max_batch_weight=10_000), tables=steps(0.001))
    with start_tgis(times=times) as tgis:
        counts = [message.generated_token_count for message in tgis.stream(**pinned(30))]

    assert counts == list(range(31))


def test_a_client_that_leaves_frees_its_place(start_tgis: StartTgis, eventually: Eventually) -> None:
    with start_tgis(times=SLOW) as tgis:
        call = tgis.stream(**pinned(10))
        messages = iter(call)
        assert [next(messages).generated_token_count for _ in range(2)] == [0, 1]
        assert tgis.simulator.application.service.server.open_count == 1

        call.cancel()

        eventually(lambda: tgis.simulator.application.service.server.open_count == 0)
        eventually(lambda: tgis.simulator.application.service.server.load.running_count == 0)


def test_a_client_that_leaves_a_batch_frees_all_its_places(start_tgis: StartTgis, eventually: Eventually) -> None:
    with start_tgis(times=SLOW) as tgis:
        server = tgis.simulator.application.service.server
        request = pb.BatchedGenerationRequest(
            requests=[pb.GenerationRequest(text="a")] * 3, params=parameters(**pinned(10))
        )
        call = tgis.stub.Generate.future(request, timeout=DEADLINE_SECONDS)
        eventually(lambda: server.open_count == 3)

        call.cancel()

        eventually(lambda: server.open_count == 0)


def test_a_deadline_of_the_client_frees_its_place(start_tgis: StartTgis, eventually: Eventually) -> None:
    with start_tgis(times=SLOW) as tgis:
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=parameters(**pinned(10)))
        error = refused(lambda: list(tgis.stub.GenerateStream(request, timeout=0.2)))

        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: tgis.simulator.application.service.server.open_count == 0)


def test_the_time_limit_ends_a_reply_with_the_token_that_is_late(start_tgis: StartTgis) -> None:
    with start_tgis(times=FixedTimes(ttft_seconds=0.0, itl_seconds=0.1)) as tgis:
        *_, last = tgis.stream(time_limit_millis=250, **pinned(500))

    assert last.stop_reason == pb.TIME_LIMIT
    assert last.generated_token_count == 4  # due after 0, 100, 200 and, too late, 300 ms


def test_the_time_limit_ends_a_reply_that_has_not_begun(start_tgis: StartTgis) -> None:
    with start_tgis(times=FixedTimes(ttft_seconds=60.0, itl_seconds=0.1)) as tgis:
        first, last = tgis.stream(time_limit_millis=50, **pinned(5))
        (whole,) = tgis.generate(PROMPT, time_limit_millis=50, **pinned(5))

        assert tgis.simulator.application.service.server.open_count == 0
    assert first.input_token_count == whole.input_token_count == TOKENIZER.count(PROMPT)
    assert last == pb.GenerationResponse(stop_reason=pb.TIME_LIMIT)
    assert (whole.stop_reason, whole.generated_token_count, whole.text) == (pb.TIME_LIMIT, 0, "")


def test_running_out_of_memory_is_resource_exhausted(tgis: Tgis) -> None:
    call = tgis.stream(headers=(("x-simulate-fault", "out-of-memory-after=3"),), **pinned(10))
    counts: list[int] = []
    error = refused(lambda: counted(call, counts))

    assert counts == [0, 1, 2, 3]
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.message.startswith("Request failed during generation: Error after generating 3 tokens: CUDA out of")


def test_a_batch_that_is_too_heavy_for_the_gpu_fails(start_tgis: StartTgis) -> None:
    times = ModelledTimes(policy=TgisPolicy(max_batch_weight=10_000), tables=steps(0.001), out_of_memory_tokens=20)
    with start_tgis(times=times) as tgis:
        error = refused(lambda: tgis.generate(" word" * 30, **pinned(3)))

    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "CUDA out of memory (simulated)" in error.message


def test_an_overloaded_server_refuses_as_tgis_does(start_tgis: StartTgis) -> None:
    with start_tgis(faults=ServerFaults(reject_share=1.0)) as tgis:
        for call in (lambda: list(tgis.stream()), lambda: tgis.generate(PROMPT)):
            error = refused(call)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.message == "Model is overloaded"


def health_of(tgis: Tgis, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(tgis.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_a_server_that_is_starting_is_unavailable_and_not_healthy(start_tgis: StartTgis) -> None:
    with start_tgis(faults=ServerFaults(slow_start_seconds=1000)) as tgis:
        error = refused(lambda: list(tgis.stream()))

        assert health_of(tgis) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_serves_is_healthy(tgis: Tgis) -> None:
    assert health_of(tgis) == health_pb2.HealthCheckResponse.SERVING
    assert health_of(tgis, "fmaas.GenerationService") == health_pb2.HealthCheckResponse.SERVING


def test_a_dropped_call_ends_without_its_end(tgis: Tgis) -> None:
    call = tgis.stream(headers=(("x-simulate-fault", "drop-after=2"),), **pinned(10))
    counts: list[int] = []
    error = refused(lambda: counted(call, counts))

    assert counts == [0, 1, 2]
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_several_tokens_come_in_a_message_where_asked_for(tgis: Tgis) -> None:
    _, *messages = tgis.stream(headers=(("x-simulate-fault", "stream-interval=4"),), **pinned(10))

    assert [message.generated_token_count for message in messages] == [1, 5, 9, 10]
    assert TOKENIZER.count("".join(message.text for message in messages)) == 10


def test_messages_of_empty_tokens_are_dropped_as_by_tgis(start_tgis: StartTgis) -> None:
    with start_tgis(faults=ServerFaults(each_request=Faults(empty_every=2))) as tgis:
        _, *messages = tgis.stream(**pinned(6))

    assert [message.generated_token_count for message in messages] == [1, 3, 5, 6]
    assert TOKENIZER.count("".join(message.text for message in messages)) == 6


def test_a_bad_fault_header_is_refused(tgis: Tgis) -> None:
    error = refused(lambda: list(tgis.stream(headers=(("x-simulate-fault", "explode=1"),))))

    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'explode' is none of" in error.message


def test_the_log_has_the_time_of_every_token(start_tgis: StartTgis, tmp_path: Path) -> None:
    path = tmp_path / "writes"
    with start_tgis(write_log=path, times=FixedTimes(ttft_seconds=0.02, itl_seconds=0.01)) as tgis:
        before = time.time_ns()
        headers = (("x-request-id", "one"), ("x-simulate-fault", "empty-every=2"))
        stream = tgis.stream(headers=headers, **pinned(4))
        received = {message.generated_token_count: time.time_ns() for message in stream}
    writes = read_write_log(path)

    rows = writes.of("one")
    assert writes.token_index[rows].tolist() == [0, 1, 2, 3]
    assert writes.chunk_tokens[rows].tolist() == [1, 2, 2, 1]  # the second token's text waits for the third
    arrival = int(writes.arrival_nanos[0])
    assert arrival == pytest.approx(before, abs=DEADLINE_SECONDS * 10**9)
    after_arrival = (writes.due_nanos[rows] - arrival).tolist()
    assert after_arrival == pytest.approx([20e6, 30e6, 40e6, 50e6], abs=5e6)  # the wall clock is read again and again
    assert (writes.written_nanos[rows] >= writes.due_nanos[rows]).all()
    assert received[4] >= int(writes.written_nanos[rows][3])


def test_an_address_that_is_taken_is_named(tgis: Tgis, start_simulator: StartSimulator) -> None:
    address = tgis.simulator.addresses.grpc
    assert address is not None

    with pytest.raises(PreconditionError, match=address), start_simulator(grpc_address=address):
        pass
