"""Between protobuf and domain, of requests with prompts."""

from collections.abc import Iterable
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.prompts.corpus import LARGEST_CORPUS_CHARACTERS
from llmpilot_workload_generator.prompts.rendering import RenderedRequest, RenderOptions
from llmpilot_workload_generator.prompts.request_bodies import Server
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer
from llmpilot_workload_generator.wire_tgis import to_batched_request

SERVERS = {
    pb.SERVER_OPENAI_COMPLETIONS: Server.OPENAI_COMPLETIONS,
    pb.SERVER_OPENAI_CHAT: Server.OPENAI_CHAT,
    pb.SERVER_TGI: Server.TGI,
    pb.SERVER_TGIS: Server.TGIS,
}

_TOKENIZERS_KEPT = 4


def read_render_options(request: pb.StreamRequestsRequest, violations: list[Violation]) -> RenderOptions:
    """Return how prompts are made, with stand-ins for what is wrong, which is appended to the violations."""
    server = SERVERS.get(request.server)
    if server is None and request.server != pb.SERVER_UNSPECIFIED:
        violations.append(Violation("server", f"must be a known server, is {request.server}"))
    if len(request.corpus) > LARGEST_CORPUS_CHARACTERS:
        violations.append(Violation("corpus", f"must have at most {LARGEST_CORPUS_CHARACTERS:,} characters"))
    tokenizer = None
    if request.tokenizer_json:
        try:
            tokenizer = _tokenizer(request.tokenizer_json)
        except InvalidInputError as error:
            violations += [Violation("tokenizer_json", each.description) for each in error.violations]
    return RenderOptions(
        tokenizer=tokenizer,
        corpus=request.corpus[:LARGEST_CORPUS_CHARACTERS] or None,
        seed=request.sampling.seed,
        shared_prefix_ratio=request.shared_prefix_ratio,
        prefix_group_count=request.prefix_group_count or 1,
        server=server,
        served_model=request.served_model,
        fixed_output_length=request.fixed_output_length,
    )


@lru_cache(maxsize=_TOKENIZERS_KEPT)
def _tokenizer(content: bytes) -> Tokenizer:
    """The last few are kept: while a large one is read nothing else runs, as the library keeps Python's lock."""
    return Tokenizer(content, label="tokenizer_json")


def write_requests(requests: Iterable[RenderedRequest], asked: pb.StreamRequestsRequest) -> pb.StreamRequestsResponse:
    """Return requests as the client that asked for them sees them."""
    return pb.StreamRequestsResponse(
        requests=[
            pb.RenderedRequest(
                index=request.index,
                prompts=request.prompts,
                input_tokens=request.input_tokens,
                output_tokens=request.output_tokens,
                arrival_offset=_write_duration(request.arrival_nanos),
                bodies=_bodies(request, asked),
            )
            for request in requests
        ]
    )


def _bodies(request: RenderedRequest, asked: pb.StreamRequestsRequest) -> Iterable[bytes]:
    if asked.server != pb.SERVER_TGIS:
        return request.bodies
    message = to_batched_request(request, fixed_output_length=asked.fixed_output_length)
    return (message.SerializeToString(),)


def _write_duration(nanos: int | None) -> Duration | None:
    return None if nanos is None else Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
