"""Turns a corner case into the requests that bring a server into it.

Invariant: no request has more input and output tokens than the corner case gives it. A server is brought to a state by
long inputs and few output tokens, which take a fraction of the time that generating the state would.
"""

from dataclasses import dataclass
from math import ceil

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import Server

_LEAST_STEPS = 8
"""Output tokens of a request that has to be there until the last of the others is."""
_STEPS_PER_PREFILL = {Server.TGIS: 4, Server.TGI: 20, Server.VLLM: 2}
"""Decode steps that a server may make between two prefills; TGI and TGIS let requests wait for a time."""
_MOST_STEPS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestGroup:
    """Requests of one shape that are sent at once."""

    request_count: int
    input_tokens: int
    output_tokens: int
    wants_input_logprobs: bool = False

    @property
    def token_count(self) -> int:
        """Tokens of all requests at their end."""
        return self.request_count * (self.input_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequests:
    """What to send for a corner case."""

    first: tuple[RequestGroup, ...]
    """Sent at once."""
    then: tuple[RequestGroup, ...]
    """Sent when all of `first` make tokens."""

    @property
    def request_count(self) -> int:
        """Requests of all groups."""
        return sum(group.request_count for group in (*self.first, *self.then))


def batch_requests(
    batch: Batch, limits: Limits, *, longest_input: int | None = None, patience: int = 1
) -> BatchRequests:
    """Return what to send.

    longest_input: what the server admits, where that is less than the limits do. patience: how many times as long as
    usual a request stays there for the others.
    """
    longest = min(limits.longest_input, longest_input or limits.longest_input)
    standing = (*batch.residents, *batch.decode)
    steps = min(patience * _steps(standing, limits), _MOST_STEPS)
    first = tuple(_standing_group(rows, limits, longest, steps) for rows in standing)
    prefills = tuple(
        RequestGroup(
            request_count=rows.request_count,
            input_tokens=min(rows.context_tokens + rows.input_tokens, longest),
            output_tokens=max(1, rows.output_tokens),
            wants_input_logprobs=batch.all_logits,
        )
        for rows in batch.prefill
    )
    return BatchRequests(first=first, then=prefills) if first else BatchRequests(first=prefills, then=())


def _standing_group(rows: Rows, limits: Limits, longest_input: int, steps: int) -> RequestGroup:
    """Return requests that reach the length of these rows and stay for so many steps."""
    if limits.is_encoder_decoder:  # the two kinds of tokens are not each other's equal: a long reply must be made
        output = min(max(1, rows.output_tokens), limits.most_new_tokens)
        return RequestGroup(
            request_count=rows.request_count,
            input_tokens=min(max(1, rows.context_tokens + rows.input_tokens), longest_input),
            output_tokens=output,
        )
    total = rows.sequence_tokens
    output = max(1, min(steps, limits.most_new_tokens, total - 1))
    input_tokens = min(total - output, longest_input)
    return RequestGroup(
        request_count=rows.request_count,
        input_tokens=max(1, input_tokens),
        output_tokens=max(1, min(total - input_tokens, limits.most_new_tokens)),
    )


def _steps(rows: tuple[Rows, ...], limits: Limits) -> int:
    """Return how long a request has to stay until the last one is there."""
    return _LEAST_STEPS + _wave_count(rows, limits) * _STEPS_PER_PREFILL[limits.rules.server]


def _wave_count(rows: tuple[Rows, ...], limits: Limits) -> int:
    """Return in how many prefills a server reads the inputs of these rows."""
    if limits.prefill_limit is None:
        return 1
    count = 0
    for each in rows:
        weight = limits.prefill_weight(1, max(1, each.sequence_tokens))
        if limits.rules.chunks_prefills:
            count += ceil(each.request_count * weight / limits.prefill_limit)
        else:
            count += ceil(each.request_count / max(1, limits.prefill_limit // max(1, weight)))
    return max(1, count)
