"""Whether a window was a steady state: whether throughput and TTFT had no trend in it.

Invariant: a load without a trend is called not steady with a chance of at most 1 %, for slices that do not depend on
each other.

Throughput: the window is cut into slices of the same length, at least as long as the mean request, so that what happens
in one says little about the next; output tokens that arrived in each. TTFT: its median in groups of the same number of
requests in the order in which they were sent. Each is tested for a trend by Mann and Kendall's test at .5 %, and the
trend must be worth mentioning: by Theil and Sen's slope more than 5 % of the median from the first slice to the last.
Source: Mann, Econometrica 13 (1945); Kendall, Rank Correlation Methods (1975); Sen, JASA 63 (1968).
"""

import math

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.domain.records import Integers
from llmpilot_loadtester.domain.window import Window

Floats = npt.NDArray[np.float64]
LARGEST_SLICE_COUNT = 20
LEAST_SLICE_COUNT = 8
LEAST_REQUESTS_PER_SLICE = 5
LARGEST_CHANGE = 0.05
CRITICAL_Z = 2.807
"""Two-sided .5 % of the normal distribution; Bonferroni: 1 % for two tests."""


def is_steady(
    *, token_nanos: Integers, token_counts: Integers, ttft_ms: Floats, end_to_end_ms: Floats, window: Window
) -> bool | None:
    """Tell whether there was no trend; None: too few requests, or too long ones, to tell.

    `token_nanos` are the arrivals in the window, with as many tokens as `token_counts`; `ttft_ms` and `end_to_end_ms`
    are of the requests that were sent in it, in that order.
    """
    answers = [
        _has_no_trend(_throughput_slices(token_nanos, token_counts, end_to_end_ms, window)),
        _has_no_trend(_ttft_slices(ttft_ms)),
    ]
    if False in answers:
        return False
    return None if None in answers else True


def _throughput_slices(
    token_nanos: Integers, token_counts: Integers, end_to_end_ms: Floats, window: Window
) -> Floats | None:
    if len(end_to_end_ms) < LEAST_SLICE_COUNT * LEAST_REQUESTS_PER_SLICE:
        return None
    slices = min(int(window.seconds * 1e3 / max(float(end_to_end_ms.mean()), 1e-9)), LARGEST_SLICE_COUNT)
    if slices < LEAST_SLICE_COUNT:
        return None
    bounds = np.linspace(window.from_nanos, window.until_nanos, slices + 1)
    return np.histogram(token_nanos, bins=bounds, weights=token_counts)[0].astype(np.float64)


def _ttft_slices(ttft_ms: Floats) -> Floats | None:
    slices = min(len(ttft_ms) // LEAST_REQUESTS_PER_SLICE, LARGEST_SLICE_COUNT)
    if slices < LEAST_SLICE_COUNT:
        return None
    return np.array([np.median(part) for part in np.array_split(ttft_ms, slices)])


def _has_no_trend(slices: Floats | None) -> bool | None:
    if slices is None:
        return None
    earlier, later = np.triu_indices(len(slices), k=1)
    differences = slices[later] - slices[earlier]
    change = float(np.median(differences / (later - earlier))) * (len(slices) - 1)
    is_large = abs(change) > LARGEST_CHANGE * abs(float(np.median(slices)))
    return not (is_large and abs(_z_score(slices, float(np.sign(differences).sum()))) > CRITICAL_Z)


def _z_score(slices: Floats, statistic: float) -> float:
    """Return Mann and Kendall's S in standard deviations, corrected for ties and for being whole."""
    count = len(slices)
    _, ties = np.unique(slices, return_counts=True)
    variance = (count * (count - 1) * (2 * count + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    return 0.0 if variance <= 0 else math.copysign(max(abs(statistic) - 1, 0) / math.sqrt(variance), statistic)
