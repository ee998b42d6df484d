"""Counts the tokens of replies with a Hugging Face tokenizer.

Invariant: a text is encoded once, as a whole and without the tokens that a tokenizer adds itself; a token belongs to
the part in which its last character came. So a word that two parts share counts once, a beginning-of-text token never.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.protocols.reply import CountTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def count_tokens_with(tokenizer_json: str) -> CountTokens:
    """Return what counts with a tokenizer.json; raises InvalidInputError where it is none."""
    from tokenizers import Tokenizer  # noqa: PLC0415 most load tests need none

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing more specific
        problem = f"is no tokenizer.json of Hugging Face's tokenizers library: {error}"
        raise InvalidInputError([Violation("reply_tokenizer_json", problem)]) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Counter(tokenizer)


class _Counter:
    """A CountTokens."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer

    def __call__(self, parts: Sequence[str], /) -> Sequence[int]:
        ends = list(accumulate(map(len, parts)))
        counts = [0] * len(parts)
        if not ends or not ends[-1]:
            return counts
        encoding = self._tokenizer.encode("".join(parts), add_special_tokens=False)
        for _, end in encoding.offsets:
            counts[min(bisect_left(ends, end), len(parts) - 1)] += 1
        return counts
