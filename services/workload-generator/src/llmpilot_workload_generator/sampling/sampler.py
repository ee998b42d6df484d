"""Draws requests from a workload model, or replays the trace that it keeps.

Invariant: request i depends on the model, the options and i alone, so any cut of the stream gives the same stream, and
one that broke off goes on anywhere.
Source: Lazuka et al., 2024, section III-B; the experiment with independent parameters is that of section V-A.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Columns, Integers, Keys, WorkloadModel
from llmpilot_workload_generator.sampling.adjustment import Adjustment, adjustment_violations
from llmpilot_workload_generator.sampling.arrivals import arrival_times, arrival_violations
from llmpilot_workload_generator.sampling.bin_values import ValueChoice
from llmpilot_workload_generator.sampling.cell_drawing import CellDrawing
from llmpilot_workload_generator.sampling.conditions import parse_conditions
from llmpilot_workload_generator.sampling.drawing import unpack
from llmpilot_workload_generator.sampling.random_stream import LARGEST_SEED
from llmpilot_workload_generator.sampling.replaying import ReplayedRows, replayed_rows

__all__ = ["Sample", "SampleOptions", "Sampler", "ValueChoice"]

LARGEST_INDEX = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What is drawn."""

    seed: int = 0
    """0 to 2^64 - 1."""
    conditions: tuple[str, ...] = ()
    """What every request satisfies before it is scaled, e.g. "input_tokens <= 874", "model in gpt-4, llama"."""
    value_choice: ValueChoice = ValueChoice.CENTRE
    independent: bool = False
    """Every parameter from its own distribution; a condition on one says nothing about the others."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Factors > 0 by parameter. Scaled prompts are other texts: a replay of them has no prefix ids."""
    context_length: int | None = None
    """Tokens of prompt and reply together at most; the prompt is cut, and the reply where it alone is too long."""
    arrivals: Arrivals | None = None
    """None: the model's own; of a replay those of the trace."""
    replay: bool = False
    """Give the kept requests of the trace, in their order, instead of drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some requests of a stream."""

    columns: Columns
    """In the order of the model's parameters."""
    arrival_nanos: Integers | None
    """When each is sent, from the first of the stream on; None: a closed loop."""
    start: int
    """Index of the first one."""
    prefix_ids: Integers | None = None
    """Of a replay: the ids of the blocks of all prompts; None: unknown."""
    prefix_starts: Integers | None = None
    """Where each request's ids begin, and one entry more for where the last ones end."""
    prefix_block_tokens: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def to_arrow(self) -> pa.Table:
        """Return the columns, with `arrival_nanos` where there are arrivals, as a table; prefix ids are left out."""
        columns = {name: pa.array(column) for name, column in self.columns.items()}
        if self.arrival_nanos is not None:
            columns["arrival_nanos"] = pa.array(self.arrival_nanos)
        return pa.table(columns)


class Sampler:
    """Draws from a model as asked. It may be used by several threads."""

    def __init__(self, model: WorkloadModel, options: SampleOptions) -> None:
        """Prepare, which takes milliseconds; raises InvalidInputError that lists every problem."""
        adjustment = Adjustment(scales=options.scales, context_length=options.context_length)
        arrivals = _arrivals(model, options)
        trace_nanos = model.replay.arrival_nanos if model.replay else None
        violations = _violations(model, options)
        violations += adjustment_violations(adjustment, model.parameters)
        if model.replay or not options.replay:
            violations += arrival_violations(arrivals, trace_nanos)
        self._source = _source(model, options, adjustment, violations)
        self._names = model.names
        if isinstance(self._source, ReplayedRows):
            trace_nanos = self._source.arrival_nanos
        self._times = arrival_times(arrivals, seed=options.seed, trace_nanos=trace_nanos)

    @property
    def request_count(self) -> int | None:
        """How many requests there are; None: as many as wanted."""
        return len(self._source) if isinstance(self._source, ReplayedRows) else None

    def draw(self, start: int, count: int) -> Sample:
        """Return requests `start` to `start + count - 1`, fewer at the end of a replay."""
        _check_range(start, count)
        source, times = self._source, self._times
        if isinstance(source, ReplayedRows):
            count = max(min(count, len(source) - start), 0)
            ids, starts = source.prefixes(start, count)
            return Sample(
                columns=source.columns(start, count),
                arrival_nanos=times.nanos(start, count) if times else None,
                start=start,
                prefix_ids=ids,
                prefix_starts=starts,
                prefix_block_tokens=source.prefix_block_tokens,
            )
        arrival_nanos = times.nanos(start, count) if times else None
        return Sample(columns=source.columns(start, count), arrival_nanos=arrival_nanos, start=start)

    def draw_records(self, start: int, count: int) -> Keys:
        """Return the bins of requests, packed: words (rows) of requests (columns), as `drawing.py` describes.

        The fastest way to draw, before values are chosen, scaled and capped. PreconditionError: a replay has none.
        """
        _check_range(start, count)
        if isinstance(self._source, ReplayedRows):
            raise PreconditionError("a replay has no records: draw its columns")
        return self._source.records(start, count)

    def draw_codes(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Return the bin of every parameter (rows) of requests (columns), from `draw_records`."""
        return unpack(self.draw_records(start, count))[: len(self._names)]


def _source(
    model: WorkloadModel, options: SampleOptions, adjustment: Adjustment, violations: list[Violation]
) -> CellDrawing | ReplayedRows:
    """Return where requests come from; raises InvalidInputError with these violations and what else is wrong."""
    restrictions = parse_conditions(options.conditions, model.parameters, violations)
    source: CellDrawing | ReplayedRows | None = None
    try:
        if not options.replay:
            source = CellDrawing(
                model,
                seed=options.seed,
                restrictions=restrictions,
                value_choice=options.value_choice,
                independent=options.independent,
                adjustment=adjustment,
            )
        elif model.replay and not violations:
            source = replayed_rows(model.replay, model.parameters, restrictions, adjustment)
    except InvalidInputError as error:
        violations += error.violations
    if source is None or violations:
        raise InvalidInputError(violations)
    return source


def _arrivals(model: WorkloadModel, options: SampleOptions) -> Arrivals:
    if options.arrivals is not None:
        return options.arrivals
    if options.replay and model.arrivals.kind is not ArrivalKind.TRACE:
        return Arrivals(kind=ArrivalKind.TRACE)
    return model.arrivals


def _violations(model: WorkloadModel, options: SampleOptions) -> list[Violation]:
    violations = []
    if not 0 <= options.seed <= LARGEST_SEED:
        violations.append(Violation("seed", f"must be 0 to 2^64 - 1, is {options.seed}"))
    if options.replay:
        if not model.replay:
            violations.append(Violation("replay", "the model does not keep its trace: fit it with keep_replay"))
        if options.independent:
            violations.append(Violation("independent", "goes with drawing; a replay gives requests as they were"))
        if options.value_choice is not ValueChoice.CENTRE:
            violations.append(Violation("value_choice", "goes with drawing; a replay gives requests as they were"))
    return violations


def _check_range(start: int, count: int) -> None:
    if start < 0 or count < 0 or start + count > LARGEST_INDEX:
        problem = f"and count must be >= 0 and at most 2^62 together, are {start} and {count}"
        raise InvalidInputError([Violation("start", problem)])
