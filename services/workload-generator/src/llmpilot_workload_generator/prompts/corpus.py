"""The text that prompts are cut from: one that a seeded grammar writes, or a file of the user's.

Invariant: the default text is the same in every process and on every machine; it is ASCII, and all of it is ours.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_workload_generator.prompts import phrase_book

LARGEST_CORPUS_CHARACTERS = 1_000_000
"""No more of a file is used: some 200,000 tokens, from which any number of prompts can be cut."""

_DEFAULT_CHARACTERS = 200_000
_SEED = 20240917
_SENTENCES = (4, 9)
"""Of a paragraph."""
_LONGEST_CHARACTER_BYTES = 4

_T = TypeVar("_T")
_MASK = 2**64 - 1
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!s|ni))")


@cache
def default_corpus() -> str:
    """Return the text of the grammar: some 40,000 tokens of plain English about everyday and technical matters."""
    random = _Random(_SEED)
    paragraphs: list[str] = []
    length = 0
    while length < _DEFAULT_CHARACTERS:
        theme = random.choose(phrase_book.THEMES)
        sentence_count = _SENTENCES[0] + random.below(_SENTENCES[1] - _SENTENCES[0])
        paragraph = " ".join(_sentences(random, theme, sentence_count))
        paragraphs.append(paragraph)
        length += len(paragraph) + 1
    return "\n".join(paragraphs)


def read_corpus(path: Path) -> str:
    """Read a text file, the first LARGEST_CORPUS_CHARACTERS of it; raises NotFoundError, InvalidInputError."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CORPUS_CHARACTERS * _LONGEST_CHARACTER_BYTES)
            is_whole = not file.read(1)
    except FileNotFoundError as error:
        raise NotFoundError("text file", str(path)) from error
    except OSError as error:
        raise InvalidInputError([Violation("corpus", f"cannot read {path}: {error.strerror}")]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if is_whole or error.start < len(content) - _LONGEST_CHARACTER_BYTES:
            raise InvalidInputError(
                [Violation("corpus", f"{path} must be text in UTF-8, is not at byte {error.start}")]
            ) from error
        text = content[: error.start].decode("utf-8-sig")
    return text[:LARGEST_CORPUS_CHARACTERS]


def words_of(text: str) -> list[str]:
    """Return the different lower-case words of plain letters, in the order in which they first occur."""
    return list(dict.fromkeys(re.findall(r"(?<![^\s])[a-z]{2,14}(?![^\s.,;:!?])", text)))


class _Random:
    """SplitMix64 (Steele et al., 2014): the same numbers with every Python."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, count: int) -> int:
        """Return a number from 0 to count - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((value ^ (value >> 31)) >> 11) % count

    def choose(self, options: Sequence[_T]) -> _T:
        """Return one of some options."""
        return options[self.below(len(options))]


def _sentences(random: _Random, theme: phrase_book.Theme, count: int) -> Iterator[str]:
    lists = {
        "person": theme.people,
        "thing": theme.things,
        "other": theme.things,
        "place": theme.places,
        "did": theme.deeds,
        "quality": theme.qualities,
        "more": theme.qualities,
        "name": phrase_book.NAMES,
        "when": phrase_book.MOMENTS,
        "how": phrase_book.MANNERS,
        "unit": phrase_book.UNITS,
        "count": phrase_book.COUNTS,
        "opinion": phrase_book.OPINIONS,
    }
    for _ in range(count):
        used: set[str] = set()

        def fill(match: re.Match[str], used: set[str] = used) -> str:
            slot = match[1]
            options = lists[slot.lower()]
            while (word := random.choose(options)) in used:
                pass
            used.add(word)
            return word[0].upper() + word[1:] if slot[0].isupper() else word

        sentence = _SLOT.sub(fill, random.choose(phrase_book.PATTERNS))
        yield _ARTICLE.sub(r"\1n ", sentence[0].upper() + sentence[1:])
