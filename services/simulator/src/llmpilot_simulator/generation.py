"""What the simulated server says: how many tokens, with which text, and where it stops.

Invariant: the text of a reply has exactly as many tokens as were generated for it, but for the one that ends a text and
has none itself. With a seed the reply depends on the seed and the prompt alone.
Source of the rules for stop strings: vllm/v1/engine/detokenizer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_simulator.tokenizer import Tokenizer, prefix_hashes

FinishReason = Literal["length", "stop", "eos"]

_LONGEST_REPLY = 1 << 40
"""Of a text that never ends by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyLengths:
    """How long replies are when nothing cuts them: lognormal, the token that ends the text included.

    The defaults are the conversations of ShareGPT with the tokenizer of OPT: median 145, mean 235 (figure 1 of the
    workload-choice study of Papaioannou and Doudali, EuroMLSys 2024).
    """

    median_tokens: float = 145.0
    log_deviation: float = 0.98
    """Of the natural logarithm; the mean is median * exp(log_deviation^2 / 2)."""
    never_ends: bool = False
    """Every reply goes on until its limit."""

    def __post_init__(self) -> None:
        violations = []
        if not 1 <= self.median_tokens <= _LONGEST_REPLY:
            violations.append(Violation("median_tokens", f"must be >= 1, is {self.median_tokens}"))
        if not 0 <= self.log_deviation <= _LARGEST_LOG_DEVIATION:
            violations.append(
                Violation("log_deviation", f"must be from 0 to {_LARGEST_LOG_DEVIATION:g}, is {self.log_deviation}")
            )
        if violations:
            raise InvalidInputError(violations)

    def draw(self, random: np.random.Generator) -> int:
        """Return the length of one reply, >= 1."""
        if self.never_ends:
            return _LONGEST_REPLY
        tokens = self.median_tokens * np.exp(self.log_deviation * random.standard_normal())
        return max(1, min(round(float(tokens)), _LONGEST_REPLY))


_LARGEST_LOG_DEVIATION = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate."""

    prompt: str | Sequence[int]
    """Text, or token ids that are taken as they are."""
    max_tokens: int
    min_tokens: int = 0
    """Until so many tokens are there, neither the end of the text nor a stop string ends the reply."""
    ignore_eos: bool = False
    """Only the limit or a stop string ends the reply."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    include_stop: bool = False
    """Leave the stop string in the text."""

    def __post_init__(self) -> None:
        violations = []
        if self.max_tokens < 1:
            violations.append(Violation("max_tokens", f"must be >= 1, is {self.max_tokens}"))
        if self.min_tokens < 0:
            violations.append(Violation("min_tokens", f"must be >= 0, is {self.min_tokens}"))
        if self.min_tokens > self.max_tokens >= 1:
            violations.append(Violation("min_tokens", f"must be <= max_tokens {self.max_tokens}, is {self.min_tokens}"))
        if "" in self.stop:
            violations.append(Violation("stop", "a stop string must not be empty"))
        if violations:
            raise InvalidInputError(violations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What will be said."""

    input_tokens: int
    tokens: tuple[str, ...]
    """The text of each output token; "" for the one that ends the text."""
    pieces: tuple[str, ...]
    """The text that arrives with each output token, which differs where text is held back as it may begin a stop
    string, and where a stop string is cut off."""
    finish_reason: FinishReason
    stop_sequence: str | None
    """What ended it, where finish_reason is "stop"."""
    block_hashes: NDArray[np.int64]
    """One per full block of the prompt; equal where the whole prompt up to there is equal."""


class Generator:
    """Makes up replies, those without a seed one after the other from the server's own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        reply_lengths: ReplyLengths | None = None,
        block_size: int = 16,
    ) -> None:
        """Start with the server's seed. block_size: tokens in a block of the prefix cache."""
        self._tokenizer = tokenizer
        self._lengths = reply_lengths or ReplyLengths()
        self._block_size = block_size
        self._random = np.random.default_rng(seed)

    def plan(self, request: GenerationRequest) -> Generation:
        """Say what the reply to a request is."""
        prompt = request.prompt
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        hashes = prefix_hashes(ids)
        random = self._random if request.seed is None else _random_of(request.seed, hashes)
        length = _LONGEST_REPLY if request.ignore_eos else max(self._lengths.draw(random), request.min_tokens + 1)
        is_ended = length <= request.max_tokens
        tokens = _text(_STARTS[random.integers(len(_STARTS))], length - 1 if is_ended else request.max_tokens)
        if is_ended:
            tokens = (*tokens, "")
        reason: FinishReason = "eos" if is_ended else "length"
        pieces, stop_sequence = _stopped(tokens, request) if request.stop else (tokens, None)
        return Generation(
            input_tokens=max(len(ids), 1),  # of an empty text a model still sees the token that begins it
            tokens=tokens[: len(pieces)],
            pieces=pieces,
            finish_reason=reason if stop_sequence is None else "stop",
            stop_sequence=stop_sequence,
            block_hashes=hashes[self._block_size - 1 :: self._block_size].view(np.int64),
        )


