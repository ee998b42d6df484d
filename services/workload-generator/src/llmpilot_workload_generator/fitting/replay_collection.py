"""Collects the requests of a trace in the order of their arrivals, to replay them.

Invariant: requests that arrived together stay in the order of the trace.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.fitting.counting import Numbers
from llmpilot_workload_generator.model import Bins, Column, Integers, Kind, Replay
from llmpilot_workload_generator.traces.trace import TraceBatch

MOST_REQUESTS = 2_000_000
"""A replay is kept whole in memory and in the model file."""


def refuse_replay(batch: TraceBatch, row_count: int) -> None:
    """Raise InvalidInputError where a trace that has so many rows up to this batch cannot be kept."""
    if batch.arrival_nanos is None:
        raise InvalidInputError([Violation("keep_replay", "the trace does not say when its requests arrived")])
    if row_count > MOST_REQUESTS:
        problem = f"keeps up to {MOST_REQUESTS:,} requests, the trace has more; fit a part of it"
        raise InvalidInputError([Violation("keep_replay", problem)])


class ReplayCollection:
    """The requests of the batches so far."""

    def __init__(self, bins: Sequence[Bins], *, prefix_block_tokens: int) -> None:
        self._bins = bins
        self._prefix_block_tokens = prefix_block_tokens
        self._columns: list[list[Numbers]] = [[] for _ in bins]
        self._arrivals: list[Integers] = []
        self._prefix_ids: list[Integers] = []
        self._prefix_counts: list[Integers] = []

    def add(self, batch: TraceBatch, columns: Sequence[Numbers]) -> None:
        """Take a batch, whose parameters are in `columns` as numbers; labels are positions in the categories."""
        for collected, column in zip(self._columns, columns, strict=True):
            collected.append(column.copy())
        if batch.arrival_nanos is not None:
            self._arrivals.append(batch.arrival_nanos)
        if batch.prefix_ids is None or batch.prefix_starts is None:
            self._prefix_block_tokens = 0  # who lacks some lacks all
        if self._prefix_block_tokens and batch.prefix_ids is not None and batch.prefix_starts is not None:
            starts = batch.prefix_starts
            self._prefix_ids.append(batch.prefix_ids[starts[0] : starts[-1]])
            self._prefix_counts.append(np.diff(starts))

    def replay(self) -> Replay:
        """Return what was collected, at least one request."""
        arrivals = np.concatenate(self._arrivals)
        order = np.argsort(arrivals, kind="stable")
        arrivals = arrivals[order]
        ids, starts = self._prefixes(order) if self._prefix_block_tokens else (_NOTHING, _NOTHING)
        return Replay(
            columns={
                bins.name: _typed(np.concatenate(parts)[order], bins)
                for bins, parts in zip(self._bins, self._columns, strict=True)
            },
            arrival_nanos=arrivals - arrivals[0],
            prefix_ids=ids,
            prefix_starts=starts,
            prefix_block_tokens=self._prefix_block_tokens,
        )

    def _prefixes(self, order: npt.NDArray[np.intp]) -> tuple[Integers, Integers]:
        counts = np.concatenate(self._prefix_counts)
        old_starts = np.cumsum(counts) - counts
        counts, old_starts = counts[order], old_starts[order]
        starts = np.concatenate(([0], np.cumsum(counts)))
        sources = np.arange(starts[-1]) + np.repeat(old_starts - starts[:-1], counts)
        return np.concatenate(self._prefix_ids)[sources], starts


_NOTHING = np.zeros(0, np.int64)


def _typed(values: Numbers, bins: Bins) -> Column:
    if bins.kind is Kind.CATEGORY:
        return np.array(bins.categories, np.str_)[values]
    return values.astype(np.int64) if bins.kind is Kind.INTEGER else values.astype(np.float64)
