"""The rows of a kept trace, as they are replayed.

Invariant: requests stay in the order of the trace; those that conditions leave out leave a gap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import INPUT_TOKENS, Column, Integers, Parameter, Replay
from llmpilot_workload_generator.sampling.adjustment import Adjustment, block_counts
from llmpilot_workload_generator.sampling.conditions import FIELD, Restriction, rows_admitted


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedRows:
    """Requests of a trace after conditions and adjustments."""

    values: Mapping[str, Column]
    arrival_nanos: Integers
    prefix_ids: Integers | None
    """None where the trace has none, and where prompts are scaled: they would be other texts."""
    prefix_starts: Integers | None
    prefix_block_tokens: int

    def __len__(self) -> int:
        return len(self.arrival_nanos)

    def columns(self, start: int, count: int) -> dict[str, Column]:
        """Return some rows, fewer at the end of the trace."""
        return {name: column[start : start + count] for name, column in self.values.items()}

    def prefixes(self, start: int, count: int) -> tuple[Integers | None, Integers | None]:
        """Return the ids of some rows, and where each row's ids begin among them."""
        if self.prefix_ids is None or self.prefix_starts is None:
            return None, None
        start = min(start, len(self))
        starts = self.prefix_starts[start : start + count + 1]
        return self.prefix_ids[starts[0] : starts[-1]], starts - starts[0]


def replayed_rows(
    replay: Replay,
    parameters: Sequence[Parameter],
    restrictions: Mapping[str, Restriction],
    adjustment: Adjustment,
) -> ReplayedRows:
    """Return the rows of a trace that satisfy conditions, adjusted; raises InvalidInputError where there are none."""
    (admitted,) = np.nonzero(rows_admitted(replay.columns, restrictions, parameters))
    if not len(admitted):
        raise InvalidInputError([Violation(FIELD, "no requests of the trace satisfy all of them")])
    columns = {parameter.name: replay.columns[parameter.name][admitted] for parameter in parameters}
    adjustment.apply(columns)
    ids: Integers | None = None
    starts: Integers | None = None
    if replay.prefix_block_tokens and INPUT_TOKENS in columns and not adjustment.scales_prompts:
        ids, starts = _prefixes(replay, admitted, columns[INPUT_TOKENS].astype(np.int64))
    return ReplayedRows(
        values=columns,
        arrival_nanos=replay.arrival_nanos[admitted],
        prefix_ids=ids,
        prefix_starts=starts,
        prefix_block_tokens=0 if ids is None else replay.prefix_block_tokens,
    )


def _prefixes(replay: Replay, rows: Integers, input_tokens: Integers) -> tuple[Integers, Integers]:
    """Return the ids of some rows, as many as their prompts still have blocks."""
    begins = replay.prefix_starts[rows]
    counts = np.minimum(replay.prefix_starts[rows + 1] - begins, block_counts(input_tokens, replay.prefix_block_tokens))
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    return replay.prefix_ids[places], starts
