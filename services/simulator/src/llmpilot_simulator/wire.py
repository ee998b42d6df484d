"""TGIS's messages <-> what the simulator knows.

Invariant: limits and words are TGIS's own, so that a client handles a refusal as it would there. TGIS names the first
problem of a call, the simulator all of them.
Source: IBM/text-generation-inference, router/src/{grpc_server,validation,batcher}.rs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmaas import generation_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_simulator.generation import Generation, GenerationRequest
from llmpilot_simulator.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 20
_MAX_STOP_SEQUENCES = 6
_MAX_STOP_BYTES = 240
_LEAST_TEMPERATURE = 0.05
_DECAY_FACTORS = (1.0, 10.0)
_SEEDS = 2**63
_UNGUIDED = (None, "format")
_END_OF_TEXT = "</s>"
"""The token that ends a text, where tokens are shown one by one."""

AnyGenerationRequest = pb.SingleGenerationRequest | pb.BatchedGenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server takes."""

    context_length: int
    """Tokens of prompt and reply together."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One text to continue."""

    text: str
    ids: list[int]
    """Truncated as asked."""
    max_tokens: int
    is_cut_by_context: bool
    """Whether the reply may have fewer tokens than asked for, as the context is no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a call wants for all its prompts."""

    min_tokens: int
    stop: tuple[str, ...]
    includes_stop: bool
    time_limit_seconds: float | None
    is_sampled: bool
    seed: int | None
    shows_input_text: bool
    shows_input_tokens: bool
    shows_tokens: bool
    shows_ranks: bool
    top_count: int

    def generation_request(self, prompt: Prompt, seed: int | None) -> GenerationRequest:
        """Return what to generate; a reply without sampling depends on the prompt alone."""
        return GenerationRequest(
            prompt=prompt.ids,
            max_tokens=prompt.max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            seed=0 if seed is None else seed % _SEEDS,
            include_stop=self.includes_stop,
        )


def read_generation_request(
    request: AnyGenerationRequest, *, tokenizer: Tokenizer, limits: Limits
) -> tuple[Wishes, list[Prompt]]:
    """Read a call; raises InvalidInputError with everything that is wrong with it."""
    params = request.params
    violations = list(_parameter_violations(params, limits))
    violations.extend(
        Violation(name, f"can't retrieve prompt prefix with id '{given}': none are simulated, leave it out")
        for name, given in (("prefix_id", request.prefix_id), ("adapter_id", request.adapter_id))
        if given
    )
    if isinstance(request, pb.SingleGenerationRequest):
        if not request.HasField("request"):
            violations.append(Violation("request", "missing request"))
        texts = [("request.text", request.request.text)]
    else:
        texts = [(f"requests[{index}].text", each.text) for index, each in enumerate(request.requests)]
    prompts = []
    for field, text in texts:
        ids = _truncated(tokenizer.encode(text), params.truncate_input_tokens)
        violations.extend(_length_violations(field, len(ids), params.stopping.min_new_tokens, limits))
        wanted, room = _max_new_tokens(params), limits.context_length - max(len(ids), 1)
        prompts.append(
            Prompt(text=text, ids=ids, max_tokens=min(wanted, max(room, 1)), is_cut_by_context=wanted > room)
        )
    if violations:
        raise InvalidInputError(violations)
    return _wishes(params), prompts


def _wishes(params: pb.Parameters) -> Wishes:
    stopping, response = params.stopping, params.response
    is_sampled = params.method == pb.SAMPLE
    has_includes = stopping.HasField("include_stop_sequence")
    return Wishes(
        min_tokens=stopping.min_new_tokens,
        stop=tuple(stopping.stop_sequences),
        includes_stop=stopping.include_stop_sequence if has_includes else True,
        time_limit_seconds=stopping.time_limit_millis / 1000 or None,
        is_sampled=is_sampled,
        seed=params.sampling.seed if is_sampled and params.sampling.HasField("seed") else None,
        shows_input_text=response.input_text,
        shows_input_tokens=response.input_tokens,
        shows_tokens=response.generated_tokens,
        shows_ranks=response.token_ranks,
        top_count=response.top_n_tokens,
    )


