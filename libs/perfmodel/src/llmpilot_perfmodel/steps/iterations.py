"""A server's steps and its largest batch weight, rebuilt from the times at which the tokens of its requests arrived.

Tokens of one step arrive together. A step in which nobody gets a first token is a decode of the whole batch; a step in
which everybody does is a prefill. A server that withholds a first token without text hides its prefill: that time is
part of the decode that follows.
Invariant: a step is returned only where the batch is fully known; everything else is counted as left out.
Source: the behaviour of TGIS in the raw records of Lazuka et al., 2024.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

SAME_STEP_SECONDS = 0.004
"""Tokens that arrive no further apart belong to one step; the fastest step of the public records takes 10 ms."""
_SHOWN_VIOLATIONS = 20
_CREDIBLE_SHARE = 0.99
"""Of the batches: a withheld first token that is counted to another prefill makes one heavier than it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimeline:
    """When the tokens of all requests of a server arrived; one entry per request, times in seconds of one clock."""

    arrival_seconds: Floats
    """When the request was in the server's queue."""
    end_seconds: Floats
    """When it ended; NaN: not known."""
    input_tokens: Integers
    output_tokens: Integers
    """Tokens generated; a server may have sent one message fewer, for want of text in the first."""
    is_ok: Booleans
    token_starts: Integers
    """Where each request's times begin in `token_seconds`; one more entry for where the last ones end."""
    token_seconds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSteps:
    """Rebuilt steps, one entry each; a hidden prefill shares its entry with the decode that followed."""

    seconds: Floats
    decode_sequences: Integers
    """0: a prefill alone."""
    decode_cached_tokens: Integers
    """Padded to the longest sequence where the server pads."""
    moved_tokens: Integers
    """The same where sequences have joined or left the batch since the last decode, else 0."""
    prefill_requests: Integers
    """0: a decode alone."""
    prefill_tokens: Integers
    prefill_pairs: Floats
    """As in `step_time.StepLoad`."""
    left_out_count: int
    """Steps whose batch or start is not known."""

    def __len__(self) -> int:
        return len(self.seconds)


def rebuild_steps(timeline: TokenTimeline, *, is_padded: bool) -> ServerSteps:
    """Return the steps that a server ran; is_padded: whether every sequence takes the length of the longest.

    Raises InvalidInputError for a timeline that no server can have produced, or that has no two tokens.
    """
    violations = list(_violations(timeline))
    if violations:
        raise InvalidInputError(violations)
    tokens = _Tokens.of(timeline)
    return _Clusters(timeline, tokens).steps(is_padded=is_padded)


def largest_batch_weight(*timelines: TokenTimeline, is_padded: bool) -> int:
    """Return the maximum batch weight of the TGIS server that served these load tests, as far as they show it.

    It is the most that a batch could weigh between a prefill and its end, see `batching/policies.py`: the setting
    itself where requests had to wait for it, and else as much as was needed. 0: nobody saw a batch.
    """
    heaviest = 0
    for timeline in timelines:
        if (timeline.is_ok & (np.diff(timeline.token_starts) > 0)).any():
            weights = _Clusters(timeline, _Tokens.of(timeline)).admitted_weights(is_padded=is_padded)
            heaviest = max(heaviest, round(np.quantile(weights, _CREDIBLE_SHARE, method="higher")))
    return heaviest


def _violations(timeline: TokenTimeline) -> Iterator[Violation]:
    count = len(timeline.arrival_seconds)
    lengths = {name: len(getattr(timeline, name)) for name in ("end_seconds", "input_tokens", "output_tokens", "is_ok")}
    starts = timeline.token_starts
    for name, length in lengths.items():
        if length != count:
            yield Violation(f"timeline.{name}", f"must have {count} entries, one per request, has {length}")
            return
    if (
        len(starts) != count + 1
        or starts[0] != 0
        or starts[-1] != len(timeline.token_seconds)
        or (np.diff(starts) < 0).any()
    ):
        yield Violation(
            "timeline.token_starts",
            f"must rise from 0 to the {len(timeline.token_seconds)} token times in {count + 1} entries",
        )
        return
    if not count:
        yield Violation("timeline", "has no requests; give the records of a load test")
    elif not timeline.is_ok.any():
        yield Violation("timeline", f"all {count} requests failed; give a load test in which some succeeded")
    elif not len(timeline.token_seconds):
        yield Violation("timeline", "has no tokens; give a load test whose token times were recorded")
    else:
        yield from _request_violations(timeline)


