"""The batch of a server that pads which needs most by the formulas of one LLM.

The hull of `corners_hull` knows tokens, scores and rows, whatever they cost. An LLM's memory has more in it: a mask
that one request has not, a position bias of the square of the longest input (5 % of a T5's memory between two corners),
a cache that a window cuts. Where the formulas know of a batch that needs more than every corner case, it is one too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

import numpy as np

from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_perfmodel.step_memory.moment import Amount, Floats
from llmpilot_tuner.domain.corners_candidates import SHORTEST, Ints, grown, prefill_candidates
from llmpilot_tuner.domain.corners_decoder import decode_batch, padded_decodes
from llmpilot_tuner.domain.corners_encoder_decoder import decode_steps, decoder_rows
from llmpilot_tuner.domain.limits import Limits

Filling: TypeAlias = tuple[tuple[Floats, Floats], ...]
"""Groups of residents: of each prefill how many, and the tokens of each."""

_ROUNDING = 1e-9


class Costs(Protocol):
    """What one LLM's batches need; see `StepMemoryModel`, but for the weights, which all of them have."""

    def __call__(self, batch: Batch) -> float:
        """Return the bytes of a batch at its peak, weights included."""

    def prefill_bytes(
        self, requests: Amount, lengths: Amount, residents: Sequence[tuple[Amount, Amount]], *, all_logits: bool = False
    ) -> Floats:
        """Return what each of many padded prefills takes beside the weights."""

    def decode_bytes(self, requests: Amount, inputs: Amount, outputs: Amount) -> Floats:
        """Return what each of many padded decode steps takes beside the weights."""


def dearest_batches(limits: Limits, weight: int, costs: Costs, corners: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the batch of a server that pads that needs most, if no corner case needs as much."""
    batch = max((*_prefills(limits, weight, costs), _decode(limits, weight, costs)), key=costs)
    if costs(batch) > max(map(costs, corners)) * (1 + _ROUNDING):
        yield replace(batch, case=f"{batch.case}_dearest")


def _prefills(limits: Limits, weight: int, costs: Costs) -> Iterator[Batch]:
    """Yield the dearest prefill beside few long residents, and the dearest beside many short ones."""
    candidates = prefill_candidates(limits, weight)
    if not len(candidates):
        return
    requests, lengths, tokens, longest = candidates.astype(np.float64).T
    full = tokens // longest
    fillings: list[Filling] = [((full, longest), (np.ones_like(full), tokens - full * longest))]
    if limits.rules.weight_definition is WeightDefinition.TOKENS:
        fillings.append(_even(limits.most_requests - requests, tokens))
    for all_logits in (False, True) if limits.prompt_logprobs else (False,):
        for filling in fillings:
            needs = costs.prefill_bytes(requests, lengths, filling, all_logits=all_logits)
            index = int(needs.argmax())
            groups = [(int(count[index]), int(length[index])) for count, length in filling]
            yield _prefill(limits, int(requests[index]), int(lengths[index]), groups, all_logits=all_logits)


def _even(room: Floats, tokens: Floats) -> Filling:
    """Return so many residents or fewer, as alike as can be: what a window cuts is least."""
    count = np.minimum(room, tokens // SHORTEST)
    each = tokens // np.maximum(count, 1)
    longer = tokens - count * each
    return (longer, each + 1), (count - longer, each)


def _prefill(
    limits: Limits, count: int, length: int, residents: Iterable[tuple[int, int]], *, all_logits: bool
) -> Batch:
    output = 1 if limits.is_encoder_decoder else limits.most_new_tokens
    return Batch(
        case="logits_all" if all_logits else "prefill",
        prefill=(Rows(request_count=count, input_tokens=length, output_tokens=1),),
        residents=tuple(grown(n, each, output) for n, each in residents if n and each >= SHORTEST),
        all_logits=all_logits,
    )


def _decode(limits: Limits, weight: int, costs: Costs) -> Batch:
    steps = decode_steps(limits, weight) if limits.is_encoder_decoder else _decoder_only(limits, weight)
    requests, inputs, outputs = steps.astype(np.float64).T
    count, read, made = steps[int(costs.decode_bytes(requests, inputs, outputs).argmax())].tolist()
    if limits.is_encoder_decoder:
        return decode_batch("decode", decoder_rows(limits, count, read, made), limits)
    return decode_batch("decode", (grown(count, read + made, limits.most_new_tokens),), limits)


def _decoder_only(limits: Limits, weight: int) -> Ints:
    counts, lengths = padded_decodes(limits, weight).T
    return np.stack([counts, lengths - 1, np.ones_like(counts)], axis=1)
