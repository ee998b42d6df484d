"""A server's steps, rebuilt from the times at which the tokens of its requests arrived.

Tokens of one step arrive together. A step in which nobody gets a first token is a decode of the whole batch; a step in
which everybody does is a prefill. A server that withholds a first token without text hides its prefill: that time is part
of the decode that follows.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimeline:
    """When the tokens of a server's requests arrived; one entry per request, times in seconds of one clock."""

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


def _violations(timeline: TokenTimeline) -> Iterator[Violation]:
    count = len(timeline.arrival_seconds)
    lengths = {
        name: len(getattr(timeline, name)) for name in ("end_seconds", "input_tokens", "output_tokens", "is_ok")
    }
    starts = timeline.token_starts
    for name, length in lengths.items():
        if length != count:
            yield Violation(f"timeline.{name}", f"must have {count} entries, one per request, has {length}")
            return
    if len(starts) != count + 1 or starts[0] != 0 or starts[-1] != len(timeline.token_seconds) or (np.diff(starts) < 0).any():
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
    return timeline.is_ok & (counts > 0) & (timeline.output_tokens == counts + 1)


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

    def steps(self, *, is_padded: bool) -> ServerSteps:
        tokens, timeline = self._tokens, self._timeline
        is_first = tokens.index == 0
        new, old = self._per_cluster(is_first), self._per_cluster(~is_first)
        prefill_of, is_alone = self._prefill_of_requests(new, old)
        lengths = timeline.input_tokens[tokens.request] + tokens.index
        cached = self._per_cluster(~is_first, lengths)
        longest = np.maximum.reduceat(np.where(is_first, 0, lengths), self._starts[:-1])
        has_prefill = prefill_of < self._count
        inputs = timeline.input_tokens[has_prefill]
        requests, prompt_tokens, pairs = (
            np.bincount(prefill_of[has_prefill], weights, self._count)
            for weights in (np.ones(len(inputs)), inputs, inputs * (inputs + 1) / 2)
        )
        if is_padded:
            longest_prompt = np.zeros(self._count)
            np.maximum.at(longest_prompt, prefill_of[has_prefill], inputs)
            cached = longest * old
            prompt_tokens = longest_prompt * requests
            pairs = longest_prompt * (longest_prompt + 1) / 2 * requests
        begin, is_begin_known = self._begins(prefill_of)
        seconds = self._seconds - begin
        usable = (
            is_begin_known
            & ~self._disturbed()
            & ((new == 0) | (old == 0))
            & (old == self._decoding(prefill_of, is_alone))
            & (seconds > 0)
            & ((old > 0) | (requests > 0))
        )
        kept = np.flatnonzero(usable)
        return ServerSteps(
            seconds=seconds[kept],
            decode_sequences=old[kept],
            decode_cached_tokens=cached[kept].astype(np.int64),
            prefill_requests=requests[kept].astype(np.int64),
            prefill_tokens=prompt_tokens[kept].astype(np.int64),
            prefill_pairs=pairs[kept],
            left_out_count=self._count - len(kept),
        )

    def _per_cluster(self, chosen: Booleans, weights: Integers | None = None) -> Integers:
        tokens = self._tokens
        values = np.bincount(tokens.cluster[chosen], None if weights is None else weights[chosen], self._count)
        return values.astype(np.int64)

    def _prefill_of_requests(self, new: Integers, old: Integers) -> tuple[Integers, Booleans]:
        """Return the cluster in whose step each request's prefill was, and of which clusters a prefill is all.

        A withheld first token belongs to the prefill just before, if there was one that others' first tokens show.
        """
        is_alone = (new > 0) & (old == 0)
        hidden = _is_hidden(self._timeline)
        prefill = self._first.copy()
        before = np.maximum(prefill - 1, 0)
        queued_until = self._seconds[np.maximum(before - 1, 0)]
        joined = (
            hidden & (prefill > 0) & is_alone[before] & (self._timeline.arrival_seconds <= queued_until) & (before > 0)
        )
        prefill[joined] -= 1
        return prefill, is_alone

    def _decoding(self, prefill_of: Integers, is_alone: Booleans) -> Integers:
        """Return how many sequences every decode must have given a token; 0 where the cluster is a prefill."""
        present = self._last >= 0
        hidden = _is_hidden(self._timeline)
        enters = np.where(hidden, self._first, self._first + 1)[present]
        change = np.bincount(enters, minlength=self._count + 2)[: self._count + 2]
        change = change - np.bincount(self._last[present] + 1, minlength=self._count + 2)[: self._count + 2]
        # One token only: it enters after its last and leaves there, which cancels out.
        running = np.cumsum(change)[: self._count]
        return np.where(is_alone, 0, running)

    def _begins(self, prefill_of: Integers) -> tuple[Floats, Booleans]:
        """Return when the step that ends in each cluster began: at the end of the one before, or when work arrived."""
        before = np.concatenate([[-np.inf], self._seconds[:-1]])
        arrival = np.full(self._count, np.inf)
        known = prefill_of < self._count
        np.minimum.at(arrival, prefill_of[known], self._timeline.arrival_seconds[known])
        latest = np.full(self._count, -np.inf)
        np.maximum.at(latest, prefill_of[known], self._timeline.arrival_seconds[known])
        present = self._last >= 0
        change = np.bincount(self._first[present] + 1, minlength=self._count + 2)[: self._count + 2]
        change = change - np.bincount(self._last[present] + 1, minlength=self._count + 2)[: self._count + 2]
        runs_on = np.cumsum(change)[: self._count] > 0
        has_prefill = np.isfinite(arrival)
        was_idle = ~runs_on & has_prefill & (arrival > before)
        begin = np.where(was_idle, arrival, before)
        return begin, np.isfinite(begin) & (~has_prefill | (latest <= begin) | was_idle & (latest <= arrival))

    def _disturbed(self) -> Booleans:
        """Return which steps a request shared that failed or of which more than one token is missing."""
        timeline = self._timeline
        counts = np.diff(timeline.token_starts)
        strange = ~timeline.is_ok | (timeline.output_tokens > counts + 1)
        begin = np.where(counts > 0, timeline.arrival_seconds, timeline.arrival_seconds)[strange]
        end = timeline.end_seconds[strange]
        last = np.searchsorted(self._seconds, np.where(np.isfinite(end), end, np.inf))
        last = np.where(np.isfinite(end), last, np.maximum(self._last[strange], 0))
        first = np.searchsorted(self._seconds, np.where(np.isfinite(begin), begin, -np.inf))
        change = np.bincount(np.minimum(first, self._count), minlength=self._count + 2)[: self._count + 2]
        change = change - np.bincount(np.minimum(last, self._count) + 1, minlength=self._count + 2)[: self._count + 2]
        return np.asarray(np.cumsum(change)[: self._count] > 0)
