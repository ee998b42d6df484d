"""Beginnings that prompts have in common: of a group of requests, or of the blocks that a trace names.

Invariant: a beginning has exactly the tokens it says, and the joiner can follow it.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.model import Integers, Keys
from llmpilot_workload_generator.prompts.cut_points import CutPoints
from llmpilot_workload_generator.prompts.prompt_text import BLOCK_STREAM, GROUP_STREAM, PromptWriter, numbers_of
from llmpilot_workload_generator.sampling.random_stream import mix

LARGEST_SHORTFALL = 2
"""A group's beginning has at most so many tokens fewer than asked for."""

_PIECE_BITS = 32
"""Of a piece's place in its group's text."""
_LEAST_PIECE_TOKENS = 8
_LONGEST_PIECE_TOKENS = 512
_LEAST_STARTS = 100
_FIRST_PIECES = 4
_HALF = np.uint64(32)


class SharedTexts:
    """The texts that the groups of requests begin with, as long as any request asks for."""

    def __init__(self, writer: PromptWriter, *, seed: int, group_count: int) -> None:
        self._writer = writer
        self._pieces = _DensePieces(writer.cut_points)
        self._seed = seed
        self._group_count = group_count
        self._texts: dict[int, _SharedText] = {}

    def beginning(self, index: int, token_count: int) -> tuple[str, int]:
        """Return what request `index` begins with, and its tokens, LARGEST_SHORTFALL fewer than asked for at most."""
        group = index % self._group_count
        if group not in self._texts:
            self._texts[group] = _SharedText(self._writer, self._pieces, seed=self._seed, group=group)
        return self._texts[group].up_to(token_count)


class _DensePieces:
    """Pieces of the corpus that can be cut again within any LARGEST_SHORTFALL + 1 tokens."""

    def __init__(self, cut_points: CutPoints) -> None:
        self._cut_points = cut_points
        ends, starts = cut_points.end_tokens, cut_points.start_tokens
        next_end = np.searchsorted(ends, starts, side="right")
        padded = np.append(ends, ends[-1] + 2 * LARGEST_SHORTFALL)
        breaks = np.flatnonzero(np.diff(padded) > LARGEST_SHORTFALL + 1)
        last_end = breaks[np.searchsorted(breaks, np.minimum(next_end, len(ends) - 1))]
        is_dense = (padded[next_end] - starts <= LARGEST_SHORTFALL + 1) & (
            ends[last_end] - starts >= _LEAST_PIECE_TOKENS
        )
        self._starts = np.flatnonzero(is_dense)
        self._next_end, self._last_end = next_end, last_end
        self.is_enough = len(self._starts) >= _LEAST_STARTS

    def choose(self, number: Keys) -> tuple[str, Integers, Integers]:
        """Return a piece, and at how many tokens and how many characters it can be cut."""
        cut_points = self._cut_points
        chosen = self._starts[int((mix(number)[0] >> _HALF) * np.uint64(len(self._starts)) >> _HALF)]
        first_token, first_character = cut_points.start_tokens[chosen], int(cut_points.start_characters[chosen])
        cuts = slice(self._next_end[chosen], self._last_end[chosen] + 1)
        tokens = cut_points.end_tokens[cuts] - first_token
        tokens = tokens[tokens <= _LONGEST_PIECE_TOKENS]
        characters = cut_points.end_characters[cuts][: len(tokens)] - first_character
        return cut_points.corpus[first_character : first_character + int(characters[-1])], tokens, characters


class _SharedText:
    """The text of one group."""

    def __init__(self, writer: PromptWriter, pieces: _DensePieces, *, seed: int, group: int) -> None:
        self._writer = writer
        self._pieces = pieces
        self._seed = seed
        self._group = group
        self._text = ""
        self._tokens: list[int] = [0]
        self._characters: list[int] = [0]
        self._piece_count = 0

    def up_to(self, token_count: int) -> tuple[str, int]:
        """Return the longest beginning of at most so many tokens that ends at a cut point, and its tokens."""
        while self._tokens[-1] < token_count:
            self._extend()
        place = bisect_right(self._tokens, token_count) - 1
        return self._text[: self._characters[place]], self._tokens[place]

    def _extend(self) -> None:
        """Double the text, so that a long one is not copied for every piece."""
        count = max(self._piece_count, _FIRST_PIECES)
        places = np.arange(self._piece_count, self._piece_count + count, dtype=np.uint64)
        numbers = numbers_of(self._seed, GROUP_STREAM, places + np.uint64(self._group << _PIECE_BITS))
        texts = [self._text]
        for place, number in zip(places.tolist(), numbers, strict=True):
            is_words = place == 0 or not self._pieces.is_enough
            for text, tokens, characters in self._words(number[None]) if is_words else self._piece(number[None]):
                texts.append(text)
                self._tokens.extend((tokens + self._tokens[-1]).tolist())
                self._characters.extend((characters + self._characters[-1]).tolist())
        self._text = "".join(texts)
        self._piece_count += count

    def _words(self, number: Keys) -> Iterator[tuple[str, Integers, Integers]]:
        """Give words that spell out a number, which can be cut after each."""
        (text,) = self._writer.texts(number, np.array([self._writer.head_tokens]))
        for word in text.split():
            yield f" {word}", np.ones(1, np.int64), np.full(1, len(word) + 1)

    def _piece(self, number: Keys) -> Iterator[tuple[str, Integers, Integers]]:
        yield self._writer.joiner, np.ones(1, np.int64), np.full(1, len(self._writer.joiner))
        yield self._pieces.choose(number)


class BlockTexts:
    """The texts of a trace's blocks: a function of the seed, a block's id and its tokens alone."""

    def __init__(self, writer: PromptWriter, *, seed: int) -> None:
        self._writer = writer
        self._seed = seed
        self.least_tokens = writer.head_tokens + 1
        """A block of fewer tokens does not hold its id."""

    def texts(self, ids: npt.NDArray[np.int64], token_counts: Integers) -> list[str]:
        """Return the text of each block of so many tokens (>= 1); all begin with the joiner."""
        values, places = np.unique(np.stack([ids, token_counts]), axis=1, return_inverse=True)
        numbers = numbers_of(self._seed, BLOCK_STREAM, values[0].astype(np.uint64))
        joiner = self._writer.joiner
        texts = [joiner + text for text in self._writer.texts(numbers, values[1] - 1)]
        return list(map(texts.__getitem__, places.reshape(-1).tolist()))
