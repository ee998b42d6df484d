"""Corner cases of decoder-only LLMs, on servers that read an input in one step.

Padded: every count of new requests is looked at, with the longest inputs that fit and with residents that fill the
rest of the weight; those are kept that the hull of their features needs (see `corners_hull`): inputs as long as may
be, as many tokens, as many requests, and what integers leave between them. Residents are counted token by token,
though a server may pad them: a few tokens more than can be, never fewer.

Packed: the pool of the cache is as large as the weight whatever lies in it, and requests need not be alike, so that
no token is stranded: every count of requests has its most unlike lengths, and of all counts the hull keeps the fewest
requests (tokens, longest inputs) and the most (rows of logits), and few between them.

Left out, as others need at least as much: a prefill below a full one; "one longest sequence"; a full input and output
at decode (the longest sequences have the same cache); and the moment that a server concatenates caches, which the
decode step after it exceeds: it has the same copies, and activations too.
"""

from collections.abc import Iterator

import numpy as np

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.corners_candidates import (
    SHORTEST,
    Candidate,
    Ints,
    counts_of,
    grown,
    is_mixed,
    longest_sequences,
    prefill_candidates,
    resident_rows,
)
from llmpilot_tuner.domain.corners_hull import needed
from llmpilot_tuner.domain.corners_names import named
from llmpilot_tuner.domain.limits import Limits

Groups = list[tuple[int, int]]
"""Counts of requests, and tokens of each."""


