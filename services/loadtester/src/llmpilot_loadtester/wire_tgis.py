"""Between protobuf and the load tester, of TGIS.

Invariant: a request that is taken apart keeps every field it had, those that nobody here knows included.
"""

from google.protobuf.message import DecodeError

from fmaas import generation_pb2 as pb
from llmpilot_loadtester.protocols.tgis import TgisMessage


def decode_generation_response(data: bytes) -> TgisMessage:
    """Read a message of GenerateStream; raises ValueError for other bytes."""
    try:
        message = pb.GenerationResponse.FromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return TgisMessage(
        input_token_count=message.input_token_count,
        generated_token_count=message.generated_token_count,
        text=message.text,
        stop_reason=message.stop_reason,
    )


def single_requests(batched: bytes) -> list[bytes]:
    """Return a serialized fmaas.BatchedGenerationRequest as serialized SingleGenerationRequests, one per text.

    Raises ValueError for other bytes.
    """
    try:
        batch = pb.BatchedGenerationRequest.FromString(batched)
    except DecodeError as error:
        raise ValueError(f"no fmaas.BatchedGenerationRequest: {error}") from error
    texts = list(batch.requests)
    del batch.requests[:]
    shared = pb.SingleGenerationRequest.FromString(batch.SerializeToString())  # other fields have the same numbers
    requests = []
    for text in texts:
        shared.request.CopyFrom(text)
        requests.append(shared.SerializeToString())
    return requests


def write_single_request(prompt: str, *, output_tokens: int, fixed_output_length: bool) -> bytes:
    """Return a serialized fmaas.SingleGenerationRequest, greedy."""
    stopping = pb.StoppingCriteria(
        max_new_tokens=output_tokens, min_new_tokens=output_tokens if fixed_output_length else 0
    )
    request = pb.SingleGenerationRequest(
        request=pb.GenerationRequest(text=prompt), params=pb.Parameters(method=pb.GREEDY, stopping=stopping)
    )
    return request.SerializeToString()
