"""Corner cases of encoder-decoder LLMs, which every server pads.

A prefill runs the encoder and the first decoder step; its residents are long inputs with one token of output. An input
token's cross-attention cache is as large as an output token's cache, and both are counted as one here: the hidden
states of residents, 2 % of their cache, are not told apart by how many residents there are. A decode step has long
outputs or long inputs: what a token costs there is linear in each, so that of requests of one width only those with
most output and those with most input can cost most.
"""

from collections.abc import Iterator

import numpy as np

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.corners_candidates import (
    SHORTEST,
    Ints,
    counts_of,
    is_mixed,
    longest_sequences,
    prefill_candidates,
)
from llmpilot_tuner.domain.corners_decoder import decode_batch, padded_batches
from llmpilot_tuner.domain.corners_hull import needed
from llmpilot_tuner.domain.limits import Limits


def encoder_decoder_corners(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield the corner cases of a server of an encoder-decoder."""
    steps = decode_steps(limits, weight)
    most = int((steps[:, 0] * (steps[:, 1] + steps[:, 2])).max())
    candidates = prefill_candidates(limits, weight)
    counts, lengths, residents, _ = candidates.astype(np.float64).T
    read = counts * lengths
    features = np.stack([read + residents, read, read * lengths, counts], axis=1)
    given = (most, 0, 0)
    attention = needed(features[:, :3], given=given)
    kept = {*attention, *needed(features[:, [0, 1, 3]], given=given, beside=attention)}
    family = "mixed" if is_mixed(limits, weight) else "enc"
    yield from padded_batches(family, candidates[sorted(kept)], limits)
    yield from _decodes(limits, steps)


def decoder_rows(limits: Limits, count: int, inputs: int, outputs: int) -> tuple[Rows, ...]:
    """Return requests that take so many input and output tokens each, some of them by being padded."""
    beyond = inputs + outputs - limits.longest_sequence
    if beyond <= 0:
        return (Rows(request_count=count, input_tokens=inputs, output_tokens=outputs),)
    return (
        Rows(request_count=count - 1, input_tokens=inputs, output_tokens=outputs - beyond),
        Rows(request_count=1, input_tokens=inputs - beyond, output_tokens=outputs),
    )


def decoder_sweep(limits: Limits, weight: int, counts: list[int]) -> Iterator[Batch]:
    """Yield, for each count of requests, the decode step of those with most output."""
    for count, inputs, outputs in decode_steps(limits, weight)[::2].tolist():
        if count in counts:
            yield decode_batch(f"sweep_decode_{count}", decoder_rows(limits, count, inputs, outputs), limits)


def decode_steps(limits: Limits, weight: int) -> Ints:
    """Return counts of requests, and input and output tokens of each: of most output, then of most input.

    A batch of one long input and one long output is as wide as both, which is more than the longest sequence.
    """
    counts = counts_of(limits)
    widest = np.where(counts > 1, limits.longest_input + limits.most_new_tokens, limits.longest_sequence)
    widths = np.minimum(longest_sequences(limits, weight, padded=True), widest)
    counts, widths = counts[widths >= SHORTEST], widths[widths >= SHORTEST]
    outputs = np.minimum(widths - 1, limits.most_new_tokens)
    inputs = np.minimum(widths - 1, limits.longest_input)
    most_output = np.stack([counts, widths - outputs, outputs], axis=1)
    most_input = np.stack([counts, inputs, widths - inputs], axis=1)
    return np.stack([most_output, most_input], axis=1).reshape(-1, 3)


def _decodes(limits: Limits, steps: Ints) -> Iterator[Batch]:
    counts, inputs, outputs = steps.T
    kept = needed(np.stack([counts * inputs, counts * outputs, counts], axis=1).astype(np.float64))
    for name, step in zip(_names(steps[kept].tolist()), steps[kept].tolist(), strict=True):
        yield decode_batch(name, decoder_rows(limits, *step), limits)


def _names(steps: list[tuple[int, int, int]]) -> list[str]:
    """Return a name for each: the extreme that it is, of several the first."""
    names = [""] * len(steps)
    indexes = range(len(steps))
    roles = {
        "dec_many": max(indexes, key=lambda index: (steps[index][0], steps[index][2])),
        "dec_long_self": max(indexes, key=lambda index: steps[index][0] * steps[index][2]),
        "dec_long_cross": max(indexes, key=lambda index: steps[index][0] * steps[index][1]),
        "dec_long_both": max(indexes, key=lambda index: steps[index][0] * (steps[index][1] + steps[index][2])),
    }
    for name, index in roles.items():
        names[index] = names[index] or name
    free = [index for index in indexes if not names[index]]
    for position, index in enumerate(free, 1):
        names[index] = "dec_edge" if position == 1 else f"dec_edge{position}"
    return names