def _max_new_tokens(params: pb.Parameters) -> int:
    return params.stopping.max_new_tokens or DEFAULT_MAX_NEW_TOKENS


def _truncated(ids: list[int], count: int) -> list[int]:
    return ids[-count:] if count else ids


def _length_violations(field: str, tokens: int, min_new_tokens: int, limits: Limits) -> Iterator[Violation]:
    longest = limits.context_length
    if tokens >= longest:
        yield Violation(field, f"input tokens ({tokens}) plus prefix length (0) must be < {longest}")
    elif tokens + min_new_tokens > longest:
        yield Violation(
            field,
            f"input tokens ({tokens}) plus prefix length (0) plus min_new_tokens ({min_new_tokens}) "
            f"must be <= {longest}",
        )


def _parameter_violations(params: pb.Parameters, limits: Limits) -> Iterator[Violation]:
    sampling, stopping, response, decoding = params.sampling, params.stopping, params.response, params.decoding
    stops = stopping.stop_sequences
    is_sampled = params.method == pb.SAMPLE
    shows_details = response.token_logprobs or response.token_ranks or response.top_n_tokens
    least_decay, largest_decay = _DECAY_FACTORS
    checks = (
        (
            params.method in (pb.GREEDY, pb.SAMPLE),
            "method",
            f"must be {pb.GREEDY} (GREEDY) or {pb.SAMPLE} (SAMPLE), is {params.method}",
        ),
        (
            not is_sampled or sampling.temperature == 0 or sampling.temperature >= _LEAST_TEMPERATURE,
            "sampling.temperature",
            f"temperature must be >= {_LEAST_TEMPERATURE}",
        ),
        (not is_sampled or 0 <= sampling.top_p <= 1, "sampling.top_p", "top_p must be > 0.0 and <= 1.0"),
        (not is_sampled or 0 <= sampling.typical_p <= 1, "sampling.typical_p", "typical_p must be <= 1.0"),
        (
            stopping.max_new_tokens <= limits.max_new_tokens,
            "stopping.max_new_tokens",
            f"max_new_tokens must be <= {limits.max_new_tokens}",
        ),
        (
            stopping.min_new_tokens <= _max_new_tokens(params),
            "stopping.min_new_tokens",
            f"min_new_tokens must be <= max_new_tokens ({_max_new_tokens(params)})",
        ),
        (
            len(stops) <= _MAX_STOP_SEQUENCES and all(0 < len(stop.encode()) <= _MAX_STOP_BYTES for stop in stops),
            "stopping.stop_sequences",
            f"can specify at most {_MAX_STOP_SEQUENCES} non-empty stop sequences, "
            f"each not more than {_MAX_STOP_BYTES} UTF8 bytes",
        ),
        (decoding.repetition_penalty >= 0, "decoding.repetition_penalty", "repetition_penalty must be > 0.0"),
        (
            not decoding.HasField("length_penalty")
            or least_decay <= decoding.length_penalty.decay_factor <= largest_decay,
            "decoding.length_penalty",
            f"length_penalty must be >= {least_decay} and <= {largest_decay}",
        ),
        (
            decoding.WhichOneof("guided") in _UNGUIDED and decoding.format == pb.DecodingParameters.TEXT,
            "decoding",
            "guided decoding is not simulated; leave it out",
        ),
        (
            not shows_details or response.input_tokens or response.generated_tokens,
            "response",
            "must request input and/or generated tokens to request extra token detail",
        ),
    )
    yield from (Violation(f"params.{field}", text) for is_right, field, text in checks if not is_right)


def write_input(prompt: Prompt, wishes: Wishes, seed: int | None) -> pb.GenerationResponse:
    """Write the first message of a stream."""
    return pb.GenerationResponse(
        input_token_count=max(len(prompt.ids), 1), text=prompt.text if wishes.shows_input_text else "", seed=seed or 0
    )


