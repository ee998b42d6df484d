"""The few extreme batches that a server with given limits and a maximum batch weight can be made to run.

Invariant: for every memory that grows with tokens, with squares of tokens by request (attention scores) and with rows
(logits), no batch that the server admits needs more than the one of these that needs most, but where a docstring of
`corners_*` says so. Counts of requests are enumerated: the ends of a formula can miss 29 % of the memory, as
floor(weight / longest sequence) strands tokens. Weights are instantaneous: a request weighs its input and the output
it has so far, a prefill has room for its first token, and a server that pads weighs the rectangle.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.step_memory.batch import Batch, Layout, Rows
from llmpilot_tuner.domain.corners_candidates import grown, prefill_candidates
from llmpilot_tuner.domain.corners_chunked import chunked_corners, chunked_sweep
from llmpilot_tuner.domain.corners_dearest import Costs, dearest_batches
from llmpilot_tuner.domain.corners_decoder import (
    decode_batch,
    packed_batch,
    packed_corners,
    packed_decode,
    packed_prefill,
    padded_batches,
    padded_corners,
    padded_decodes,
)
from llmpilot_tuner.domain.corners_encoder_decoder import decoder_sweep, encoder_decoder_corners
from llmpilot_tuner.domain.limits import Limits

Step = tuple[tuple[Rows, ...], tuple[Rows, ...], tuple[Rows, ...], int, bool]


def corner_batches(limits: Limits, weight: int, costs: Costs | None = None) -> tuple[Batch, ...]:
    """Return the corner cases of a maximum batch weight, none twice; InvalidInputError below the lowest weight.

    costs: of the LLM, where known: the batch of a server that pads which needs most by them is among the cases.
    """
    _check(limits, weight)
    if limits.rules.chunks_prefills:
        found = chunked_corners(limits, weight)
    elif limits.is_encoder_decoder:
        found = encoder_decoder_corners(limits, weight)
    elif limits.rules.layout is Layout.PADDED:
        found = padded_corners(limits, weight)
    else:
        found = packed_corners(limits, weight)
    corners = tuple(_distinct(found, set()))
    if costs is None or limits.rules.layout is not Layout.PADDED:
        return corners
    return (*corners, *dearest_batches(limits, weight, costs, corners))


def sweep_batches(limits: Limits, weight: int) -> tuple[Batch, ...]:
    """Return full batches of 1, 2, 4, ... requests that are no corner cases: kernels' workspaces depend on counts."""
    corners = corner_batches(limits, weight)
    counts = [2**power for power in range(limits.most_requests.bit_length())]
    if limits.rules.chunks_prefills:
        found = chunked_sweep(limits, weight, counts)
    elif limits.rules.layout is Layout.PADDED:
        found = _padded_sweep(limits, weight, counts)
    else:
        found = _packed_sweep(limits, weight, counts)
    return tuple(_distinct(found, {_step(batch) for batch in corners}))


def _check(limits: Limits, weight: int) -> None:
    violations = limits.violations()
    if not violations and weight < limits.lowest_weight:
        word = f"must be >= {limits.lowest_weight}, the weight of one longest request, is {weight}"
        violations = [Violation("weight", word)]
    if violations:
        raise InvalidInputError(violations)


def _step(batch: Batch) -> Step:
    return batch.prefill, batch.decode, batch.residents, batch.copied_tokens, batch.all_logits


def _distinct(batches: Iterator[Batch], known: set[Step]) -> Iterator[Batch]:
    for batch in batches:
        step = _step(batch)
        if step not in known:
            known.add(step)
            yield batch


def _padded_sweep(limits: Limits, weight: int, counts: list[int]) -> Iterator[Batch]:
    candidates = prefill_candidates(limits, weight)
    decodes = {int(count): int(length) for count, length in padded_decodes(limits, weight)}
    for count in counts:
        alike = candidates[candidates[:, 0] == count]
        if len(alike):
            fullest = np.lexsort((alike[:, 2], alike[:, 1]))[-1:]
            for batch in padded_batches("prefill", alike[fullest], limits):
                yield replace(batch, case=f"sweep_prefill_{count}")
        if count in decodes and not limits.is_encoder_decoder:
            rows = grown(count, decodes[count], limits.most_new_tokens)
            yield decode_batch(f"sweep_decode_{count}", (rows,), limits)
    if limits.is_encoder_decoder:
        yield from decoder_sweep(limits, weight, counts)


def _packed_sweep(limits: Limits, weight: int, counts: list[int]) -> Iterator[Batch]:
    for count in counts:
        reads = packed_prefill(limits, weight, count)
        if reads:
            yield packed_batch(f"sweep_prefill_{count}", reads, limits, weight)
        rows = packed_decode(limits, weight, count)
        if rows:
            yield decode_batch(f"sweep_decode_{count}", rows, limits, weight)
