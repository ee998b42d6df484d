import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_recommender.decision import (
    DEFAULT_ERROR_RATE,
    CurvePoint,
    LatencyLimits,
    Limit,
    or_infinite,
    pod_count,
    users_per_pod,
)

LIMITS = LatencyLimits(nttft_ms=100, itl_ms=50)


def point(users_count: int, nttft_ms: float = 10, itl_ms: float = 20, error_rate: float | None = 0.0) -> CurvePoint:
    return CurvePoint(users_count=users_count, nttft_ms=nttft_ms, itl_ms=itl_ms, error_rate=error_rate)


def test_most_users_are_those_before_the_first_violation() -> None:
    curve = [point(1), point(2), point(4), point(8, itl_ms=50.1), point(16, itl_ms=80)]
    assert users_per_pod(curve, LIMITS) == 4


def test_violation_at_a_lower_level_caps_the_users_though_higher_ones_meet_the_limits() -> None:
    curve = [point(1), point(2), point(4, nttft_ms=101), point(8), point(16)]
    assert users_per_pod(curve, LIMITS) == 2


def test_violation_with_a_single_user_leaves_none() -> None:
    assert users_per_pod([point(1, itl_ms=51), point(2)], LIMITS) == 0


def test_curve_within_the_limits_serves_its_last_level() -> None:
    assert users_per_pod([point(1), point(128)], LIMITS) == 128


def test_empty_curve_serves_nobody() -> None:
    assert users_per_pod([], LIMITS) == 0


def test_exact_tie_with_every_limit_passes() -> None:
    tie = point(64, nttft_ms=100, itl_ms=50, error_rate=DEFAULT_ERROR_RATE)
    assert users_per_pod([point(1), tie], LIMITS) == 64
    assert LIMITS.exceeded_by(tie) == {}


@pytest.mark.parametrize("unknown", [math.inf, math.nan])
@pytest.mark.parametrize("limit", [1e-3, 1e7])
def test_unknown_latency_never_meets_a_limit(unknown: float, limit: float) -> None:
    limits = LatencyLimits(nttft_ms=limit, itl_ms=limit)
    assert users_per_pod([point(1, nttft_ms=unknown, itl_ms=0)], limits) == 0
    assert users_per_pod([point(1, nttft_ms=0, itl_ms=unknown)], limits) == 0


def test_latency_nobody_reported_is_infinite_and_zero_is_zero() -> None:
    assert or_infinite(None) == math.inf
    assert or_infinite(0.0) == 0


def test_too_many_failed_requests_cap_the_users() -> None:
    assert users_per_pod([point(1), point(2, error_rate=0.0101), point(4)], LIMITS) == 1


def test_unmeasured_error_rate_does_not_count() -> None:
    assert users_per_pod([point(1, error_rate=None)], replace(LIMITS, error_rate=0)) == 1


def test_every_exceeded_limit_is_named_with_the_value() -> None:
    exceeded = LIMITS.exceeded_by(point(1, nttft_ms=120, itl_ms=60, error_rate=0.5))
    assert exceeded == {Limit.NTTFT: 120, Limit.ITL: 60, Limit.ERROR_RATE: 0.5}


# ceil(users / served) by hand, Eq. (2).
@pytest.mark.parametrize(
    ("users", "served", "pods"),
    [(200, 64, 4), (200, 50, 4), (200, 200, 1), (1, 128, 1), (201, 200, 2), (10**7, 1, 10**7)],
)
def test_pods_are_the_fewest_that_serve_all_users(users: int, served: int, pods: int) -> None:
    assert pod_count(users, served) == pods


@given(st.integers(1, 10**7), st.integers(1, 10**6))
def test_one_pod_fewer_would_not_serve_all_users(users: int, served: int) -> None:
    pods = pod_count(users, served)
    assert pods * served >= users > (pods - 1) * served


latencies = st.one_of(st.floats(0, 20), st.just(10.0), st.just(math.inf))


@given(
    st.lists(st.tuples(latencies, latencies, st.sampled_from([None, 0.0, 0.01, 0.02])), max_size=8),
    st.floats(1, 20),
    st.floats(1, 20),
)
def test_users_per_pod_is_what_trying_every_level_finds(
    values: list[tuple[float, float, float | None]], nttft_limit_ms: float, itl_limit_ms: float
) -> None:
    curve = [point(2**i, *value) for i, value in enumerate(values)]

    def all_levels_up_to(users_count: int) -> bool:
        return all(
            p.nttft_ms <= nttft_limit_ms and p.itl_ms <= itl_limit_ms and (p.error_rate is None or p.error_rate <= 0.01)
            for p in curve
            if p.users_count <= users_count
        )

    served = max((p.users_count for p in curve if all_levels_up_to(p.users_count)), default=0)
    assert users_per_pod(curve, LatencyLimits(nttft_ms=nttft_limit_ms, itl_ms=itl_limit_ms)) == served


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, -math.inf, 1.1e7])
def test_all_wrong_limits_are_named_at_once(wrong: float) -> None:
    violations = LatencyLimits(nttft_ms=wrong, itl_ms=wrong, error_rate=math.nan).violations()
    assert [violation.field for violation in violations] == ["limits.nttft_ms", "limits.itl_ms", "limits.error_rate"]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_edges_of_the_error_rate_are_limits(rate: float) -> None:
    assert LatencyLimits(nttft_ms=1e7, itl_ms=1e-9, error_rate=rate).violations() == ()
