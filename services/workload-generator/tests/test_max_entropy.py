import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.imports.max_entropy import spread


@given(st.data())
def test_count_and_sum_are_kept(data: st.DataObject) -> None:
    points = data.draw(st.integers(1, 300))
    count = data.draw(st.integers(1, 10**6))
    total = data.draw(st.integers(0, count * (points - 1)))
    counts = spread(points, count, total)
    assert (counts >= 0).all()
    assert counts.sum() == count
    assert counts @ np.arange(points) == total


def test_middle_mean_is_the_uniform_distribution() -> None:
    assert spread(5, 1000, 2000).tolist() == [200] * 5


def test_two_points_are_known_from_the_mean() -> None:
    assert spread(2, 10, 3).tolist() == [7, 3]


def test_ratio_of_neighbours_is_the_same_everywhere() -> None:
    """A truncated geometric distribution; each of its counts is rounded by at most 1."""
    counts = spread(6, 10**9, 10**9).astype(np.float64)
    ratios = counts[1:] / counts[:-1]
    assert ratios == pytest.approx(np.full(5, ratios[0]), rel=1e-6)


def test_no_other_distribution_with_the_mean_has_more_entropy() -> None:
    """Moving two requests apart and two together, wherever, keeps the mean and loses entropy."""
    counts = spread(8, 10**6, 2 * 10**6)

    def entropy(of: np.ndarray) -> float:
        shares = of[of > 0] / of.sum()
        return float(-(shares * np.log(shares)).sum())

    for low in range(7):
        for high in range(low, 7):
            for amount in (500, -500):
                moved = counts.copy()
                moved[[low, high + 1]] -= amount
                moved[low + 1] += amount
                moved[high] += amount
                assert moved @ np.arange(8) == counts @ np.arange(8)
                if (moved != counts).any() and (moved >= 0).all():
                    assert entropy(moved) < entropy(counts)


def test_no_value_is_nowhere() -> None:
    assert spread(3, 0, 0).tolist() == [0, 0, 0]


def test_sum_out_of_range_is_rejected() -> None:
    with pytest.raises(ValueError, match="2 values of at most 2 cannot add up to 5"):
        spread(3, 2, 5)
