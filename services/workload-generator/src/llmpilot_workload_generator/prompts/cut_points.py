"""Where a corpus can be cut so that its pieces keep the tokens they have in it, and words that join such pieces.

Invariant: every cut point and every pair of words was tried with the tokenizer itself. A piece begins with the space
before a word; it may follow the joiner, and the joiner may follow it. The joiner and the words are one token each, at
the beginning of a text and after one another.
Source: none; it takes no more of a tokenizer than that what it makes of a word depends on its near surroundings.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_workload_generator.model import Integers
from llmpilot_workload_generator.prompts.corpus import LARGEST_CORPUS_CHARACTERS, default_corpus, words_of
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer

LEAST_CORPUS_TOKENS = 1000
MOST_WORDS = 256
LEAST_WORDS = 32
"""With fewer, a request's number would not fit in the first 16 tokens."""

_JOINERS = ("and", "then", "while", "or", "the", "with", "for", "in", "it", "is", "a")
"""The first of them that is among the words joins pieces."""
_MOST_CANDIDATES = 60_000
"""Cut points that are tried, evenly over the corpus."""
_TOKENS_PER_CUT_POINT = 20
"""On average there must be one in so many tokens."""
_WINDOW_WORDS = 8
_CERTAIN_WORDS = 4
"""So many words of a window are compared; what the window's own end does to the rest does not matter."""
_LONGEST_WINDOW_CHARACTERS = 400