def padded_corners(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield the corner cases of a server that pads."""
    decodes = padded_decodes(limits, weight)
    tokens = decodes.prod(axis=1)
    yield from _padded_prefills(limits, weight, int(tokens.max()))
    kept = needed(np.stack([tokens, decodes[:, 0]], axis=1).astype(np.float64))
    shapes = [(int(count), int(length), int(count * length)) for count, length in decodes[kept]]
    for name, (count, length, _) in zip(named("decode", shapes, late=True), shapes, strict=True):
        yield decode_batch(name, (grown(count, length, limits.most_new_tokens),), limits)


def padded_decodes(limits: Limits, weight: int) -> Ints:
    """Return, for every count of requests, it and the most tokens that each can have."""
    found = np.stack([counts_of(limits), longest_sequences(limits, weight)], axis=1)
    return found[found[:, 1] >= SHORTEST]


def decode_batch(case: str, rows: tuple[Rows, ...], limits: Limits, pool_tokens: int = 0) -> Batch:
    """Return a decode step, with the copies of the cache that a server makes in it."""
    tokens = sum(each.token_count for each in rows)
    return Batch(case=case, decode=rows, pool_tokens=pool_tokens, copied_tokens=limits.rules.extra_caches * tokens)


def _padded_prefills(limits: Limits, weight: int, decode_tokens: int) -> Iterator[Batch]:
    candidates = prefill_candidates(limits, weight)
    counts, lengths, residents, _ = candidates.astype(np.float64).T
    read = counts * lengths
    features = np.stack([read + residents, read, read * lengths, counts], axis=1)
    # A decode step that fills the weight has that cache too: what it outdoes with nothing else is no corner.
    given = (decode_tokens, 0, 0)
    attention = needed(features[:, :3], given=given)
    kept = {*attention, *needed(features[:, [0, 1, 3]], given=given, beside=attention)}
    if limits.prompt_logprobs:
        logits = needed(features[:, :2], given=given[:2])
        yield from padded_batches("logits_all", candidates[logits], limits)
        kept -= set(logits)
    family = "mixed" if is_mixed(limits, weight) else "prefill"
    yield from padded_batches(family, candidates[sorted(kept)], limits)


def padded_batches(family: str, candidates: Ints, limits: Limits) -> Iterator[Batch]:
    """Yield the steps of candidates, with a name for each."""
    shapes = [Candidate(*map(int, row)) for row in candidates]
    names = named(family, [(each.requests, each.length, each.requests * each.length) for each in shapes])
    # An encoder-decoder's input tokens cost at least what its output tokens do.
    output = 1 if limits.is_encoder_decoder else limits.most_new_tokens
    for name, each in zip(names, shapes, strict=True):
        yield Batch(
            case=name,
            prefill=(Rows(request_count=each.requests, input_tokens=each.length, output_tokens=1),),
            residents=resident_rows(each.resident_tokens, each.resident_length, output),
            all_logits=family == "logits_all",
        )


def packed_corners(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield the corner cases of a server whose cache is a pool."""
    counts = range(1, min(limits.most_requests, weight // SHORTEST) + 1)
    reads = [groups for groups in (_packed_input(limits, weight, count) for count in counts) if groups]
    features = np.array([_features(groups) for groups in reads], dtype=np.float64)
    chosen = sorted({*needed(features[:, :3]), *needed(features[:, [0, 3]])})
    family = "mixed" if limits.prefill_limit is not None and limits.prefill_limit < weight else "prefill"
    if limits.prompt_logprobs:
        most = int(features[:, 0].argmax())
        yield packed_batch("logits_all", _read(reads[most]), limits, weight, all_logits=True)
        chosen = [index for index in chosen if index != most]
    shapes = [(int(features[i, 3]), reads[i][0][1], int(features[i, 0])) for i in chosen]
    for name, index in zip(named(family, shapes), chosen, strict=True):
        yield packed_batch(name, _read(reads[index]), limits, weight)
    decodes = [_packed_output(limits, weight, count) for count in counts]
    features = np.array([_features(groups) for groups in decodes], dtype=np.float64)[:, [0, 2, 3]]
    ends = needed(features)
    shapes = [(int(features[i, 2]), decodes[i][0][1], int(features[i, 0])) for i in ends]
    for name, index in zip(named("decode", shapes, late=True), ends, strict=True):
        yield decode_batch(name, _grown(decodes[index], limits), limits, weight)


def packed_prefill(limits: Limits, weight: int, count: int) -> tuple[Rows, ...]:
    """Return so many inputs of as many tokens as may be, in as few long ones as may be; none: so many do not fit."""
    return _read(_packed_input(limits, weight, count))


def packed_decode(limits: Limits, weight: int, count: int) -> tuple[Rows, ...]:
    """Return so many requests of as many tokens as may be, in as few long ones as may be; none: so many do not fit."""
    return _grown(_packed_output(limits, weight, count), limits)


def _packed_input(limits: Limits, weight: int, count: int) -> Groups:
    limit = weight if limits.prefill_limit is None else limits.prefill_limit
    return ragged(count, min(weight - count, limit), 1, limits.longest_input)


def _packed_output(limits: Limits, weight: int, count: int) -> Groups:
    return ragged(count, weight, SHORTEST, limits.longest_sequence)


def _read(groups: Groups) -> tuple[Rows, ...]:
    return tuple(Rows(request_count=count, input_tokens=length, output_tokens=1) for count, length in groups)


def _grown(groups: Groups, limits: Limits) -> tuple[Rows, ...]:
    return tuple(grown(count, length, limits.most_new_tokens) for count, length in groups)


def _features(groups: Groups) -> tuple[int, int, int, int]:
    """Return tokens, the sum of their squares by request, the square of the longest, and requests."""
    tokens = squares = counts = 0
    for count, length in groups:
        tokens += count * length
        squares += count * length * length
        counts += count
    return tokens, squares, groups[0][1] ** 2, counts


def ragged(count: int, tokens: int, shortest: int, longest: int) -> list[tuple[int, int]]:
    """Return so many requests with so many tokens together, or fewer, as unlike as can be, the longest first."""
    spare = tokens - count * shortest
    if spare < 0:
        return []
    if longest == shortest:
        return [(count, shortest)]
    full, rest = divmod(spare, longest - shortest)
    if full >= count:
        return [(count, longest)]
    groups = [(full, longest), (1, shortest + rest), (count - full - 1, shortest)]
    if not rest:
        groups = [(full, longest), (count - full, shortest)]
    return [group for group in groups if group[0]]


def packed_batch(case: str, reads: tuple[Rows, ...], limits: Limits, weight: int, *, all_logits: bool = False) -> Batch:
    """Return a prefill in a pool, with residents that fill what is left of it."""
    longest = limits.longest_sequence
    room = (limits.most_requests - sum(rows.request_count for rows in reads)) * longest
    tokens = min(weight - sum(rows.token_count for rows in reads), room)
    if tokens < SHORTEST or longest == SHORTEST:
        tokens -= tokens % SHORTEST
    return Batch(
        case=case,
        prefill=reads,
        residents=resident_rows(tokens, longest, limits.most_new_tokens),
        pool_tokens=weight,
        all_logits=all_logits,
    )
