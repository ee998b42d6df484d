import numpy as np
import pytest

from llmpilot_loadtester.domain.steady_state import is_steady
from llmpilot_loadtester.domain.window import Window

SECOND = 10**9
WINDOW = Window(from_nanos=10 * SECOND, until_nanos=130 * SECOND)


def judged(
    random: np.random.Generator,
    *,
    request_count: int = 400,
    rate_growth: float = 0.0,
    ttft_growth: float = 0.0,
    end_to_end_ms: float = 1_500.0,
) -> bool | None:
    """Requests of 20 tokens at random times, with TTFTs that vary by half; both may grow over the window."""
    at = np.sort(random.uniform(size=request_count))
    keep = random.uniform(size=request_count) < (1 + rate_growth * at) / (1 + rate_growth)
    at = at[keep]
    sends = WINDOW.from_nanos + (at * WINDOW.seconds * SECOND).astype(np.int64)
    tokens = (sends[:, None] + np.arange(1, 21) * 50_000_000).ravel()
    return is_steady(
        token_nanos=tokens[WINDOW.holds(tokens)],
        token_counts=np.ones(int(WINDOW.holds(tokens).sum()), np.int64),
        ttft_ms=random.lognormal(4, 0.5, len(at)) * (1 + ttft_growth * at),
        end_to_end_ms=np.full(len(at), end_to_end_ms),
        window=WINDOW,
    )


def test_load_without_a_trend_is_rarely_called_unsteady() -> None:
    """At most 1 %: of 1,000 at most 10 + 3 sqrt(9.9) = 19."""
    random = np.random.default_rng(1)
    answers = [judged(random) for _ in range(1_000)]
    assert None not in answers
    assert answers.count(False) <= 19


@pytest.mark.parametrize("growth", [{"ttft_growth": 1.0}, {"rate_growth": 3.0}])
def test_trend_is_seen(growth: dict[str, float]) -> None:
    """TTFT doubles, or the rate grows fourfold, over the window."""
    random = np.random.default_rng(2)
    answers = [judged(random, request_count=1_600, **growth) for _ in range(50)]
    assert answers.count(False) == 50


def test_small_trend_is_not_worth_mentioning() -> None:
    """2 % more TTFT, without any noise: certain, and too little."""
    ttfts = np.linspace(100, 102, 400)
    tokens = np.linspace(WINDOW.from_nanos, WINDOW.until_nanos - 1, 4_000).astype(np.int64)
    assert is_steady(
        token_nanos=tokens,
        token_counts=np.ones(4_000, np.int64),
        ttft_ms=ttfts,
        end_to_end_ms=np.full(400, 1_000.0),
        window=WINDOW,
    )


@pytest.mark.parametrize(("request_count", "end_to_end_ms"), [(0, 1_000.0), (39, 1_000.0), (400, 20_000.0)])
def test_few_or_long_requests_do_not_tell(request_count: int, end_to_end_ms: float) -> None:
    """Fewer than 8 x 5 requests; or of 20 s, of which the window of 120 s has fewer than 8."""
    random = np.random.default_rng(3)
    assert judged(random, request_count=request_count, end_to_end_ms=end_to_end_ms) is None


def test_requests_without_any_variation_are_steady() -> None:
    tokens = WINDOW.from_nanos + np.arange(12_000) * (SECOND // 100)
    assert is_steady(
        token_nanos=tokens,
        token_counts=np.ones(12_000, np.int64),
        ttft_ms=np.full(120, 50.0),
        end_to_end_ms=np.full(120, 1_000.0),
        window=WINDOW,
    )
