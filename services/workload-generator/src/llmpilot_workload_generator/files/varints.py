"""Whole numbers as varints: seven bits a byte, the lowest first, the top bit set on all bytes but a number's last.

Invariant: what `encode` wrote, `decode` returns exactly; both take as many steps as the longest has bytes.
Source: the varints of Protocol Buffers, and their zigzag coding of numbers that may be negative.
"""

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.model import Integers, Keys

LARGEST_BYTES = 10
"""What a number of 64 bits takes."""
_BITS = np.uint64(7)
_MORE = np.uint8(0x80)


def encode(values: Keys) -> bytes:
    """Return the varints of numbers of 64 bits."""
    lengths = np.ones(len(values), np.intp)
    rest = values >> _BITS
    while rest.any():
        lengths += rest > 0
        rest >>= _BITS
    ends = np.cumsum(lengths)
    content = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(lengths.max(initial=0))):
        (these,) = np.nonzero(lengths > place)
        bits = (values[these] >> np.uint64(7 * place)).astype(np.uint8) | _MORE
        bits[lengths[these] == place + 1] &= ~_MORE
        content[ends[these] - lengths[these] + place] = bits
    return content.tobytes()


def decode(content: bytes, count: int) -> Keys:
    """Return the numbers in `content`; raises ValueError where they are not `count` numbers of 64 bits."""
    encoded = np.frombuffer(content, np.uint8)
    (lasts,) = np.nonzero(encoded < _MORE)
    if len(lasts) != count or (len(encoded) and lasts[-1:] != len(encoded) - 1):
        raise ValueError(f"must hold {count} numbers, holds {len(lasts)}")
    starts = np.concatenate([[0], lasts[:-1] + 1]).astype(np.intp)[:count]
    lengths = lasts - starts + 1
    longest = int(lengths.max(initial=0))
    if longest > LARGEST_BYTES or (longest == LARGEST_BYTES and encoded[lasts[lengths == LARGEST_BYTES]].max() > 1):
        raise ValueError("holds a number of more than 64 bits")
    values = np.zeros(count, np.uint64)
    for place in range(longest):
        (these,) = np.nonzero(lengths > place)
        bits = (encoded[starts[these] + place] & ~_MORE).astype(np.uint64)
        values[these] |= bits << np.uint64(7 * place)
    return values


def to_zigzag(values: Integers) -> Keys:
    """Return numbers >= 0 that are small where the values are near 0: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def from_zigzag(coded: Keys) -> Integers:
    """Return the values that `to_zigzag` coded."""
    return (coded >> np.uint64(1)).view(np.int64) ^ -(coded & np.uint64(1)).view(np.int64)


def to_deltas(values: npt.NDArray[np.uint64]) -> Keys:
    """Return the first value and what each adds to the one before; modulo 2^64, so that any values come back."""
    return np.diff(values, prepend=np.uint64(0))


def from_deltas(deltas: Keys) -> Keys:
    """Return the values of which these are the differences."""
    return np.cumsum(deltas, dtype=np.uint64)
