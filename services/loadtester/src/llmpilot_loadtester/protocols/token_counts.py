"""How many tokens each part of a reply has.

A server may send several tokens in a chunk, tokens that have no text yet, and a last token that never has any (the end
of the text). Invariant: every part gets at least one token; where the server says how many there are, they add up to
that; a token without text counts with the part that brings its text, the end of the text as a part of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmpilot_loadtester.protocols.reply import CountTokens


@dataclass(slots=True, kw_only=True)
class Pieces:
    """What a reply brought, in the order of its arrival. The first four lists have an entry per piece of text."""

    events: list[int] = field(default_factory=list)
    """Which event brought it."""
    texts: list[str] = field(default_factory=list)
    """Never empty."""
    owners: list[int] = field(default_factory=list)
    """Which choice of the reply it belongs to."""
    reported: list[int | None] = field(default_factory=list)
    """How many tokens the server said there were by then, of that choice."""
    ends: list["End"] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """An event that ends a choice and has no text."""

    event: int
    owner: int
    reported: int | None
    is_stop: bool
    """Whether the LLM ended the text, which is a token; else a limit did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The parts with tokens."""

    events: Sequence[int]
    tokens: Sequence[int]
    source: str
    """Of TOKEN_COUNT_SOURCES."""


def count(pieces: Pieces, *, total: int | None, count_tokens: CountTokens | None) -> Counts:
    """Return the tokens of each part. total: what the server says of the whole reply; None: nothing."""
    exact = _reported(pieces, total)
    if exact is not None:
        return exact
    piece_count = len(pieces.events)
    if total is None:
        total = max((number for number in pieces.reported if number is not None), default=None)
    if total is not None and total >= piece_count:
        ended = [(end.event, 1) for end in pieces.ends if end.is_stop][: total - piece_count]
        rest = total - len(ended)
        if rest == piece_count:
            return _counts(pieces, [1] * piece_count, ended)
        if piece_count:
            return _counts(pieces, spread(rest, _weights(pieces, count_tokens)), ended)
        if pieces.ends:  # no token had a text: random weights do that
            return Counts(events=[pieces.ends[-1].event], tokens=[total], source="server")
    if total is None and count_tokens is not None:
        counts = _counted(pieces, count_tokens)
        if sum(counts) >= piece_count:
            return Counts(events=pieces.events, tokens=spread(sum(counts), counts), source="tokenizer")
    return Counts(events=pieces.events, tokens=[1] * piece_count, source="chunks")


def spread(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to the weights, at least 1 each, by largest remainders; total >= their number."""
    if total == len(weights):
        return [1] * len(weights)
    if not any(weights):
        weights = [1] * len(weights)
    shares = [1] * len(weights)
    left, weight_left = total, sum(weights)
    order = sorted(range(len(weights)), key=weights.__getitem__)
    first = 0
    while left * weights[order[first]] < weight_left:  # ends before the largest, which has more than its 1
        left -= 1
        weight_left -= weights[order[first]]
        first += 1
    for index in order[first:]:
        shares[index] = left * weights[index] // weight_left
    missing = total - sum(shares)
    by_remainder = sorted(order[first:], key=lambda index: (-(left * weights[index] % weight_left), index))
    for index in by_remainder[:missing]:
        shares[index] += 1
    return shares


def _reported(pieces: Pieces, total: int | None) -> Counts | None:
    """Return the counts if the server said with every piece how many tokens there were; None: it did not."""
    if not pieces.events or None in pieces.reported:
        return None
    before: dict[int, int] = {}
    tokens = []
    for owner, number in zip(pieces.owners, pieces.reported, strict=True):
        more = (number or 0) - before.get(owner, 0)
        if more < 1:
            return None
        before[owner] = number or 0
        tokens.append(more)
    ends = []
    for end in pieces.ends:
        more = (end.reported or 0) - before.get(end.owner, 0)
        if more > 0:
            before[end.owner] = end.reported or 0
            ends.append((end.event, more))
    missing = (total or 0) - sum(before.values())
    if missing > 0:
        tokens[-1] += missing
    return _counts(pieces, tokens, ends)


def _counts(pieces: Pieces, tokens: Sequence[int], ends: Sequence[tuple[int, int]]) -> Counts:
    """Return what the server says, the ends of texts in their places among the pieces."""
    if not ends:
        return Counts(events=pieces.events, tokens=tokens, source="server")
    together = sorted([*zip(pieces.events, tokens, strict=True), *ends], key=lambda pair: pair[0])
    return Counts(events=[event for event, _ in together], tokens=[each for _, each in together], source="server")


def _weights(pieces: Pieces, count_tokens: CountTokens | None) -> Sequence[int]:
    if count_tokens is not None:
        return _counted(pieces, count_tokens)
    return [len(text) for text in pieces.texts]


def _counted(pieces: Pieces, count_tokens: CountTokens) -> list[int]:
    """Return a tokenizer's count of each piece, every choice being a text of its own."""
    owners = set(pieces.owners)
    if len(owners) == 1:
        return list(count_tokens(pieces.texts))
    counts = [0] * len(pieces.texts)
    for owner in owners:
        own = [index for index, each in enumerate(pieces.owners) if each == owner]
        for index, number in zip(own, count_tokens([pieces.texts[index] for index in own]), strict=True):
            counts[index] = number
    return counts