def write_input_tokens(prompt: Prompt, wishes: Wishes, tokenizer: Tokenizer) -> pb.GenerationResponse:
    """Write the message of a stream that has the prompt's tokens."""
    return pb.GenerationResponse(
        input_token_count=max(len(prompt.ids), 1),
        input_tokens=_token_infos([tokenizer.decode([token_id]) for token_id in prompt.ids], wishes),
    )


def write_tokens(
    generation: Generation, first_index: int, end_index: int, wishes: Wishes, text: str
) -> pb.GenerationResponse:
    """Write the message of a stream that brings some output tokens."""
    return pb.GenerationResponse(
        generated_token_count=end_index,
        text=text,
        tokens=_output_infos(generation, first_index, end_index, wishes) if wishes.shows_tokens else None,
    )


def write_whole(
    generation: Generation, token_count: int, prompt: Prompt, wishes: Wishes, *, text: str, tokenizer: Tokenizer
) -> pb.GenerationResponse:
    """Write a reply, without its end, that is sent whole."""
    response = write_tokens(generation, 0, token_count, wishes, (prompt.text if wishes.shows_input_text else "") + text)
    if wishes.shows_input_tokens:
        response.MergeFrom(write_input_tokens(prompt, wishes, tokenizer))
    response.input_token_count = max(len(prompt.ids), 1)
    return response


def write_end(
    response: pb.GenerationResponse, generation: Generation, prompt: Prompt, seed: int | None, *, is_late: bool
) -> None:
    """Complete the last message of a reply; is_late: its time is over."""
    response.seed = seed or 0
    if is_late:
        response.stop_reason = pb.TIME_LIMIT
    elif generation.stop_sequence is not None:
        response.stop_reason = pb.STOP_SEQUENCE
        response.stop_sequence = generation.stop_sequence
    elif generation.finish_reason == "eos":
        response.stop_reason = pb.EOS_TOKEN
    else:
        response.stop_reason = pb.TOKEN_LIMIT if prompt.is_cut_by_context else pb.MAX_TOKENS


def write_tokenized(request: pb.BatchedTokenizeRequest, tokenizer: Tokenizer) -> pb.BatchedTokenizeResponse:
    """Answer a call that asks for tokens."""
    return pb.BatchedTokenizeResponse(
        responses=[_tokenized(each.text, request, tokenizer) for each in request.requests]
    )


def write_model_info(limits: Limits, *, is_encoder_decoder: bool) -> pb.ModelInfoResponse:
    """Describe the server."""
    kinds = pb.ModelInfoResponse
    return pb.ModelInfoResponse(
        model_kind=kinds.ENCODER_DECODER if is_encoder_decoder else kinds.DECODER_ONLY,
        max_sequence_length=limits.context_length,
        max_new_tokens=limits.max_new_tokens,
    )


def _tokenized(text: str, request: pb.BatchedTokenizeRequest, tokenizer: Tokenizer) -> pb.TokenizeResponse:
    pieces = tokenizer.pieces(text)
    kept = pieces[-request.truncate_input_tokens :] if request.truncate_input_tokens else pieces
    offsets = []
    if request.return_offsets:
        end = len(text) - sum(map(len, kept))
        for piece in kept:
            start, end = end, end + len(piece)
            offsets.append(pb.TokenizeResponse.Offset(start=start, end=end))
    return pb.TokenizeResponse(
        token_count=len(kept), tokens=kept if request.return_tokens else None, offsets=offsets or None
    )


def _output_infos(generation: Generation, first_index: int, end_index: int, wishes: Wishes) -> list[pb.TokenInfo]:
    return _token_infos([text or _END_OF_TEXT for text in generation.tokens[first_index:end_index]], wishes)


def _token_infos(texts: Sequence[str], wishes: Wishes) -> list[pb.TokenInfo]:
    """Describe tokens: the simulated LLM is always certain, so each has rank 1 and the logarithm of probability 1."""
    return [
        pb.TokenInfo(
            text=text,
            rank=1 if wishes.shows_ranks else 0,
            top_tokens=[pb.TokenInfo.TopToken(text=text)] if wishes.top_count else None,
        )
        for text in texts
    ]
