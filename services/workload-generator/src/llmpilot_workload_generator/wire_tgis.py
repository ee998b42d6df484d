"""Rendered requests -> the messages of TGIS.

Invariant: no field is set that would mean something else than its absence to TGIS or to vllm-tgis-adapter.
"""

from fmaas import generation_pb2 as pb
from llmpilot_workload_generator.prompts.rendering import RenderedRequest
from llmpilot_workload_generator.prompts.request_bodies import TgisParameters, tgis_parameters


def to_batched_request(request: RenderedRequest, *, fixed_output_length: bool = True) -> pb.BatchedGenerationRequest:
    """Return one call with all prompts of a request."""
    parameters = tgis_parameters(request.sampling, request.output_tokens, fixed_output_length=fixed_output_length)
    texts = [pb.GenerationRequest(text=prompt) for prompt in request.prompts]
    return pb.BatchedGenerationRequest(requests=texts, params=_to_parameters(parameters))


def to_single_requests(
    request: RenderedRequest, *, fixed_output_length: bool = True
) -> list[pb.SingleGenerationRequest]:
    """Return a call per prompt, as GenerateStream takes them."""
    parameters = _to_parameters(
        tgis_parameters(request.sampling, request.output_tokens, fixed_output_length=fixed_output_length)
    )
    texts = [pb.GenerationRequest(text=prompt) for prompt in request.prompts]
    return [pb.SingleGenerationRequest(request=text, params=parameters) for text in texts]


def _to_parameters(parameters: TgisParameters) -> pb.Parameters:
    message = pb.Parameters(
        method=pb.SAMPLE if parameters.is_sampled else pb.GREEDY,
        stopping=pb.StoppingCriteria(
            max_new_tokens=parameters.max_new_tokens, min_new_tokens=parameters.min_new_tokens
        ),
    )
    if parameters.is_sampled:
        message.sampling.CopyFrom(
            pb.SamplingParameters(temperature=parameters.temperature, top_k=parameters.top_k, top_p=parameters.top_p)
        )
    return message
