"""Streams of random numbers of which any one is reached at once: SplitMix64 (Steele et al., 2014), counted.

Number i of stream s under a seed is mix(key(seed, s) + (i + 1) * GOLDEN). So request i has the same numbers however a
stream is cut, wherever it is resumed and whichever replica draws it, which numpy's Generators cannot give: theirs
depend on what was drawn before. That is the reason for this exception to "randomness is a Generator argument".
Invariant: a number depends on the seed, the stream and its index alone; on nothing that this process did before.
Each stream is a stretch of one cycle of 2^64 numbers, begun at a random place: of a hundred streams of 10^12 numbers,
two overlap with a chance of 10^-3 at most. `drawing.py` computes the same numbers in compiled code.
"""

import numpy as np

from llmpilot_workload_generator.model import Keys

GOLDEN = 0x9E3779B97F4A7C15
LARGEST_SEED = 2**64 - 1

_WORD = 2**64 - 1
_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB


def mix(numbers: Keys) -> Keys:
    """Return for each number one that looks random: the finalizer of SplitMix64, which maps one to one."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
    return mixed ^ (mixed >> np.uint64(31))


def stream_key(seed: int, stream: int) -> int:
    """Return where a stream begins: number `stream` of the sequence that SplitMix64 makes of a mixed seed."""
    begin = _mixed(seed + GOLDEN)
    return _mixed(begin + (stream + 1) * GOLDEN)


def random_numbers(key: int, start: int, count: int) -> Keys:
    """Return numbers `start` to `start + count - 1` of the stream that begins at a key, each from 0 to 2^64 - 1."""
    indices = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(start)
    return mix(indices * np.uint64(GOLDEN) + np.uint64(key))


def _mixed(number: int) -> int:
    return int(mix(np.array([number & _WORD], np.uint64))[0])
