"""What a server that pads can be made to hold: new requests, and as many others as fill its maximum batch weight.

Invariant: a resident has at least one token of input and one of output, and a server's longest sequence at most.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Layout, Rows
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import PrefillWeight

Ints: TypeAlias = npt.NDArray[np.int64]

SHORTEST = 2
"""Tokens of a request that has been read: one of input, one of output."""
WINDOW = 32
"""How many ways to fill a square weight with residents are looked at per count of new requests: more than 31 lengths
above the shortest that there may be, residents that are longer but fewer have fewer tokens."""


class Candidate(NamedTuple):
    """A prefill of a rectangle while other requests lie in the cache."""

    requests: int
    length: int
    """Input tokens of each new request."""
    resident_tokens: int
    resident_length: int
    """Most tokens of a resident."""


def counts_of(limits: Limits) -> Ints:
    """Return every count of requests that there may be."""
    return np.arange(1, limits.most_requests + 1, dtype=np.int64)


def longest_sequences(limits: Limits, weight: int, *, padded: bool = False) -> Ints:
    """Return, for every count of requests, the most tokens that each can have; padded: by being as wide as others."""
    each = weight // counts_of(limits)
    if limits.rules.weight_definition is WeightDefinition.PADDED_SQUARED:
        each = np.array([math.isqrt(int(square)) for square in each], dtype=np.int64)
    return each if padded else np.minimum(each, limits.longest_sequence)


def longest_prefills(limits: Limits) -> Ints:
    """Return, for every count of requests, the most input tokens that each can have in one prefill; 0: too many."""
    counts, limit = counts_of(limits), limits.prefill_limit
    if limit is None:
        return np.full_like(counts, limits.longest_input)
    if limits.rules.layout is Layout.PACKED or limits.rules.prefill_weight is PrefillWeight.TOKENS:
        return np.minimum(limit // counts, limits.longest_input)
    lengths = np.minimum(((limit + 1) / counts) ** (2 / 3) + 1, limits.longest_input).astype(np.int64)
    for _ in range(2):
        weights = np.floor(counts * lengths.astype(np.float64) ** 1.5)
        lengths = np.where(weights > limit, lengths - 1, lengths)
    return lengths


def prefill_candidates(limits: Limits, weight: int) -> Ints:
    """Return, for every count of new requests, prefills of rectangles that leave nothing of the weight unused.

    One row per candidate, with the columns of `Candidate`, counts ascending.
    """
    lengths = np.minimum(longest_sequences(limits, weight) - 1, longest_prefills(limits))
    if limits.rules.weight_definition is WeightDefinition.TOKENS:
        found = _of_tokens(limits, weight, lengths)
    else:
        found = _of_squares(limits, weight, lengths)
    found = found[found[:, 1] > 0]
    return found[np.argsort(found[:, 0], kind="stable")]


def is_mixed(limits: Limits, weight: int) -> bool:
    """Return whether the prefill limit leaves room for residents beside a full prefill."""
    most = longest_sequences(limits, weight) - 1
    return bool(((longest_prefills(limits) < most) & (most > 0)).any())


def _of_tokens(limits: Limits, weight: int, lengths: Ints) -> Ints:
    counts, longest = counts_of(limits), limits.longest_sequence
    left = weight - counts * (lengths + 1)
    room = (limits.most_requests - counts) * longest
    # One token is too little for a resident: one token less for each of the new ones makes room for it.
    tight = (left == 1) & (lengths > 1) & (room > 0)
    counts, lengths = np.concatenate([counts, counts[tight]]), np.concatenate([lengths, lengths[tight] - 1])
    room = np.concatenate([room, room[tight]])
    residents = np.minimum(weight - counts * (lengths + 1), room)
    residents = np.where(residents < SHORTEST, 0, residents)
    if longest == SHORTEST:
        residents -= residents % SHORTEST
    return np.stack([counts, lengths, residents, np.full_like(counts, longest)], axis=1)


def _of_squares(limits: Limits, weight: int, lengths: Ints) -> Ints:
    """All requests, new and resident, weigh as the longest does, so that longer new ones leave room for fewer."""
    counts, prefills = counts_of(limits), longest_prefills(limits)
    sequences = longest_sequences(limits, weight)
    # Of the counts of all requests that allow the same length only the largest is of use.
    useful = np.append(sequences[1:] < sequences[:-1], True) & (sequences >= SHORTEST)
    totals, each = counts[useful], sequences[useful]
    # Short of the prefill limit memory is linear in how many of all requests are new; beyond it fewer are longer.
    within = np.searchsorted(-prefills, -(each - 1), side="right")
    found = []
    for new in (np.ones_like(totals), np.clip(within, 1, totals), totals):
        length = np.minimum(each - 1, prefills[new - 1])
        found.append(np.stack([new, length, (totals - new) * each, each], axis=1))
    ends = np.searchsorted(-each, -lengths, side="left")
    spots = ends[:, None] - 1 - np.arange(WINDOW)
    inside = np.maximum(spots, 0)
    tokens = np.where(spots >= 0, (totals[inside] - counts[:, None]) * each[inside], -1)
    best = tokens.argmax(axis=1)
    spot = np.take_along_axis(inside, best[:, None], axis=1)[:, 0]
    fits = tokens.max(axis=1) >= 0
    found.append(np.stack([counts, lengths, tokens.max(axis=1), each[spot]], axis=1)[fits & (lengths > 0)])
    return np.concatenate(found)


def grown(count: int, tokens: int, most_new_tokens: int) -> Rows:
    """Return requests of so many tokens each at the end of their lives: as many of output as may be."""
    output = min(most_new_tokens, tokens - 1)
    return Rows(request_count=count, input_tokens=tokens - output, output_tokens=output)


def resident_rows(tokens: int, longest: int, most_new_tokens: int) -> tuple[Rows, ...]:
    """Return the fewest requests that have so many tokens together."""
    full, rest = divmod(tokens, longest)
    lengths = [(full, longest)]
    if rest >= SHORTEST:
        lengths.append((1, rest))
    elif rest:
        lengths = [(full - 1, longest), (1, longest - 1), (1, SHORTEST)]
    return tuple(grown(count, length, most_new_tokens) for count, length in lengths if count)
