"""Texts of exactly so many tokens, each beginning with words that spell out its number.

Invariant: different numbers give texts that differ within their first 16 tokens, so no server's prefix cache takes one
for another; a text of fewer tokens begins with fewer of those words. Lengths are exact because pieces and words keep
their tokens (`cut_points.py`); before any text is given out, 300 are encoded to see that they have theirs.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import PreconditionError
from llmpilot_workload_generator.model import Integers, Keys
from llmpilot_workload_generator.prompts.cut_points import CutPoints, find_cut_points
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer
from llmpilot_workload_generator.sampling.random_stream import mix, stream_key

PROMPT_STREAM = 101
GROUP_STREAM = 102
BLOCK_STREAM = 103
"""Streams of random numbers (`random_stream.py`) that numbers are taken from."""

_NUMBER_BITS = 64
_BLOCK_TOKENS = 16
"""Of the prefix caches of vLLM and others."""

_HALF = np.uint64(32)
_STARTS_KEY = np.uint64(0x5851F42D4C957F2D)

_COMMON_FILLERS = 32
_PROOF_TEXTS = 300
_PROOF_TOKENS = 2000
_PREPARED_KEPT = 8


def numbers_of(seed: int, stream: int, values: Keys) -> Keys:
    """Return a number per value, different for different values; other seeds and streams give others."""
    return mix(values + np.uint64(stream_key(seed, stream)))


class PromptWriter:
    """Writes texts from a prepared corpus. A text begins with a space; `begin` makes a prompt's beginning of it."""

    def __init__(self, cut_points: CutPoints) -> None:
        self.cut_points = cut_points
        self.joiner = cut_points.joiner
        words = cut_points.words
        word_bits = len(words).bit_length() - 1
        self._chunk_bits = 2 * word_bits
        self._chunk_count = -(-_NUMBER_BITS // self._chunk_bits)
        self.head_tokens = 2 * self._chunk_count
        """The words that spell out a number."""
        self._pairs = [first + second for second in words for first in words]
        self._fillers = [self._filler(count) for count in range(_COMMON_FILLERS)]
        self._joined_fillers = [filler + self.joiner for filler in self._fillers]
        self._starts = cut_points.start_tokens
        self._start_characters = cut_points.start_characters
        last = int(cut_points.end_tokens[-1])
        self._last_token = last
        self.longest_piece = last // 2
        """Tokens of the longest piece: it leaves as many beginnings to choose from."""
        before = np.searchsorted(cut_points.end_tokens, np.arange(last + 1), side="right") - 1
        # Before the first end there is none: its own beginning makes such a piece empty.
        self._end_tokens = np.where(before < 0, -1, cut_points.end_tokens[before])
        self._end_characters = cut_points.end_characters[before]

    def begin(self, text: str) -> str:
        """Return a text as the beginning of a prompt."""
        return text[self.cut_points.first_character :]

    def texts(self, numbers: Keys, token_counts: Integers) -> list[str]:
        """Return a text for each number, of exactly so many tokens (>= 0)."""
        wanted = token_counts - (self.head_tokens + 1)
        is_one_piece = (wanted > 0) & (wanted <= self.longest_piece)
        begins, ends, lengths = self._pieces(numbers, np.where(is_one_piece, wanted, 1))
        missing = wanted - lengths
        is_one_piece &= (lengths > 0) & (missing < _COMMON_FILLERS)
        others = np.flatnonzero(~is_one_piece).tolist()
        missing[others] = 0
        pairs = self._pairs
        columns = [list(map(pairs.__getitem__, chunk.tolist())) for chunk in self._chunks(numbers)]
        fillers = map(self._joined_fillers.__getitem__, missing.tolist())
        pieces = map(self.cut_points.corpus.__getitem__, map(slice, begins.tolist(), ends.tolist()))
        texts = list(map("".join, zip(*columns, fillers, pieces, strict=True)))
        for index in others:
            head = "".join(column[index] for column in columns)
            texts[index] = self._other_text(head, numbers[index : index + 1], int(token_counts[index]))
        return texts

    def _other_text(self, head: str, number: Keys, token_count: int) -> str:
        """Return a text that has no piece, or several."""
        if token_count <= self.head_tokens:
            return "".join(f" {word}" for word in head.split()[:token_count])
        wanted = token_count - self.head_tokens
        part_count = -(-wanted // (self.longest_piece + 1))
        parts = np.full(part_count, wanted // part_count) + (np.arange(part_count) < wanted % part_count)
        begins, ends, lengths = self._pieces(mix(np.arange(part_count, dtype=np.uint64) + number[0]), parts - 1)
        has_piece = lengths > 0
        missing = wanted - int((lengths + 1)[has_piece].sum())
        pieces = [
            self.joiner + self.cut_points.corpus[begin:end]
            for begin, end in zip(begins[has_piece].tolist(), ends[has_piece].tolist(), strict=True)
        ]
        return head + self._filler(missing) + "".join(pieces)

    def _pieces(self, numbers: Keys, wanted: Integers) -> tuple[Integers, Integers, Integers]:
        """Return where pieces of at most so many tokens begin and end in the corpus, and how many tokens they have."""
        choices = np.searchsorted(self._starts, self._last_token - wanted, side="right").astype(np.uint64)
        chosen = ((mix(numbers ^ _STARTS_KEY) >> _HALF) * choices >> _HALF).astype(np.int64)
        firsts = self._starts[chosen]
        return (
            self._start_characters[chosen],
            self._end_characters[firsts + wanted],
            np.maximum(self._end_tokens[firsts + wanted] - firsts, 0),
        )

    def _chunks(self, numbers: Keys) -> Iterator[npt.NDArray[np.uint64]]:
        mask = np.uint64((1 << self._chunk_bits) - 1)
        for chunk in range(self._chunk_count):
            yield (numbers >> np.uint64(chunk * self._chunk_bits)) & mask

    def _filler(self, count: int) -> str:
        words = self.cut_points.words
        return "".join(words[index % len(words)] for index in range(count))


@lru_cache(maxsize=_PREPARED_KEPT)
def prepared_writer(tokenizer: Tokenizer, corpus: str) -> PromptWriter:
    """Return the writer of a tokenizer and a corpus; raises InvalidInputError, PreconditionError.

    The first call takes seconds; the last few results are kept.
    """
    writer = PromptWriter(find_cut_points(tokenizer, corpus))
    if tokenizer.leading_special_count + writer.head_tokens > _BLOCK_TOKENS:
        raise PreconditionError(
            f"{tokenizer.label}: a request's number takes {writer.head_tokens} words and the tokenizer begins with "
            f"{tokenizer.leading_special_count} tokens of its own, more than the {_BLOCK_TOKENS} of a block of a "
            "prefix cache; give another tokenizer"
        )
    values = np.arange(_PROOF_TEXTS, dtype=np.uint64)
    token_counts = 1 + (values * values * np.uint64(_PROOF_TOKENS) // np.uint64(_PROOF_TEXTS**2)).astype(np.int64)
    numbers = numbers_of(0, PROMPT_STREAM, values)
    prompts = [writer.begin(text) for text in writer.texts(numbers, token_counts)]
    found = np.array(list(map(len, tokenizer.encode_plain(prompts))))
    if wrong := int((found != token_counts).sum()):
        raise PreconditionError(
            f"{tokenizer.label}: {wrong} of {_PROOF_TEXTS} texts do not have the tokens that their pieces have, as the "
            "tokenizer joins words across the spaces between them; give another tokenizer"
        )
    return writer
