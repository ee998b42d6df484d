"""No admissible batch needs more memory than the corner cases: every batch of small limits, against random memories.

The memory is the form of the servers' peak: cache + the larger of attention (tokens, squares of tokens) and logits
(tokens, rows), each with a random cost >= 0. Batches are listed by brute force: every multiset of requests, every
rectangle, with every filling by residents.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
import pytest

from llmpilot_perfmodel.step_memory.batch import Batch, Layout, Rows
from llmpilot_tuner.domain.admissibility import is_admissible
from llmpilot_tuner.domain.corners import corner_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import TGI, TGI_PADDED, TGIS_FLASH, TGIS_PADDED, VLLM, ServerRules

MEMORIES = 60
Features = npt.NDArray[np.float64]

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


def grouped(lengths: tuple[int, ...], limits: Limits, *, new: bool) -> tuple[Rows, ...]:
    """Return requests of these tokens each, those that are not new at the end of their lives."""
    rows = []
    for length in sorted(set(lengths)):
        output = 1 if new else min(limits.most_new_tokens, length - 1)
        rows.append(Rows(request_count=lengths.count(length), input_tokens=length - output, output_tokens=output))
    return tuple(rows)


def packed_batches(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield every multiset of requests, as a prefill and as a decode step."""
    for count in range(1, limits.most_requests + 1):
        for lengths in combinations_with_replacement(range(2, limits.longest_sequence + 1), count):
            total = sum(lengths)
            if total <= weight:
                yield Batch(case="", prefill=grouped(lengths, limits, new=True), pool_tokens=weight)
                decode = grouped(lengths, limits, new=False)
                copied = limits.rules.extra_caches * total
                yield Batch(case="", decode=decode, pool_tokens=weight, copied_tokens=copied)


def chunked_batches(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield every multiset of chunks, of any context, and of decode steps."""
    size = limits.rules.block_size
    pool = max(weight, -(-limits.longest_sequence // size) * size) // size * size
    kinds = [(0, 0, length) for length in range(2, limits.longest_sequence + 1)]
    kinds += [
        (read, before, 0)
        for read in range(1, limits.longest_sequence)
        for before in range(limits.longest_sequence - read)
        # Blocks are what limits context: a shorter one in as many blocks has nothing that this one has not.
        if (before + read + 1) % size == 0 or before + read + 1 == limits.longest_sequence or before == 0
    ]
    kinds = [kind for kind in kinds if not kind[2] or kind[2] % size == 0 or kind[2] == limits.longest_sequence]
    for count in range(1, limits.most_requests + 1):
        for chosen in combinations_with_replacement(kinds, count):
            prefill = tuple(
                Rows(request_count=1, input_tokens=read, output_tokens=1, context_tokens=before)
                for read, before, length in chosen
                if not length
            )
            decode = grouped(tuple(length for _, _, length in chosen if length), limits, new=False)
            yield Batch(case="", prefill=prefill, decode=decode, pool_tokens=pool)


def padded_batches(limits: Limits) -> Iterator[Batch]:
    """Yield every rectangle, those of requests that are not alike included, with every rectangle of residents."""
    pairs = [(i, o) for i in range(1, limits.longest_sequence) for o in range(1, limits.longest_sequence - i + 1)]
    ends = [(i, o) for i, o in pairs if o <= limits.most_new_tokens]
    if not limits.is_encoder_decoder:
        ends = [(i, o) for i, o in ends if o == min(limits.most_new_tokens, i + o - 1)]
    for count in range(1, limits.most_requests + 1):
        for inputs, outputs in ends:
            alike = (Rows(request_count=count, input_tokens=inputs, output_tokens=outputs),)
            yield Batch(case="", decode=alike)
            if count > 1:
                for other in ends:
                    rest = Rows(request_count=1, input_tokens=other[0], output_tokens=other[1])
                    yield Batch(case="", decode=(replace(alike[0], request_count=count - 1), rest))
        for length in range(1, limits.longest_sequence):
            prefill = (Rows(request_count=count, input_tokens=length, output_tokens=1),)
            yield Batch(case="", prefill=prefill)
            for resident_count in range(1, limits.most_requests - count + 1):
                for inputs, outputs in ends:
                    residents = (Rows(request_count=resident_count, input_tokens=inputs, output_tokens=outputs),)
                    yield Batch(case="", prefill=prefill, residents=residents)


def check(limits: Limits, weight: int) -> float:
    """Return how much more a batch needs than the corners do, as a share, at most over memories."""
    if limits.rules.chunks_prefills:
        every = chunked_batches(limits, weight)
    elif limits.rules.layout is Layout.PADDED:
        every = padded_batches(limits)
    else:
        every = packed_batches(limits, weight)
    admitted = [features(batch, limits) for batch in every if is_admissible(batch, limits, weight)]
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
