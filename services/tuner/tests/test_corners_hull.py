"""Of many batches those are kept that can cost most: against every batch, for random costs."""

import numpy as np
import pytest

from llmpilot_tuner.domain import corners_hull
from llmpilot_tuner.domain.corners_hull import SLACK, needed


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("count", [1, 5, 40, 400])
def test_dearest_batch_is_kept_whatever_the_costs(columns: int, count: int) -> None:
    """Within the slack where many would be needed; points on a circle are the worst: every one is a vertex."""
    generator = np.random.default_rng(count + columns)
    for is_circle in {False, columns == 2}:
        points = generator.random((count, columns)) * [1e3, 1e6, 1e1][:columns]
        if is_circle:
            points = np.abs(generator.normal(size=(count, columns)))
            points /= np.linalg.norm(points, axis=1, keepdims=True)
        kept = needed(points)
        costs = 10 ** generator.uniform(-4, 4, (columns, 2000)) / points.max(axis=0)[:, None]
        assert ((points[kept] @ costs).max(axis=0) >= (points @ costs).max(axis=0) * (1 - SLACK)).all()
        assert len(kept) < 60


def test_no_slack_is_used_where_a_few_batches_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle adds a ten-thousandth."""
    points = np.array([[10.0, 0.0], [5.0, 5.001], [0.0, 10.0]])
    assert needed(points) == [0, 1, 2]
    monkeypatch.setattr(corners_hull, "FEW", 2)
    assert needed(points) == [0, 2]


def test_batch_that_another_equals_or_outdoes_is_not_kept() -> None:
    """Of equals the first; in a row the ends; and nothing that a batch given outside does as well."""
    assert needed(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.5]])) == [0]
    assert needed(np.array([[0.0, 4.0], [1.0, 3.0], [2.0, 2.0], [4.0, 0.0]])) == [0, 3]
    assert needed(np.array([[5.0, 0.0], [1.0, 3.0]]), given=(6.0, 0.0)) == [1]
    assert needed(np.array([[5.0, 0.0], [1.0, 3.0]]), beside=[0]) == [1]
    assert needed(np.zeros((0, 3))) == []
