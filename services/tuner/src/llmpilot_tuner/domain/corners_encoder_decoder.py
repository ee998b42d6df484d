"""Corner cases of encoder-decoder LLMs, which every server pads.

A prefill runs the encoder and the first decoder step; its residents are long inputs with one token of output, as an
input token costs at least what an output token does (its cross-attention cache is as large, and its hidden state
stays). A decode step has long outputs or long inputs: what a token costs there is linear in each, so that of requests
of one length only the one with most output and the one with least can cost most.
"""

from collections.abc import Iterator

import numpy as np

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.corners_candidates import Ints, is_mixed, prefill_candidates
from llmpilot_tuner.domain.corners_decoder import decode_batch, padded_batches, padded_decodes
from llmpilot_tuner.domain.corners_hull import needed
from llmpilot_tuner.domain.limits import Limits


def encoder_decoder_corners(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield the corner cases of a server of an encoder-decoder."""
    decodes = padded_decodes(limits, weight)
    most = int((decodes[:, 0] * (decodes[:, 1] - 1)).max())
    candidates = prefill_candidates(limits, weight)
    counts, lengths, residents, longest = candidates.astype(np.float64).T
    read = counts * lengths
    inputs = read + residents - np.ceil(residents / longest)
    features = np.stack([inputs, read, read * lengths, counts], axis=1)
    given = (most, 0, 0)
    attention = needed(features[:, :3], given=given)
    kept = {*attention, *needed(features[:, [0, 1, 3]], given=given, beside=attention)}
    family = "mixed" if is_mixed(limits, weight) else "enc"
    yield from padded_batches(family, candidates[sorted(kept)], limits)
    yield from _decodes(limits, decodes)


def decoder_rows(limits: Limits, count: int, length: int) -> tuple[Rows, Rows]:
    """Return requests of so many tokens each: those with most output, and those with one token of it."""
    output = min(limits.most_new_tokens, length - 1)
    return (
        Rows(request_count=count, input_tokens=length - output, output_tokens=output),
        Rows(request_count=count, input_tokens=length - 1, output_tokens=1),
    )


def _decodes(limits: Limits, decodes: Ints) -> Iterator[Batch]:
    counts, lengths = np.repeat(decodes, 2, axis=0).T
    outputs = np.minimum(lengths - 1, limits.most_new_tokens)
    outputs[1::2] = 1
    inputs = lengths - outputs
    kept = needed(np.stack([counts * inputs, counts * outputs, counts], axis=1).astype(np.float64))
    chosen = [decoder_rows(limits, int(counts[index]), int(lengths[index]))[index % 2] for index in kept]
    for name, rows in zip(_names(chosen), chosen, strict=True):
        yield decode_batch(name, (rows,), limits)


def _names(steps: list[Rows]) -> list[str]:
    """Return a name for each: the extreme that it is, of several the first."""
    names = [""] * len(steps)
    indexes = range(len(steps))
    roles = {
        "dec_many": max(indexes, key=lambda index: (steps[index].request_count, steps[index].output_tokens)),
        "dec_long_self": max(indexes, key=lambda index: steps[index].request_count * steps[index].output_tokens),
        "dec_long_cross": max(indexes, key=lambda index: steps[index].request_count * steps[index].input_tokens),
        "dec_long_both": max(indexes, key=lambda index: steps[index].token_count),
    }
    for name, index in roles.items():
        names[index] = names[index] or name
    free = [index for index in indexes if not names[index]]
    for position, index in enumerate(free, 1):
        names[index] = "dec_edge" if position == 1 else f"dec_edge{position}"
    return names
