"""No admissible batch needs more memory than the corner cases: every batch of small limits, against random memories.

The memory is the form of the servers' peak: cache + the larger of attention (tokens, squares of tokens) and logits
(tokens, rows), each with a random cost >= 0. Batches are listed by brute force: every multiset of requests, every
rectangle, with every filling by residents.
"""

import runpy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llmpilot_perfmodel.step_memory.batch import Batch, Layout
from llmpilot_tuner.domain.admissibility import is_admissible
from llmpilot_tuner.domain.corners import corner_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import TGI, TGI_PADDED, TGIS_FLASH, TGIS_PADDED, VLLM, ServerRules

MEMORIES = 60
Features = npt.NDArray[np.float64]

EVERY_BATCH: Callable[[Limits, int], Iterator[Batch]] = runpy.run_path(str(Path(__file__).with_name("every_batch.py")))[
    "every_batch"
]
PAGED = replace(VLLM, block_size=4)


def features(batch: Batch, limits: Limits) -> Features:
    """Return what is paid for: cache (of inputs, of outputs), then for each phase tokens and squares or rows."""
    prefill, decode = batch.prefill, batch.decode
    step = (*prefill, *decode)
    new = sum(rows.request_count for rows in prefill)
    count = sum(rows.request_count for rows in step)
    inputs = sum(rows.request_count * rows.input_tokens for rows in step)
    outputs = sum(rows.request_count * rows.output_tokens for rows in decode)
    squares = sum(
        rows.request_count * rows.input_tokens * (rows.input_tokens + rows.context_tokens) for rows in prefill
    )
    if limits.rules.layout is Layout.PADDED:
        width = max(rows.input_tokens for rows in step)
        depth = max(rows.output_tokens for rows in decode) if decode else 0
        if decode and not limits.is_encoder_decoder:
            width, depth = max(rows.sequence_tokens for rows in decode), 0
        inputs, outputs = count * width, count * depth
        squares = count * width**2 if prefill else 0
    read = inputs if prefill else 0
    if limits.rules.layout is Layout.PACKED:
        read = batch.prefill_tokens + (
            sum(rows.request_count for rows in decode) if limits.rules.chunks_prefills else 0
        )
        # A pool is read in place: of a decode step's tokens only the longest request's can cost.
        decoded = max((rows.sequence_tokens for rows in decode), default=0)
        cache = [batch.pool_tokens + batch.copied_tokens, 0]
        rows = count if limits.rules.chunks_prefills else new
        return np.array([*cache, read, squares, read, rows, decoded, 0, count if decode else 0], dtype=np.float64)
    resident_outputs = sum(rows.request_count * rows.output_tokens for rows in batch.residents)
    resident_inputs = sum(rows.token_count for rows in batch.residents) - resident_outputs
    if not limits.is_encoder_decoder:
        resident_inputs, resident_outputs = resident_inputs + resident_outputs, 0
    cache = [inputs + resident_inputs, outputs + resident_outputs]
    decoding = [inputs, outputs, count] if decode else [0, 0, 0]
    return np.array([*cache, read, squares, read, new, *decoding], dtype=np.float64)


def memories(limits: Limits, seed: int) -> list[tuple[Features, Features]]:
    """Return costs of the cache, and of each phase; some of them 0, over four orders of magnitude."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(MEMORIES):
        costs = 10 ** generator.uniform(-2, 2, 9) * (generator.random(9) < 0.8)
        if limits.is_encoder_decoder:
            # The cache of an input token is as large as that of an output token.
            costs[0] = costs[1]
        phases = np.zeros((3, 9))
        phases[0, [2, 3]] = costs[[2, 3]]
        phases[1, [4, 5]] = costs[[4, 5]]
        phases[2, [6, 7, 8]] = costs[[6, 7, 8]]
        cache = np.zeros(9)
        cache[:2] = costs[:2]
        found.append((cache, phases))
    return found


def worst(points: Features, cache: Features, phases: Features) -> float:
    """Return the memory of the batch that needs most."""
    return float((points @ cache + (points @ phases.T).max(axis=1)).max())


@lru_cache(maxsize=1)
def padded(limits: Limits) -> list[tuple[Batch, Features]]:
    """Return every batch of a server that pads, none of which depends on the weight, with its features."""
    return [(batch, features(batch, limits)) for batch in EVERY_BATCH(limits, 0)]


def every(limits: Limits, weight: int) -> Iterable[tuple[Batch, Features]]:
    """Return every batch with its features."""
    if limits.rules.layout is Layout.PADDED:
        return padded(limits)
    return ((batch, features(batch, limits)) for batch in EVERY_BATCH(limits, weight))


def check(limits: Limits, weight: int) -> float:
    """Return how much more a batch needs than the corners do, as a share, at most over memories."""
    admitted = [numbers for batch, numbers in every(limits, weight) if is_admissible(batch, limits, weight)]
    points = np.unique(np.array(admitted), axis=0)
    corners = np.array([features(batch, limits) for batch in corner_batches(limits, weight)])
    excess = [
        worst(points, cache, phases) / max(worst(corners, cache, phases), 1e-9) - 1
        for cache, phases in memories(limits, seed=weight)
    ]
    return max(excess)


CASES = [
    (TGIS_FLASH, False, [(7, 3, 5), (5, 4, 6)]),
    (TGI, False, [(8, 3, 5)]),
    (TGIS_PADDED, False, [(7, 3, 6), (9, 2, 4)]),
    (TGI_PADDED, False, [(7, 3, 6), (9, 2, 5)]),
    (TGIS_PADDED, True, [(6, 3, 5)]),
    (TGI_PADDED, True, [(6, 3, 5), (7, 6, 4)]),
    (PAGED, False, [(9, 3, 3), (6, 3, 4)]),
]


@pytest.mark.parametrize(("rules", "is_encoder_decoder", "sizes"), CASES)
@pytest.mark.parametrize("is_limited", [False, True])
def test_no_admissible_batch_needs_more_than_the_corners(
    rules: ServerRules, is_encoder_decoder: bool, sizes: list[tuple[int, int, int]], is_limited: bool
) -> None:
    """At every weight from the lowest to the highest."""
    excess = {}
    for longest, new, requests in sizes:
        limits = Limits(
            rules=rules,
            longest_sequence=longest,
            most_new_tokens=new,
            most_requests=requests,
            is_encoder_decoder=is_encoder_decoder,
        )
        if is_limited:
            least = requests if rules.chunks_prefills else limits.prefill_weight(1, longest - 1)
            limits = replace(limits, prefill_limit=least + max(1, least // 4))
        step = (2 if rules.chunks_prefills else 1) if limits.highest_weight < 60 else 7
        for weight in range(limits.lowest_weight, limits.highest_weight + 1, step):
            more = check(limits, weight)
            if more > 1e-9:
                excess[longest, new, requests, weight] = more
    assert not excess
