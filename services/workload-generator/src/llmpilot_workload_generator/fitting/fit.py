"""Fits a model to a trace: one pass to sketch the parameters and choose bins, one to count the cells.

Invariant: a model depends on the rows of the trace and the options, not on how the trace is cut into batches or files;
with given edges the fits of parts, merged, are the fit of the whole. Memory does not grow with the trace, but with its
cells.
Source: Lazuka et al., 2024, section III-B.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_workload_generator.fitting.bins import check_max_bins, choose_bins
from llmpilot_workload_generator.fitting.counting import CellCounts, Numbers, small_or_float
from llmpilot_workload_generator.fitting.labels import LabelIndex, sketch_of_labels
from llmpilot_workload_generator.fitting.replay_collection import ReplayCollection, refuse_replay
from llmpilot_workload_generator.fitting.sketch import SketchBuilder
from llmpilot_workload_generator.model import (
    LARGEST_KEY_BITS,
    MAX_BINS,
    Arrivals,
    Bins,
    Kind,
    Parameter,
    Provenance,
    Sketch,
    WorkloadModel,
    key_bits,
)
from llmpilot_workload_generator.traces.read_ahead import read_ahead
from llmpilot_workload_generator.traces.trace import Trace, TraceBatch

Advance = Callable[[int, int | None], None]
"""Is told the bytes read and those there are to read, None where nobody knows; may raise to stop."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How to fit."""

    max_bins: int = MAX_BINS
    """Most bins of a parameter, 2 to 256."""
    edges: tuple[Bins, ...] | None = None
    """The bins of every parameter of the trace; None: chosen to suit it."""
    keep_replay: bool = False
    """Whether to keep the requests in their order, too."""
    source: str = ""
    """What to say about where the trace comes from; "": what the trace says."""
    licence: str = ""
    """Licence of the trace; "": what the trace says."""
    command: str = ""
    """What the user typed."""
    arrivals: Arrivals = Arrivals()  # noqa: RUF009 it is frozen


def fit(trace: Trace, options: FitOptions, *, advance: Advance | None = None) -> WorkloadModel:
    """Fit a model to a trace, which is read twice, or once if the edges are given.

    Raises InvalidInputError that says what is wrong with the trace or the options, PreconditionError where the trace
    has changed when it is read again.
    """
    _check(trace, options)
    reading = _Reading(trace, options, advance)
    if options.edges is not None:
        bins = options.edges
        columns = [_Column(one.name, one.kind, one.categories) for one in bins]
    else:
        columns = [_Column(name, kind) for name, kind in trace.kinds.items()]
        with closing(reading.batches()) as batches:
            for batch in batches:
                for column in columns:
                    column.sketch(column.numbers(batch))
        bins = tuple(column.choose_bins(options.max_bins) for column in columns)
        _check_key_size(bins)
    cells = CellCounts(bins)
    replay = ReplayCollection(bins, prefix_block_tokens=trace.prefix_block_tokens) if options.keep_replay else None
    with closing(reading.batches()) as batches:
        for batch in batches:
            numbers = [column.numbers(batch) for column in columns]
            if options.edges is not None:
                for column, values in zip(columns, numbers, strict=True):
                    column.sketch(values)
            cells.add(numbers)
            if replay is not None:
                replay.add(batch, numbers)
    keys, counts = cells.items()
    return WorkloadModel(
        parameters=tuple(column.parameter(cells, place) for place, column in enumerate(columns)),
        keys=keys,
        counts=counts,
        provenance=reading.provenance(),
        arrivals=options.arrivals,
        replay=replay.replay() if replay is not None else None,
    )


class _Column:
    """What is known of one parameter while the trace is read."""

    def __init__(self, name: str, kind: Kind, categories: tuple[str, ...] | None = None) -> None:
        """`categories`: the labels there may be; None: any."""
        self._name = name
        self._kind = kind
        self._labels = LabelIndex(name, categories)
        self._builder = SketchBuilder()
        self._chosen_for: Sketch | None = None

    def numbers(self, batch: TraceBatch) -> Numbers:
        """Return the values of a batch as numbers that can be counted; of labels, their positions."""
        column = batch.columns[self._name]
        return self._labels.positions(column) if self._kind is Kind.CATEGORY else small_or_float(column)

    def sketch(self, values: Numbers) -> None:
        """Take the values of a batch."""
        self._builder.add(values)

    def choose_bins(self, max_bins: int) -> Bins:
        """Return the bins that suit the values; from now on labels are numbered as there."""
        categories: tuple[str, ...] = ()
        sketch = self._builder.sketch()
        if self._kind is Kind.CATEGORY:
            counts = dict(zip(self._labels.labels, sketch.counts.tolist(), strict=True))
            categories, sketch = sketch_of_labels(counts)
            self._labels = LabelIndex(self._name, categories)
        self._chosen_for = sketch
        return choose_bins(self._name, self._kind, sketch, max_bins=max_bins, categories=categories)

    def parameter(self, cells: CellCounts, place: int) -> Parameter:
        """Return the parameter of the model, when its cells have been counted."""
        sketch = self._chosen_for or self._builder.sketch()
        lows, highs = cells.ranges(place, sketch.values if sketch.exact else self._builder.small_values())
        return Parameter(bins=cells.bins[place], sketch=sketch, lows=lows, highs=highs)


