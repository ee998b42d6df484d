"""Text to tokens and back, without a vocabulary to download.

Invariant: `decode(encode(text)) == text` for every text, and ids are the same in every process: they are computed.
A token is a piece of a word of at most six letters with the space before it, up to three digits, a run of spaces,
a punctuation mark with the space before it, or any other single character. English comes to about four characters a
token, as with the tokenizers of real LLMs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

_PIECE = re.compile(r" ?[A-Za-z]{1,6}| {2,16}|[0-9]{1,3}| ?[!-/:-@\[-`{-~]|.", re.DOTALL)

# Ids: a single character is its code point; then runs of spaces, groups of digits, marks after a space, words.
_SPACES = 0x110000
_DIGITS = _SPACES + 17
_MARKS = _DIGITS + 10_000
_WORDS = _MARKS + 128
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUES = {letter: value for value, letter in enumerate(_LETTERS, 1)}
_RADIX = len(_LETTERS)
_LONGEST_PIECE = 6
_END = _WORDS + 2 * sum(_RADIX**length for length in range(1, _LONGEST_PIECE + 1)) + 2

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_REMEMBERED_PIECES = 1_000_000
"""How many pieces are kept with their ids: 150 MB at most, a few MB with real text."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Tokenizer:
    """One for all threads of a process; it keeps nothing but what it has worked out before."""

    def __init__(self) -> None:
        self._ids = _Ids()
        self._texts = _Texts()

    def pieces(self, text: str) -> list[str]:
        """Return the text of every token."""
        return _PIECE.findall(text)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(_PIECE.findall(text))

    def encode(self, text: str) -> list[int]:
        """Return the id of every token."""
        ids = self._ids
        if len(ids) > _REMEMBERED_PIECES:
            ids.clear()
        return list(map(ids.__getitem__, _PIECE.findall(text)))

    def encode_parts(self, text: str, part_tokens: int) -> Iterator[list[int]]:
        """Give the ids of a text that is too long to encode at once, so many at a time."""
        ids = self._ids
        pieces = (match[0] for match in _PIECE.finditer(text))
        while part := list(map(ids.__getitem__, islice(pieces, part_tokens))):
            yield part
            if len(ids) > _REMEMBERED_PIECES:
                ids.clear()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some tokens; an id that no text has becomes U+FFFD."""
        texts = self._texts
        if len(texts) > _REMEMBERED_PIECES:
            texts.clear()
        return "".join(map(texts.__getitem__, ids))


def prefix_hashes(ids: Sequence[int]) -> NDArray[np.uint64]:
    """Return, for every token, a hash of all tokens up to it: equal only where the whole prefix is equal.

    The sum of mixed (position, id) pairs, with the finalizer of SplitMix64 (Steele et al., 2014).
    """
    positions = np.arange(1, len(ids) + 1, dtype=np.uint64)
    mixed = _mixed(_mixed(positions * _GOLDEN) + np.asarray(ids, dtype=np.int64).view(np.uint64))
    return _mixed(np.cumsum(mixed, dtype=np.uint64))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> _SHIFTS[0])) * _MIX[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MIX[1]
    return values ^ (values >> _SHIFTS[2])


class _Ids(dict[str, int]):
    """Piece to id."""

    def __missing__(self, piece: str) -> int:
        self[piece] = token_id = _id_of(piece)
        return token_id


class _Texts(dict[int, str]):
    """Id to piece."""

    def __missing__(self, token_id: int) -> str:
        self[token_id] = text = _text_of(token_id)
        return text


def _id_of(piece: str) -> int:
    if len(piece) == 1:
        return ord(piece)
    last = piece[-1]
    if last == " ":
        return _SPACES + len(piece)
    if piece[0].isdigit():
        return _DIGITS + len(piece) * 1000 + int(piece)
    if last not in _VALUES:
        return _MARKS + ord(last)
    word = piece.lstrip(" ")
    value = 0
    for letter in word:
        value = value * _RADIX + _VALUES[letter]
    return _WORDS + 2 * value + (len(word) < len(piece))


def _text_of(token_id: int) -> str:
    if not 0 <= token_id < _END:
        return _UNKNOWN
    if token_id < _SPACES:
        return chr(token_id)
    if token_id < _DIGITS:
        return " " * (token_id - _SPACES)
    if token_id < _MARKS:
        width, number = divmod(token_id - _DIGITS, 1000)
        return f"{number:0{width}}" if width else _UNKNOWN
    if token_id < _WORDS:
        return " " + chr(token_id - _MARKS)
    value, has_space = divmod(token_id - _WORDS, 2)
    letters = ""
    while value:
        value, digit = divmod(value - 1, _RADIX)
        letters = _LETTERS[digit] + letters
    return " " * has_space + letters
