"""Whole numbers as varints: seven bits a byte, the lowest first, the top bit set on all bytes but a number's last.

Invariant: what `encode` wrote, `decode` returns exactly, and neither allocates more than a small multiple of the bytes.
Source: the varints of Protocol Buffers, and their zigzag coding of numbers that may be negative.
"""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

LARGEST_BYTES = 10
"""What a number of 64 bits takes."""
_BLOCK_VALUES = 32_768
_SHIFTS = np.arange(LARGEST_BYTES, dtype=np.uint64) * np.uint64(7)
_PLACES = np.arange(LARGEST_BYTES)
_MORE = np.uint8(0x80)
_SEVEN_BITS = np.uint8(0x7F)


def encode(values: Words) -> bytes:
    """Return the varints of numbers of 64 bits."""
    return b"".join(_encoded(values[at : at + _BLOCK_VALUES]) for at in range(0, len(values), _BLOCK_VALUES))


def _encoded(values: Words) -> bytes:
    """Write every number with as many bytes as the longest takes, and keep those that count."""
    width = max(-(-int(values.max()).bit_length() // 7), 1)
    lengths = np.ones(len(values), np.int64)
    for shift in _SHIFTS[1:width]:
        lengths += values >= np.uint64(1) << shift
    content = (values[:, None] >> _SHIFTS[:width]).astype(np.uint8) | _MORE
    content[np.arange(len(values)), lengths - 1] &= _SEVEN_BITS
    return content[_PLACES[:width] < lengths[:, None]].tobytes()


def decode(content: bytes, count: int) -> Words:
    """Return the numbers in `content`; raises ValueError where they are not `count` numbers of 64 bits."""
    encoded = np.frombuffer(content, np.uint8)
    lasts = np.flatnonzero(encoded < _MORE)
    if len(lasts) != count or (len(encoded) and lasts[-1:] != len(encoded) - 1):
        raise ValueError(f"must hold {count} numbers, holds {len(lasts)}")
    if not count:
        return np.zeros(0, np.uint64)
    starts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - starts + 1
    longest = int(lengths.max())
    if longest > LARGEST_BYTES or (longest == LARGEST_BYTES and encoded[lasts[lengths == LARGEST_BYTES]].max() > 1):
        raise ValueError("holds a number of more than 64 bits")
    places = np.arange(len(encoded)) - np.repeat(starts, lengths)
    return np.asarray(np.add.reduceat((encoded & _SEVEN_BITS).astype(np.uint64) << _SHIFTS[places], starts))


def to_zigzag(values: Integers) -> Words:
    """Return numbers >= 0 that are small where the values are near 0: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def from_zigzag(coded: Words) -> Integers:
    """Return the values that `to_zigzag` coded."""
    return (coded >> np.uint64(1)).view(np.int64) ^ -(coded & np.uint64(1)).view(np.int64)
