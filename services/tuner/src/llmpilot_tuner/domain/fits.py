"""What measured peaks teach about predicted ones, case by case.

Invariant: a case that was never measured is corrected as the case that was furthest above its prediction; only cases
that exist at the weight in question are ever asked.
"""

from collections import defaultdict
from collections.abc import Callable

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.probing import Probe

SLOPES = (0.25, 8.0)
"""Bytes measured per byte predicted: what two points say beyond that is noise."""
_SAME_BYTES = 1.0


class Fits:
    """Predictions of the peak of a batch, corrected by what probes measured. Without a prediction there is none."""

    def __init__(self, predict: Callable[[Batch], float], *, weight_bytes: float) -> None:
        self._predict = predict
        self._weight_bytes = weight_bytes
        self._points: dict[str, dict[float, float]] = defaultdict(dict)

    def learn(self, probe: Probe) -> None:
        """Take the peaks of cases that passed."""
        for run in probe.runs:
            peak = max(run.peak_bytes or 0, run.reserved_bytes or 0)
            if run.outcome == "passed" and peak:
                predicted = self._predict(run.batch) - self._weight_bytes
                if predicted > 0:
                    self._points[run.batch.case][predicted] = peak - self._weight_bytes

    def predicted_bytes(self, batch: Batch) -> float:
        """Return the peak that a batch is expected to have, weights included."""
        predicted = self._predict(batch) - self._weight_bytes
        points = self._points.get(batch.case)
        if points:
            return self._weight_bytes + _corrected(points, predicted)
        ratio = max((max(points.items())[1] / max(points) for points in self._points.values()), default=1.0)
        return self._weight_bytes + predicted * (max(ratio, 1.0) if self._points else 1.0)


def _corrected(points: dict[float, float], predicted: float) -> float:
    """Return what a line through the two points with the largest predictions says; of one point, its ratio."""
    (x2, y2), *others = sorted(points.items(), reverse=True)
    if not others or x2 - others[0][0] < _SAME_BYTES:
        return predicted * y2 / x2
    x1, y1 = others[0]
    slope = min(max((y2 - y1) / (x2 - x1), SLOPES[0]), SLOPES[1])
    return y2 + slope * (predicted - x2)