class _Reading:
    """Passes over a trace, and what they find out beside the parameters."""

    def __init__(self, trace: Trace, options: FitOptions, advance: Advance | None) -> None:
        self._trace = trace
        self._options = options
        self._advance = advance
        self._pass_count = 2 if options.edges is None else 1
        self._row_counts: list[int] = []
        self._skipped_row_count = 0
        self._first_nanos: list[int] = []
        self._last_nanos: list[int] = []

    def batches(self) -> Generator[TraceBatch, None, None]:
        """Read the trace from its start. Raises InvalidInputError where no request is in it."""
        row_count, self._skipped_row_count = 0, 0
        bytes_before = len(self._row_counts) * self._trace.size_bytes
        bytes_in_all = self._pass_count * self._trace.size_bytes or None
        with closing(read_ahead(self._trace.batches())) as batches:
            for batch in batches:
                row_count += len(batch)
                self._skipped_row_count += batch.skipped_row_count
                if self._options.keep_replay:
                    refuse_replay(batch, row_count)
                if len(batch):
                    self._note_times(batch)
                    yield batch
                if self._advance is not None:
                    self._advance(bytes_before + batch.bytes_done, bytes_in_all)
        self._row_counts.append(row_count)
        self._check_row_counts()

    def provenance(self) -> Provenance:
        """Return what the model should tell about the trace."""
        has_times = self._trace.has_absolute_times and len(self._first_nanos) > 0
        return Provenance(
            source=self._options.source or self._trace.source,
            licence=self._options.licence or self._trace.licence,
            command=self._options.command,
            row_count=self._row_counts[-1] + self._skipped_row_count,
            skipped_row_count=self._skipped_row_count,
            first_time=_time(min(self._first_nanos)) if has_times else None,
            last_time=_time(max(self._last_nanos)) if has_times else None,
        )

    def _note_times(self, batch: TraceBatch) -> None:
        if batch.arrival_nanos is not None:
            self._first_nanos = [min([*self._first_nanos, int(batch.arrival_nanos.min())])]
            self._last_nanos = [max([*self._last_nanos, int(batch.arrival_nanos.max())])]

    def _check_row_counts(self) -> None:
        row_count, skipped_row_count = self._row_counts[-1], self._skipped_row_count
        if row_count == 0:
            problem = (
                f"has nothing but {skipped_row_count:,} failed requests" if skipped_row_count else "has no requests"
            )
            raise InvalidInputError([Violation(self._trace.source or "trace", problem)])
        if row_count != self._row_counts[0]:
            problem = f"had {self._row_counts[0]:,} requests when read first and {row_count:,} when read again"
            raise PreconditionError(f"{self._trace.source} {problem}: fit it while nobody writes to it")


def _time(nanos: int) -> datetime:
    return _EPOCH + timedelta(microseconds=nanos // 1000)


def _check(trace: Trace, options: FitOptions) -> None:
    """Raise InvalidInputError for what is wrong before anything is read."""
    check_max_bins(options.max_bins)
    if not trace.kinds:
        raise InvalidInputError([Violation(trace.source or "trace", "has no parameters")])
    if options.edges is not None:
        _check_edges(options.edges, trace)
        _check_key_size(options.edges)


def _check_edges(edges: Sequence[Bins], trace: Trace) -> None:
    kinds = {bins.name: bins.kind for bins in edges}
    problems = [f"must have {name}, which the trace has" for name in trace.kinds if name not in kinds]
    problems += [f"must not have {name}, which the trace does not have" for name in kinds if name not in trace.kinds]
    problems += [
        f"must have {name} as {kind}, as the trace has it, have it as {kinds[name]}"
        for name, kind in trace.kinds.items()
        if kinds.get(name, kind) is not kind
    ]
    if len(kinds) < len(edges):
        problems.append("must have each parameter once")
    if problems:
        raise InvalidInputError(Violation("edges", problem) for problem in problems)


def _check_key_size(bins: Sequence[Bins]) -> None:
    sizes = [len(one) for one in bins]
    if math.prod(sizes) <= 1 << LARGEST_KEY_BITS:
        return
    most = int(2 ** (LARGEST_KEY_BITS / len(bins)))
    widest = ", ".join(f"{one.name} {len(one)}" for one in sorted(bins, key=len, reverse=True))
    problem = (
        f"have too many combinations of bins, {key_bits(sizes):.1f} bits where {LARGEST_KEY_BITS} fit: leave some "
        f"parameters out, or take fewer bins ({most} of each always fit); now {widest}"
    )
    raise InvalidInputError([Violation("parameters", problem)])
