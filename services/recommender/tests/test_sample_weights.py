import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llmpilot_recommender.sample_weights import sample_weights

LIMITS_MS = np.array([100.0, 50.0])


def test_weights_are_equation_4_by_hand() -> None:
    # Curve 7: |nTTFT - 100| = 90, 20, 100 and |ITL - 50| = 30, 10, 40.
    # nTTFT closeness 1 - d/100: 0.1, 0.8, 0; ITL closeness 1 - d/40: 0.25, 0.75, 0; mean of both per row.
    latencies_ms = np.array([[10.0, 20.0], [80.0, 40.0], [200.0, 90.0]])
    weights = sample_weights(latencies_ms, LIMITS_MS, np.array([7, 7, 7]))
    assert weights == pytest.approx([0.175, 0.775, 0.0])


def test_each_curve_has_its_own_farthest_row() -> None:
    # Curve 0: nTTFT distances 90, 50 -> closeness 0, 4/9; ITL 40, 30 -> 0, 1/4.
    # Curve 3: nTTFT distances 60, 80 -> closeness 1/4, 0; ITL 5, 20 -> 3/4, 0.
    latencies_ms = np.array([[10.0, 10.0], [160.0, 55.0], [50.0, 20.0], [20.0, 70.0]])
    weights = sample_weights(latencies_ms, LIMITS_MS, np.array([0, 3, 0, 3]))
    assert weights == pytest.approx([0.0, (1 / 4 + 3 / 4) / 2, (4 / 9 + 1 / 4) / 2, 0.0])


def test_the_two_latencies_may_be_farthest_in_different_rows() -> None:
    # nTTFT distances 100, 50 -> 0, 0.5; ITL distances 10, 40 -> 0.75, 0.
    weights = sample_weights(np.array([[0.0, 60.0], [150.0, 90.0]]), LIMITS_MS, np.array([0, 0]))
    assert weights == pytest.approx([0.375, 0.25])


def test_only_row_of_a_curve_is_its_farthest() -> None:
    assert sample_weights(np.array([[30.0, 20.0]]), LIMITS_MS, np.array([0])) == pytest.approx([0.0])


def test_row_on_both_limits_has_the_full_weight() -> None:
    weights = sample_weights(np.array([[100.0, 50.0], [1.0, 1.0]]), LIMITS_MS, np.array([0, 0]))
    assert weights == pytest.approx([1.0, 0.0])


def test_curve_that_lies_on_the_limits_has_full_weights() -> None:
    weights = sample_weights(np.array([[100.0, 50.0], [100.0, 50.0]]), LIMITS_MS, np.array([0, 0]))
    assert weights == pytest.approx([1.0, 1.0])


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float64, (n, 2), elements=st.floats(0, 1e6)),
            hnp.arrays(np.int64, n, elements=st.integers(0, 3)),
        )
    ),
    st.tuples(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6)),
)
def test_weights_lie_between_zero_and_one_and_closer_rows_weigh_no_less(
    rows: tuple[NDArray[np.float64], NDArray[np.int64]], limits: tuple[float, float]
) -> None:
    latencies_ms, curve_ids = rows
    limits_ms = np.array(limits)
    weights = sample_weights(latencies_ms, limits_ms, curve_ids)
    assert weights.shape == (len(curve_ids),)
    assert ((weights >= 0) & (weights <= 1)).all()
    distances = np.abs(latencies_ms - limits_ms)
    for i in range(len(curve_ids)):
        for j in range(len(curve_ids)):
            if curve_ids[i] == curve_ids[j] and (distances[i] <= distances[j]).all():
                assert weights[i] >= weights[j] - 1e-12