_START = re.compile(r"(?<=\S) (?=[^\W\d_])")
_END = re.compile(r"(?<=[^\W_])(?=[\s.,;:!?])|(?<=[.,;:!?])(?=\s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPoints:
    """A corpus and where it may be cut under one tokenizer."""

    corpus: str
    begins_with_space: bool
    """Whether a prompt keeps the space before its first word; where not, that word is one token without it."""
    words: tuple[str, ...]
    """Each with the space before it; a power of two of them."""
    joiner: str
    """One of the words."""
    start_tokens: Integers
    """The first token of a piece that begins here, rising."""
    start_characters: Integers
    """Where its space is."""
    end_tokens: Integers
    """How many tokens of the corpus lie before an end, rising."""
    end_characters: Integers

    @property
    def first_character(self) -> int:
        """How many characters of a text that begins with a space are not part of a prompt."""
        return 0 if self.begins_with_space else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """Words and their ids."""

    begins_with_space: bool
    texts: list[str]
    first_ids: list[int]
    """Where the word begins a text."""
    ids: list[int]

    def among(self, kept: Sequence[int]) -> "_Words":
        return _Words(
            begins_with_space=self.begins_with_space,
            texts=[self.texts[index] for index in kept],
            first_ids=[self.first_ids[index] for index in kept],
            ids=[self.ids[index] for index in kept],
        )


def find_cut_points(tokenizer: Tokenizer, corpus: str) -> CutPoints:
    """Try a corpus with a tokenizer.

    Raises InvalidInputError where the corpus is too short, PreconditionError where the tokenizer gives too few places.
    """
    corpus = corpus[:LARGEST_CORPUS_CHARACTERS]
    ids, places = tokenizer.encode_with_places(corpus)
    if len(ids) < LEAST_CORPUS_TOKENS:
        raise InvalidInputError(
            [
                Violation(
                    "corpus", f"must have at least {LEAST_CORPUS_TOKENS} tokens under {tokenizer.label}, has {len(ids)}"
                )
            ]
        )
    words = _find_words(tokenizer, corpus)
    text = _EncodedText(corpus, ids, places)
    frame = _Frame(tokenizer, words)
    starts = _find_starts(frame, text)
    ends = _find_ends(frame, text, starts)
    for kind, found in (("beginnings", starts), ("ends", ends)):
        if len(found) * _TOKENS_PER_CUT_POINT < min(len(ids), _MOST_CANDIDATES):
            raise PreconditionError(
                f"{tokenizer.label}: among {len(ids)} tokens of the corpus are only {len(found)} {kind} of pieces that "
                "keep their tokens elsewhere; give a corpus of words with spaces between them, or another tokenizer"
            )
    return CutPoints(
        corpus=corpus,
        begins_with_space=words.begins_with_space,
        words=tuple(f" {word}" for word in words.texts),
        joiner=f" {words.texts[frame.joiner]}",
        start_tokens=text.tokens_before(starts),
        start_characters=starts,
        end_tokens=text.tokens_before(ends),
        end_characters=ends,
    )


class _EncodedText:
    """A corpus, its tokens, and how characters and tokens relate."""

    def __init__(self, corpus: str, ids: list[int], places: list[tuple[int, int]]) -> None:
        self.corpus = corpus
        self.ids = ids
        begins, ends = np.array(places, np.int64).reshape(-1, 2).T
        self._begins = np.append(begins, len(corpus))
        self._ends = np.maximum.accumulate(ends)

    def tokens_before(self, characters: Integers) -> Integers:
        """Return how many tokens end at or before each place."""
        return np.searchsorted(self._ends, characters, side="right").astype(np.int64)

    def between_tokens(self, pattern: re.Pattern[str]) -> Integers:
        """Return the places of a pattern with no token across them, at most _MOST_CANDIDATES."""
        found = np.array([match.start() for match in pattern.finditer(self.corpus)], np.int64)
        found = found[self._begins[self.tokens_before(found)] >= found]
        return found[:: max(1, -(-len(found) // _MOST_CANDIDATES))]


class _Frame:
    """What windows are put between: a word and the joiner before them, the joiner and a word after them."""

    def __init__(self, tokenizer: Tokenizer, words: _Words) -> None:
        self._tokenizer = tokenizer
        self._from = 0 if words.begins_with_space else 1
        self.joiner = next((words.texts.index(word) for word in _JOINERS if word in words.texts), 0)
        word, joiner = 0 if self.joiner else 1, self.joiner
        self.before = f" {words.texts[word]} {words.texts[joiner]}"
        self.after = f" {words.texts[joiner]} {words.texts[word]}"
        self.ids_before = [words.first_ids[word], words.ids[joiner]]
        self.ids_after = [words.ids[joiner], words.ids[word]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that begin with a space, as prompts."""
        return self._tokenizer.encode_plain([text[self._from :] for text in texts])


def _find_starts(frame: _Frame, text: _EncodedText) -> Integers:
    candidates = text.between_tokens(_START)[: -_WINDOW_WORDS - 1]
    following = np.arange(len(candidates))
    spaces = np.append(candidates, np.full(_WINDOW_WORDS, len(text.corpus)))
    windows = np.minimum(spaces[following + _WINDOW_WORDS], candidates + _LONGEST_WINDOW_CHARACTERS)
    certain = text.tokens_before(spaces[following + _CERTAIN_WORDS])
    firsts = text.tokens_before(candidates)
    rows = zip(candidates.tolist(), windows.tolist(), strict=True)
    found = frame.encode([frame.before + text.corpus[begin:end] for begin, end in rows])
    keeps = [
        ids[: 2 + last - first] == frame.ids_before + text.ids[first:last]
        for ids, first, last in zip(found, firsts.tolist(), certain.tolist(), strict=True)
    ]
    kept: Integers = candidates[np.array(keeps, bool)]
    return kept


def _find_ends(frame: _Frame, text: _EncodedText, starts: Integers) -> Integers:
    candidates = text.between_tokens(_END)
    before = np.searchsorted(starts, candidates) - _WINDOW_WORDS
    candidates, before = candidates[before >= 0], before[before >= 0]
    begins = starts[before]
    is_near = candidates - begins <= _LONGEST_WINDOW_CHARACTERS
    candidates, begins = candidates[is_near], begins[is_near]
    firsts, lasts = text.tokens_before(begins), text.tokens_before(candidates)
    rows = zip(begins.tolist(), candidates.tolist(), strict=True)
    found = frame.encode([frame.before + text.corpus[begin:end] + frame.after for begin, end in rows])
    keeps = [
        ids == frame.ids_before + text.ids[first:last] + frame.ids_after
        for ids, first, last in zip(found, firsts.tolist(), lasts.tolist(), strict=True)
    ]
    kept: Integers = candidates[np.array(keeps, bool)]
    return kept


def _find_words(tokenizer: Tokenizer, corpus: str) -> _Words:
    """Return as many words as fit any other; a prompt begins without a space where there are enough such words."""
    candidates = list(dict.fromkeys([*_JOINERS, *words_of(corpus), *words_of(default_corpus())]))
    most = 0
    for begins_with_space in (False, True):
        words = _single_tokens(tokenizer, candidates, begins_with_space=begins_with_space)
        words = _fitting(tokenizer, words.among(range(min(len(words.texts), MOST_WORDS))))
        if len(words.texts) >= LEAST_WORDS:
            return words.among(range(1 << (len(words.texts).bit_length() - 1)))
        most = max(most, len(words.texts))
    raise PreconditionError(
        f"{tokenizer.label}: only {most} words were found that are one token each next to one another, and "
        f"{LEAST_WORDS} are needed to make prompts of exact length; give another tokenizer"
    )


def _single_tokens(tokenizer: Tokenizer, candidates: list[str], *, begins_with_space: bool) -> _Words:
    lead = " " if begins_with_space else ""
    alone = tokenizer.encode_plain([lead + word for word in candidates])
    twice = tokenizer.encode_plain([f"{lead}{word} {word}" for word in candidates])
    found = [
        (word, *ids)
        for word, first, ids in zip(candidates, alone, twice, strict=True)
        if len(first) == 1 and len(ids) == 2 and ids[0] == first[0]  # noqa: PLR2004 one for each
    ]
    texts, first_ids, ids = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return _Words(begins_with_space=begins_with_space, texts=texts, first_ids=first_ids, ids=ids)


def _fitting(tokenizer: Tokenizer, words: _Words) -> _Words:
    """Leave out words until any two of those left are two tokens next to each other."""
    lead = " " if words.begins_with_space else ""
    pairs = tokenizer.encode_plain([f"{lead}{first} {second}" for first in words.texts for second in words.texts])
    expected = ([first, second] for first in words.first_ids for second in words.ids)
    misfits = np.array([found != ids for found, ids in zip(pairs, expected, strict=True)], bool)
    return words.among(list(_without_misfits(misfits.reshape(len(words.texts), len(words.texts)))))


def _without_misfits(misfits: npt.NDArray[np.bool_]) -> Iterator[int]:
    misfits = misfits | misfits.T
    kept = np.ones(len(misfits), bool)
    while misfits.any():
        worst = int(misfits.sum(axis=0).argmax())
        kept[worst] = misfits[worst] = misfits[:, worst] = False
    yield from np.flatnonzero(kept).tolist()