def _request_violations(timeline: TokenTimeline) -> Iterator[Violation]:
    seconds, starts = timeline.token_seconds, timeline.token_starts
    counts = np.diff(starts)
    owner = np.repeat(np.arange(len(counts)), counts)
    falls = np.flatnonzero((np.diff(seconds) < 0) & (np.diff(owner) == 0))
    first = np.full(len(counts), np.inf)
    first[counts > 0] = seconds[starts[:-1][counts > 0]]
    ok = timeline.is_ok
    problems = (
        (np.unique(owner[falls]), "has token times that fall; give them in the order of arrival"),
        (np.unique(owner[~np.isfinite(seconds)]), "has a token time that is no number"),
        (np.flatnonzero(first < timeline.arrival_seconds), "has a token before its arrival"),
        (np.flatnonzero(ok & ~np.isfinite(timeline.arrival_seconds)), "has no arrival time"),
        (np.flatnonzero(ok & (timeline.input_tokens < 1)), "must have at least one input token"),
        (np.flatnonzero(ok & (counts > timeline.output_tokens)), "has more token times than output tokens"),
    )
    shown = 0
    for requests, problem in problems:
        for request in requests[: _SHOWN_VIOLATIONS - shown]:
            yield Violation(f"timeline request {request}", problem)
            shown += 1


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of all requests in the order of time."""

    seconds: Floats
    request: Integers
    index: Integers
    """Which token of its request it is, the withheld first one counted."""
    cluster: Integers

    @classmethod
    def of(cls, timeline: TokenTimeline) -> "_Tokens":
        counts = np.diff(timeline.token_starts)
        request = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(request)) - timeline.token_starts[request] + _is_hidden(timeline)[request]
        order = np.argsort(timeline.token_seconds, kind="stable")
        seconds = timeline.token_seconds[order]
        cluster = np.concatenate([[0], np.cumsum(np.diff(seconds) > SAME_STEP_SECONDS)])
        return cls(seconds, request[order], index[order], cluster)


def _is_hidden(timeline: TokenTimeline) -> Booleans:
    """Return whose first token was withheld."""
    counts = np.diff(timeline.token_starts)
    hidden: Booleans = timeline.is_ok & (counts > 0) & (timeline.output_tokens == counts + 1)
    return hidden


class _Clusters:
    """The moments at which tokens arrived, in order; a step ends at each."""

    def __init__(self, timeline: TokenTimeline, tokens: _Tokens) -> None:
        self._timeline, self._tokens = timeline, tokens
        self._count = int(tokens.cluster[-1]) + 1
        self._starts = np.searchsorted(tokens.cluster, np.arange(self._count + 1))
        self._seconds = tokens.seconds[self._starts[:-1]]
        request_count = len(timeline.arrival_seconds)
        self._first = np.full(request_count, self._count)
        self._last = np.full(request_count, -1)
        np.minimum.at(self._first, tokens.request, tokens.cluster)
        np.maximum.at(self._last, tokens.request, tokens.cluster)
        is_first = tokens.index == 0
        self._new, self._old = self._per_cluster(is_first), self._per_cluster(~is_first)
        self._is_prefill = (self._new > 0) & (self._old == 0)
        """Clusters of first tokens alone."""
        self._prefill_of = self._prefill_of_requests()

    def steps(self, *, is_padded: bool) -> ServerSteps:
        new, old = self._new, self._old
        requests, prompt_tokens, pairs = self._prefill_work(is_padded=is_padded)
        begin, is_begin_known = self._begins()
        seconds = self._seconds - begin
        usable = (
            is_begin_known
            & ~self._disturbed()
            & ((new == 0) | (old == 0))
            & (old == self._decoding())
            & (seconds > 0)
            & ((old > 0) | (requests > 0))
        )
        kept = np.flatnonzero(usable)
        cached = self._cached_tokens(is_padded=is_padded)
        before = np.where(self._is_prefill, new, old)  # a prefill into an idle server moves nothing
        has_changed = (old != np.concatenate([[0], before[:-1]])) | (requests > 0)
        return ServerSteps(
            seconds=seconds[kept],
            decode_sequences=old[kept],
            decode_cached_tokens=cached[kept],
            moved_tokens=np.where(has_changed, cached, 0)[kept],
            prefill_requests=requests[kept],
            prefill_tokens=prompt_tokens[kept],
            prefill_pairs=pairs[kept],
            left_out_count=self._count - len(kept),
        )

    def admitted_weights(self, *, is_padded: bool) -> Integers:
        """Return what the batch can weigh at most from each prefill on, when one of its sequences ends."""
        timeline, prefill_of = self._timeline, self._prefill_of
        served = np.flatnonzero(timeline.is_ok & (prefill_of < self._count))
        prefills = np.unique(prefill_of[served])
        begin = np.searchsorted(prefills, prefill_of[served])
        spans = np.searchsorted(prefills, self._last[served], side="right") - begin
        request = np.repeat(served, spans)
        place = np.arange(len(request)) + np.repeat(begin - np.cumsum(spans) + spans, spans)
        generated = self._generated_before(prefills[place], request)
        generated += _is_hidden(timeline)[request] & (prefill_of[request] < prefills[place])
        remaining = timeline.output_tokens[request] - generated
        order = np.lexsort((-remaining, place))  # those that go on longest are there whenever another one ends
        place, remaining = place[order], remaining[order]
        length = (timeline.input_tokens[request] + generated)[order]
        starts = np.searchsorted(place, np.arange(len(prefills)))
        sequences = np.arange(len(place)) - starts[place] + 1
        if is_padded:
            apart = place * (length.max() + 1)
            weights = (np.maximum.accumulate(length + apart) - apart + remaining) ** 2 * sequences
        else:
            total = np.concatenate([[0], np.cumsum(length)])
            weights = total[1:] - total[starts[place]] + remaining * sequences
        heaviest: Integers = np.maximum.reduceat(weights, starts)
        return heaviest

    def _generated_before(self, cluster: Integers, request: Integers) -> Integers:
        """Return how many tokens each of these requests had got before each of these clusters."""
        tokens, size = self._tokens, self._count + 1
        keys = np.sort(tokens.request * size + tokens.cluster)
        before: Integers = np.searchsorted(keys, request * size + cluster) - self._timeline.token_starts[request]
        return before

    def _per_cluster(self, chosen: Booleans) -> Integers:
        return np.bincount(self._tokens.cluster[chosen], minlength=self._count)

    def _cached_tokens(self, *, is_padded: bool) -> Integers:
        """Return what the sequences of each decode have in the cache."""
        tokens = self._tokens
        lengths = self._timeline.input_tokens[tokens.request] + tokens.index
        lengths[tokens.index == 0] = 0
        if is_padded:
            return np.maximum.reduceat(lengths, self._starts[:-1]) * self._old
        return np.add.reduceat(lengths, self._starts[:-1])

    def _prefill_of_requests(self) -> Integers:
        """Return the cluster in whose step each request's prefill was.

        A withheld first token belongs to the prefill just before, if there was one that others' first tokens show.
        """
        arrival = self._timeline.arrival_seconds
        hidden = _is_hidden(self._timeline)
        prefill = self._first.copy()
        shown = ~hidden & (prefill < self._count)
        earliest = np.full(self._count, np.inf)
        np.minimum.at(earliest, prefill[shown], arrival[shown])
        begin = np.maximum(self._ends_before(), earliest)
        before = np.maximum(prefill - 1, 0)
        joined = hidden & (prefill > 0) & self._is_prefill[before] & (arrival <= begin[before])
        prefill[joined] -= 1
        return prefill

    def _prefill_work(self, *, is_padded: bool) -> tuple[Integers, Integers, Floats]:
        """Return requests, prompt tokens and token pairs of the prefill in each cluster's step."""
        has_prefill = self._prefill_of < self._count
        cluster, inputs = self._prefill_of[has_prefill], self._timeline.input_tokens[has_prefill]
        requests = np.bincount(cluster, minlength=self._count)
        if is_padded:
            longest = np.zeros(self._count, np.int64)
            np.maximum.at(longest, cluster, inputs)
            return requests, longest * requests, longest * (longest + 1) / 2 * requests
        tokens = np.zeros(self._count, np.int64)
        np.add.at(tokens, cluster, inputs)
        pairs = np.zeros(self._count)
        np.add.at(pairs, cluster, inputs * (inputs + 1) / 2)
        return requests, tokens, pairs

    def _decoding(self) -> Integers:
        """Return how many sequences must have got a token in each cluster; 0 where it is a prefill's."""
        present = self._last >= 0
        enters = np.where(_is_hidden(self._timeline), self._first, self._first + 1)
        return np.where(self._is_prefill, 0, self._covering(enters[present], self._last[present]))

    def _begins(self) -> tuple[Floats, Booleans]:
        """Return when the step of each cluster began, at the end of the one before or when work arrived, and if so."""
        before, prefill_of = self._ends_before(), self._prefill_of
        known = prefill_of < self._count
        arrivals = self._timeline.arrival_seconds[known]
        earliest, latest = np.full(self._count, np.inf), np.full(self._count, -np.inf)
        np.minimum.at(earliest, prefill_of[known], arrivals)
        np.maximum.at(latest, prefill_of[known], arrivals)
        present = self._last >= 0
        runs_on = self._covering(self._first[present] + 1, self._last[present]) > 0
        has_prefill = np.isfinite(earliest)
        was_idle = ~runs_on & has_prefill & (earliest > before)
        begin = np.where(was_idle, earliest, before)
        return begin, np.isfinite(begin) & (~has_prefill | (latest <= begin))

    def _disturbed(self) -> Booleans:
        """Return which steps a request shared that failed or of which more than one token is missing."""
        timeline = self._timeline
        strange = ~timeline.is_ok | (timeline.output_tokens > np.diff(timeline.token_starts) + 1)
        begin, end = timeline.arrival_seconds[strange], timeline.end_seconds[strange]
        first = np.searchsorted(self._seconds, np.where(np.isfinite(begin), begin, -np.inf))
        last = np.where(np.isfinite(end), np.searchsorted(self._seconds, end), self._last[strange])
        return self._covering(first, np.maximum(last, first)) > 0

    def _ends_before(self) -> Floats:
        return np.concatenate([[-np.inf], self._seconds[:-1]])

    def _covering(self, first: Integers, last: Integers) -> Integers:
        """Return how many of the spans from `first` to `last`, both included, cover each cluster."""
        size = self._count + 2
        opened = np.bincount(np.minimum(first, self._count), minlength=size)
        closed = np.bincount(np.minimum(last + 1, self._count + 1), minlength=size)
        return np.cumsum(opened - closed)[: self._count]