def _random_of(seed: int, hashes: NDArray[np.uint64]) -> np.random.Generator:
    prompt = int(hashes[-1]) if len(hashes) else 0
    return np.random.Generator(np.random.PCG64([seed % 2**64, prompt]))


def _text(start: int, count: int) -> tuple[str, ...]:
    """Return so many tokens of the endless text, from one of its places on."""
    end = start + count
    if end <= len(_TAPE):
        return _TAPE[start:end]
    repeats = end // len(_TAPE) + 1
    return (_TAPE * repeats)[start:end]


def _stopped(tokens: tuple[str, ...], request: GenerationRequest) -> tuple[tuple[str, ...], str | None]:
    """Return the pieces as they arrive up to the first stop string, and that stop string if there is one.

    vLLM looks after every token beyond `min_tokens` whether a stop string has become complete; of several that have,
    the first of the request's list counts, at its first place. As many characters as a stop string could still take
    back are held back, unless it stays in the text.
    """
    text = "".join(tokens)
    ends = list(accumulate(map(len, tokens)))
    unchecked = ends[request.min_tokens - 1] if request.min_tokens else 0
    found: tuple[int, str, int] | None = None
    for stop in request.stop:
        place = text.find(stop, max(0, unchecked + 1 - len(stop)))
        if place < 0:
            continue
        token = _index_of(ends, place + len(stop))
        if found is None or token < found[0]:
            found = token, stop, place
    held = 0 if request.include_stop else max(map(len, request.stop)) - 1
    if found is None:
        return _arriving(text, ends, held), None
    token, stop, place = found
    cut = place + len(stop) if request.include_stop else place
    return _arriving(text[:cut], ends[: token + 1], held), stop


def _index_of(ends: list[int], position: int) -> int:
    """Return the index of the token with which the text becomes `position` characters long."""
    return int(np.searchsorted(ends, position))


def _arriving(text: str, ends: list[int], held: int) -> tuple[str, ...]:
    """Return what comes with every token when the last `held` characters wait; the last token brings the rest."""
    shown = [max(0, end - held) for end in ends[:-1]]
    return tuple(text[start:end] for start, end in zip([0, *shown], [*shown, len(text)], strict=True))


def _tape() -> tuple[str, ...]:
    """Return a text of sentences, one token a piece wherever it is cut between two pieces."""
    random = np.random.default_rng(_TAPE_SEED)
    pieces: list[str] = []
    for sentence in count(1):
        if len(pieces) >= _TAPE_TOKENS:
            break
        words = random.choice(_WORDS, random.integers(4, 19)).tolist()
        pieces.append(f" {words[0].capitalize()}")
        for number, word in enumerate(words[1:], 1):
            if number % _WORDS_TO_COMMA == 0:
                pieces.append(",")
            pieces.append(f" {word}")
        pieces.append(".")
        if sentence % _SENTENCES_TO_NEWLINE == 0:
            pieces.append("\n")
    return tuple(pieces)


_TAPE_TOKENS = 20_000
_TAPE_SEED = 20240917
_WORDS_TO_COMMA = 7
_SENTENCES_TO_NEWLINE = 5
_WORDS = (  # noqa: SIM905 a list would fill a page
    "the of and to in is it that for was on are as with they at be this from have or by one had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get real back "
    "much go good new write our me man too any day same right look think also around form small set put end does well"
).split()
"""Each is one token with the space before it."""
_TAPE = _tape()
_STARTS = tuple(index for index, piece in enumerate(_TAPE) if piece[-1:].isalpha() and _TAPE[index - 1] in ".\n")
"""Where sentences begin."""
