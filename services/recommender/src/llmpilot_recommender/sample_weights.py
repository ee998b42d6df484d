"""Sample weights that aim the regressor at the latency limits: Eq. (4), Lazuka et al., 2024."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sample_weights(latencies_ms: Floats, limits_ms: Floats, curve_ids: NDArray[np.int64]) -> Floats:
    """Return one weight in [0, 1] per row: the mean over both latencies of the closeness to the limit.

    `latencies_ms` is (n, 2): true nTTFT and ITL. `limits_ms` is (2,). `curve_ids` is (n,): rows of the same
    (LLM, GPU profile) share an id, and the farthest of them from the limit gets weight 0 for that latency.
    """
    distances = np.abs(latencies_ms - limits_ms)
    _, positions = np.unique(curve_ids, return_inverse=True)
    farthest = np.zeros((positions.max(initial=-1) + 1, latencies_ms.shape[1]))
    np.maximum.at(farthest, positions, distances)
    scale = farthest[positions]
    closeness = 1 - np.divide(distances, scale, out=np.zeros_like(distances), where=scale > 0)
    return np.asarray(closeness.mean(axis=1), dtype=np.float64)
