"""From the records of one load test to its measurement.

Medians and percentiles are over successful requests only, as in the published notebook; unlike there, what failed is
counted. `latency_ms_per_token` holds one entry per message of the server: the first acknowledges the request and is not
a token, the second is the TTFT (queue included), the rest are the ITLs.
Invariant: pure numpy, no Python step per request, and no malformed list is skipped.
Source: Sec. III and the aggregation notebook of Lazuka et al., 2024.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.raw_records import RawFile

_OK = 200
_QUANTILES = (0.5, 0.9, 0.95, 0.99)
_DIGITS_MAX = 9
_EXCERPT_BYTES = 40
_TTFT_ENTRY = 1
_FIRST_ITL_ENTRY = 2

_OPEN, _CLOSE, _COMMA, _SPACE, _DIGIT, _OTHER = range(6)
_KIND_COUNT = 6


def _kinds() -> npt.NDArray[np.uint8]:
    kinds = np.full(256, _OTHER, np.uint8)
    for characters, kind in ((b"[", _OPEN), (b"]", _CLOSE), (b",", _COMMA), (b" ", _SPACE), (b"0123456789", _DIGIT)):
        kinds[list(characters)] = kind
    return kinds


def _allowed_pairs() -> npt.NDArray[np.bool_]:
    allowed = np.zeros((_KIND_COUNT, _KIND_COUNT), np.bool_)
    for kind, followers in (
        (_OPEN, (_DIGIT, _CLOSE)),
        (_DIGIT, (_DIGIT, _COMMA, _CLOSE)),
        (_COMMA, (_SPACE, _DIGIT)),
        (_SPACE, (_DIGIT,)),
    ):
        allowed[kind, list(followers)] = True
    return allowed.ravel()


_KIND_OF_BYTE = _kinds()
_ALLOWED_PAIRS = _allowed_pairs()


def aggregate(raw: RawFile) -> Measurement:
    """Return the measurement of a load test. Raises InvalidInputError that lists every bad row."""
    values, starts = parse_lists(raw.name, raw.latency_text, raw.latency_offsets)
    entry_counts = np.diff(starts)
    ok = raw.status == _OK
    violations = list(_record_violations(raw, ok, entry_counts))
    if violations:
        raise InvalidInputError(violations)
    ttft = values[starts[:-1][ok] + _TTFT_ENTRY]
    entry = np.arange(len(values)) - np.repeat(starts[:-1], entry_counts)
    itl = values[np.repeat(ok, entry_counts) & (entry >= _FIRST_ITL_ENTRY)]
    return Measurement(
        llm=raw.llm,
        gpu_profile=raw.gpu_profile,
        users_count=raw.users_count,
        origin=Origin.MEASURED,
        test_seconds=float(raw.test_seconds),
        ttft=_quantiles(ttft),
        nttft=_quantiles(ttft / raw.input_tokens[ok]),
        itl=_quantiles(itl),
        throughput_tokens_per_second=float(raw.output_tokens[ok].sum() / raw.test_seconds),
        request_count=len(ok),
        error_count=int(np.count_nonzero(~ok)),
        oom_count=int(np.count_nonzero(raw.is_out_of_memory & ~ok)),
    )


def parse_lists(
    name: str, text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers of all lists one after the other, and where each list begins among them (and the last ends).

    Raises InvalidInputError that lists every row whose text is not a list of whole numbers such as `[8, 164, 19]`.
    """
    kinds = _KIND_OF_BYTE[text]
    is_digit = np.concatenate(([False], kinds == _DIGIT, [False]))
    begins = np.flatnonzero(is_digit[1:-1] & ~is_digit[:-2])
    ends = np.flatnonzero(is_digit[1:-1] & ~is_digit[2:]) + 1
    lengths = ends - begins
    bad_rows = _malformed_rows(kinds, offsets, begins[lengths > _DIGITS_MAX])
    if len(bad_rows):
        raise InvalidInputError(
            Violation(
                f"{name} row {row + 1}, column latency_ms_per_token",
                f"must be a list of whole numbers, is {_excerpt(text[offsets[row] : offsets[row + 1]])}",
            )
            for row in bad_rows
        )
    values = np.zeros(len(begins), np.int64)
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > place)
        values[longer] += (text[ends[longer] - 1 - place] - ord("0")).astype(np.int64) * 10**place
    return values, np.searchsorted(begins, offsets)


def _malformed_rows(
    kinds: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], too_long: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """Return the rows that are not `[`, numbers with `,` between them, `]`."""
    wrong = ~_ALLOWED_PAIRS[kinds[:-1] * np.uint8(_KIND_COUNT) + kinds[1:]]
    inner = offsets[(offsets > 0) & (offsets < len(kinds))]
    wrong[inner - 1] = False  # the two bytes belong to different rows
    bad = np.diff(offsets) == 0
    filled = np.flatnonzero(~bad)
    bad[filled] = (kinds[offsets[filled]] != _OPEN) | (kinds[offsets[filled + 1] - 1] != _CLOSE)
    bad[np.searchsorted(offsets, np.concatenate((np.flatnonzero(wrong), too_long)), side="right") - 1] = True
    return np.flatnonzero(bad)


def _excerpt(text: npt.NDArray[np.uint8]) -> str:
    shown = text[:_EXCERPT_BYTES].tobytes().decode(errors="replace")
    return repr(shown + "..." * (len(text) > _EXCERPT_BYTES))


def _record_violations(
    raw: RawFile, ok: npt.NDArray[np.bool_], entry_counts: npt.NDArray[np.int64]
) -> Iterator[Violation]:
    no_input = ~((raw.input_tokens > 0) & (raw.input_tokens < np.inf))
    no_output = ~((raw.output_tokens >= 0) & (raw.output_tokens < np.inf))
    for column, is_bad, problem in (
        ("status", ~np.isfinite(raw.status), "must not be empty"),
        ("latency_ms_per_token", ok & (entry_counts <= _TTFT_ENTRY), "must have a time to first token, status is 200"),
        ("n_input_tokens", ok & no_input, "must be > 0, status is 200"),
        ("n_output_tokens", ok & no_output, "must be >= 0, status is 200"),
    ):
        for row in np.flatnonzero(is_bad):
            yield Violation(f"{raw.name} row {row + 1}, column {column}", problem)


def _quantiles(milliseconds: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Quantiles:
    if not len(milliseconds):
        return Quantiles()
    median, p90, p95, p99 = np.quantile(milliseconds, _QUANTILES).tolist()
    return Quantiles(median_ms=median, p90_ms=p90, p95_ms=p95, p99_ms=p99)
