import pytest

from fmaas import generation_pb2 as pb
from llmpilot_workload_generator.prompts.rendering import RenderedRequest
from llmpilot_workload_generator.prompts.sampling_parameters import SamplingParameters
from llmpilot_workload_generator.wire_tgis import to_batched_request, to_single_requests


def rendered(sampling: SamplingParameters) -> RenderedRequest:
    return RenderedRequest(
        index=0,
        prompts=("one", "two"),
        input_tokens=1,
        output_tokens=9,
        sampling=sampling,
        arrival_nanos=None,
        bodies=(),
        shared_prefix_tokens=0,
    )


def test_batch_is_one_call_with_all_prompts() -> None:
    sampling = SamplingParameters(greedy=False, temperature=0.7, top_p=0.73, top_k=31)
    message = to_batched_request(rendered(sampling))
    assert [request.text for request in message.requests] == ["one", "two"]
    assert message.params.method == pb.SAMPLE
    assert message.params.sampling.temperature == pytest.approx(0.7)
    assert message.params.sampling.top_p == pytest.approx(0.73)
    assert message.params.sampling.top_k == 31
    assert message.params.stopping == pb.StoppingCriteria(max_new_tokens=9, min_new_tokens=9)


def test_stream_takes_a_call_per_prompt() -> None:
    messages = to_single_requests(rendered(SamplingParameters(greedy=True)), fixed_output_length=False)
    assert [message.request.text for message in messages] == ["one", "two"]
    assert all(message.params.method == pb.GREEDY for message in messages)
    assert messages[0].params.stopping == pb.StoppingCriteria(max_new_tokens=9)


def test_greedy_sends_no_sampling() -> None:
    assert not to_batched_request(rendered(SamplingParameters(greedy=True))).params.HasField("sampling")


def test_temperature_is_never_sent_as_0() -> None:
    """TGIS takes 0 as no limit, vllm-tgis-adapter as greedy."""
    assert not to_batched_request(rendered(SamplingParameters(greedy=False))).params.sampling.HasField("temperature")
