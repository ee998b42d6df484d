"""Which of many batches can need most memory, whatever an LLM's tokens, scores and logits cost.

Invariant: for every choice of costs >= 0, one of the batches that are kept costs as much as the dearest of all; where
more than `FEW` would have to be kept for that, at least 1 - `SLACK` of it. What a batch costs is linear in its features
(tokens, squares of tokens, rows), so that the dearest is a vertex of the hull of all batches' features, on the side
that faces upwards. The hull grows by the batch that is farthest outside, as in the quickhull algorithm (Barber et al.,
1996).
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

FEW = 6
"""Batches that are kept however little they add."""
SLACK = 1e-3
"""Share of the cost by which a batch has to exceed what is kept, once there are a few."""
ROUNDING = 1e-9
TINY = 1e-300


def needed(features: Floats, *, given: Sequence[float] | None = None, beside: Sequence[int] = ()) -> list[int]:
    """Return the rows that can cost most, ascending; of equals the first, and none that a `given` row outdoes.

    features: one row per batch, two or three columns, all >= 0; beside: rows that are kept anyway, and not returned.
    """
    if not len(features):
        return []
    extra = 0 if given is None else 1
    points = features if given is None else np.concatenate([np.array([given], dtype=np.float64), features])
    points = points / np.maximum(points.max(axis=0), 1.0)
    columns = points.shape[1]
    kept = [*range(extra), *(index + extra for index in beside)]
    settled = len(kept)
    directions = np.concatenate([np.eye(columns), np.full((1, columns), 1 / columns)])
    for last in range(1, settled):
        directions = np.concatenate([directions, _faces_at_last(points[kept[: last + 1]])])
    highest = (points @ directions.T).max(axis=0)
    while True:
        known = (points[kept] @ directions.T).max(axis=0) if kept else np.zeros(len(directions))
        excess = (highest - known) / np.maximum(highest, TINY)
        face = int(excess.argmax())
        if excess[face] <= (SLACK if len(kept) - settled >= FEW else ROUNDING):
            break
        # The first of equals: of batches in a row, as those whose counts divide the weight, an end, not the middle.
        kept.append(int((points @ directions[face] >= highest[face] * (1 - ROUNDING)).argmax()))
        faces = _faces_at_last(points[kept])
        directions = np.concatenate([directions, faces])
        highest = np.concatenate([highest, (points @ faces.T).max(axis=0)])
    return sorted(index - extra for index in kept[settled:] if not _is_outdone(points, index, kept))


def _is_outdone(points: Floats, index: int, kept: list[int]) -> bool:
    """Return whether another that is kept has at least as much of everything."""
    others = points[[other for other in kept if other != index]]
    return bool((others >= points[index]).all(axis=1).any())


def _faces_at_last(kept: Floats) -> Floats:
    """Return the directions in which the hull of what is kept, and of all below it, has a face at the last of them."""
    columns = kept.shape[1]
    steps = kept[:-1] - kept[-1]
    found = []
    for one, other in combinations(range(columns), 2):
        normal = np.zeros_like(steps)
        normal[:, one], normal[:, other] = -steps[:, other], steps[:, one]
        found.append(normal)
    if columns > 2 and len(steps) > 1:  # noqa: PLR2004 a plane is through three points
        (x, y, z), (u, v, w) = steps[np.array(list(combinations(range(len(steps)), 2)))].transpose(1, 2, 0)
        found.append(np.stack([y * w - z * v, z * u - x * w, x * v - y * u], axis=1))
    normals = np.concatenate(found)
    normals = np.where(normals.sum(axis=1, keepdims=True) < 0, -normals, normals)
    total = normals.sum(axis=1)
    normals = normals[(total > 0) & (normals.min(axis=1) >= -ROUNDING * total)]
    normals = np.maximum(normals, 0.0)
    faces: Floats = normals / normals.sum(axis=1, keepdims=True)
    costs = kept @ faces.T
    supporting: Floats = faces[costs.max(axis=0) <= costs[-1] * (1 + ROUNDING)]
    return supporting
