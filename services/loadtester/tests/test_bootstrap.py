import math

import numpy as np
import pytest

from llmpilot_loadtester.domain.bootstrap import LARGEST_GROUP_COUNT, Bootstrap

SIMULATIONS = 200
# A share of 95 % of 200 simulations deviates by sqrt(.95 * .05 / 200) = 1.5 %; three of that, and 2 % for what the
# percentile intervals of a hundred requests miss (Efron & Tibshirani, 1993, chapter 14).
LEAST_COVERAGE, LARGEST_COVERAGE = 0.95 - 0.046 - 0.02, 0.95 + 0.046 + 0.02


def test_quantiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(1)
    values = random.exponential(size=101)
    sample = Bootstrap(0).sample(values, requests=np.arange(101))
    for share in (0, 0.1, 0.5, 0.9, 0.95, 0.99, 1):
        assert sample.quantile(share) == pytest.approx(np.quantile(values, share), rel=1e-12)


def test_weighted_values_are_as_if_repeated() -> None:
    random = np.random.default_rng(2)
    values, requests = random.normal(size=3_000).round(1), random.integers(0, 300, 3_000)
    weights = random.integers(1, 5, 3_000)
    bootstrap = Bootstrap(0)
    weighted = bootstrap.sample(values, requests=requests, weights=weights)
    repeated = bootstrap.sample(np.repeat(values, weights), requests=np.repeat(requests, weights))
    for share in (0.1, 0.5, 0.95, 0.99):
        assert weighted.quantile(share) == np.quantile(np.repeat(values, weights), share)
        assert bootstrap.quantile_interval(weighted, share) == bootstrap.quantile_interval(repeated, share)
    mean = bootstrap.mean_interval(weighted)
    expected = bootstrap.mean_interval(repeated)
    assert mean is not None
    assert expected is not None
    assert (mean.low, mean.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


@pytest.mark.parametrize(("share", "truth"), [(None, math.exp(0.125)), (0.5, 1.0), (0.95, math.exp(0.5 * 1.644854))])
def test_intervals_of_requests_cover_the_truth_as_often_as_they_say(share: float | None, truth: float) -> None:
    """Lognormal with sigma .5: mean exp(sigma^2 / 2), median 1, p95 exp(1.645 sigma)."""
    random = np.random.default_rng(3)
    covered = 0
    for seed in range(SIMULATIONS):
        bootstrap = Bootstrap(seed)
        sample = bootstrap.sample(random.lognormal(0, 0.5, 150), requests=np.arange(150))
        interval = bootstrap.mean_interval(sample) if share is None else bootstrap.quantile_interval(sample, share)
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert LEAST_COVERAGE <= covered / SIMULATIONS <= LARGEST_COVERAGE


def test_intervals_of_tokens_take_the_request_into_account() -> None:
    """Tokens of 100 requests: normal around a speed of the request, of equal variances, so half of it is shared.

    30 tokens of a request tell as much as 30 / (1 + 29 / 2) = 1.9 independent ones: whoever takes them as independent
    has an interval a quarter as wide, and covers the median (0) with Phi(.25 * 1.96) * 2 - 1 = 38 %.
    """
    random = np.random.default_rng(4)
    requests = np.repeat(np.arange(100), 30)
    covered = naively_covered = 0
    for seed in range(SIMULATIONS):
        values = random.normal(size=100)[requests] + random.normal(size=3_000)
        bootstrap = Bootstrap(seed)
        interval = bootstrap.quantile_interval(bootstrap.sample(values, requests=requests), 0.5)
        assert interval is not None
        covered += interval.low <= 0 <= interval.high
        if seed < 40:
            naive = bootstrap.quantile_interval(bootstrap.sample(values, requests=np.arange(3_000)), 0.5)
            assert naive is not None
            naively_covered += naive.low <= 0 <= naive.high
    assert LEAST_COVERAGE <= covered / SIMULATIONS <= LARGEST_COVERAGE
    assert naively_covered / 40 < 0.38 + 3 * math.sqrt(0.38 * 0.62 / 40)


@pytest.mark.parametrize("count", [LARGEST_GROUP_COUNT // 2, 50_000])
def test_width_is_that_of_theory_also_where_requests_are_grouped(count: int) -> None:
    """The mean of n normal values is within 1.96 / sqrt(n); their median within 1.96 sqrt(pi / 2 / n).

    Each end is a quantile of 400 resamples, which deviates by sqrt(.025 * .975 / 400) / density(1.96) = .13 standard
    errors, the width of 3.92 by 5 %, and by 2 to 3 % more from one sample to the next; three of their sum.
    """
    values = np.random.default_rng(6).normal(size=count)
    bootstrap = Bootstrap(1)
    sample = bootstrap.sample(values, requests=np.arange(count))
    mean, median = bootstrap.mean_interval(sample), bootstrap.quantile_interval(sample, 0.5)
    assert mean is not None
    assert median is not None
    assert (mean.high - mean.low) == pytest.approx(3.92 / math.sqrt(count), rel=0.24)
    assert (median.high - median.low) == pytest.approx(3.92 * math.sqrt(math.pi / 2 / count), rel=0.24)


@pytest.mark.parametrize(("share", "least"), [(0.5, 20), (0.95, 72), (0.99, 368)])
def test_too_few_requests_have_no_interval(share: float, least: int) -> None:
    """share^n <= .025: n = 72 for p95, 368 for p99 (ln .025 / ln .99 = 367.04); and 20 at least."""
    bootstrap = Bootstrap(0)
    values = np.random.default_rng(9).permutation(least).astype(np.float64)
    too_few = bootstrap.sample(values[:-1], requests=np.arange(least - 1))
    assert bootstrap.quantile_interval(too_few, share) is None
    enough = bootstrap.sample(np.arange(float(4 * least)), requests=np.arange(4 * least))
    assert bootstrap.quantile_interval(enough, share) is not None


def test_few_requests_have_no_interval_of_the_mean() -> None:
    bootstrap = Bootstrap(0)
    assert bootstrap.mean_interval(bootstrap.sample(np.ones(19), requests=np.arange(19))) is None
    assert bootstrap.mean_interval(bootstrap.sample(np.ones(20), requests=np.arange(20))) is not None


def test_equal_values_have_an_interval_without_width() -> None:
    bootstrap = Bootstrap(0)
    sample = bootstrap.sample(np.full(500, 10.0), requests=np.arange(500))
    for interval in (bootstrap.mean_interval(sample), bootstrap.quantile_interval(sample, 0.99)):
        assert interval is not None
        assert (interval.low, interval.high) == (10.0, 10.0)


def test_seed_decides_the_resamples() -> None:
    values = np.random.default_rng(5).normal(size=300)

    def interval(seed: int) -> object:
        bootstrap = Bootstrap(seed)
        return bootstrap.mean_interval(bootstrap.sample(values, requests=np.arange(300)))

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)
