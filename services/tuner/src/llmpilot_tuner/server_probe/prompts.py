"""Prompts of an exact length, no two of which begin alike.

Invariant: a server with a prefix cache finds nothing in it, so that every request takes the memory of all its tokens.
"""

import numpy as np

_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"),
    *("he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you"),
    *("were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will"),
    *("no", "more", "if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only"),
    *("other", "time", "new", "some"),
)
_LEAST_ID = 100
"""Vocabularies have their special tokens before it."""
_LARGEST_ID = 30_000
"""Larger ones may be special again."""


class Prompts:
    """Makes one prompt after the other; the same ones for the same seed."""

    def __init__(self, *, vocabulary_size: int, seed: int) -> None:
        largest = min(vocabulary_size, _LARGEST_ID)
        self._ids = (min(_LEAST_ID, largest // 2), largest)
        self._generator = np.random.default_rng([seed, vocabulary_size])

    def token_ids(self, token_count: int) -> list[int]:
        """Return the ids of a prompt of so many tokens."""
        return [int(each) for each in self._generator.integers(*self._ids, size=token_count)]

    def text(self, token_count: int) -> str:
        """Return a text of at least so many tokens, for a server that is told to use the last so many of it.

        A word has at least one token, a space before it none of its own or one.
        """
        return " ".join(_WORDS[each] for each in self._generator.integers(len(_WORDS), size=token_count + 1))
