"""Draws the cells of a model, or each parameter by itself, and the values inside their bins.

Invariant: what is drawn for request i depends on the seed and i alone. Conditions weigh every cell by the share of each
of its bins that satisfies them, as if parameters were independent inside a cell; values come from that share.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import Column, Floats, Integers, Keys, Kind, Parameter, WorkloadModel
from llmpilot_workload_generator.sampling import drawing
from llmpilot_workload_generator.sampling.adjustment import Adjustment
from llmpilot_workload_generator.sampling.alias import AliasTable, build_alias
from llmpilot_workload_generator.sampling.bin_values import (
    RangeTables,
    ValueChoice,
    ranges_of,
    shares_kept,
    values_inside,
)
from llmpilot_workload_generator.sampling.conditions import FIELD, Restriction, in_words, restrict
from llmpilot_workload_generator.sampling.random_stream import stream_key

CELL_STREAM = 0
_FIRST_PARAMETER_STREAM = 1000
_STREAMS_PER_PARAMETER = 3


class CellDrawing:
    """Draws requests as records of their bins, and as columns of values."""

    def __init__(
        self,
        model: WorkloadModel,
        *,
        seed: int,
        restrictions: Mapping[str, Restriction],
        value_choice: ValueChoice,
        independent: bool,
        adjustment: Adjustment,
    ) -> None:
        """Raise InvalidInputError where no cell satisfies the conditions."""
        self._parameters = model.parameters
        self._adjustment = adjustment
        self._names = model.names
        self._numbers = [(place, one.name) for place, one in enumerate(model.parameters) if one.kind is Kind.NUMBER]
        self._labels = [
            (place, one.name, np.array(one.bins.categories, np.str_))
            for place, one in enumerate(model.parameters)
            if one.kind is Kind.CATEGORY
        ]
        self._word_count = -(-len(model.parameters) // drawing.CODES_PER_WORD)
        self._key = np.uint64(stream_key(seed, CELL_STREAM))
        self._streams = [_parameter_keys(seed, place) for place in range(len(model.parameters))]
        shares = self._prepare_values(restrictions, value_choice)
        marginals = [
            np.bincount(codes, model.counts, len(share)) * share
            for codes, share in zip(model.codes, shares, strict=True)
        ]
        if violations := _unsatisfied(model.parameters, marginals):
            raise InvalidInputError(violations)
        self._marginals: list[AliasTable] = []
        if independent:
            self._marginals = [build_alias(weights) for weights in marginals]
        else:
            self._prepare_cells(model, shares, restrictions)

    def _prepare_values(self, restrictions: Mapping[str, Restriction], value_choice: ValueChoice) -> list[Floats]:
        """Prepare the values inside bins; return the share of each bin that satisfies the conditions."""
        self._points = np.zeros((len(self._parameters), drawing.MOST_CODES), np.int64)
        self._tables: dict[int, RangeTables] = {}
        shares = []
        for place, parameter in enumerate(self._parameters):
            restriction = restrictions.get(parameter.name)
            before = ranges_of(parameter)
            after = restrict(before, restriction) if restriction else before
            shares.append(shares_kept(before, after, len(parameter.bins)))
            if not len(after):
                continue
            values = values_inside(parameter, after, restriction, value_choice)
            if isinstance(values, RangeTables):
                self._tables[place] = values
            else:
                row = self._points[place].view(np.float64) if parameter.kind is Kind.NUMBER else self._points[place]
                row[: len(values)] = values
        return shares

    def _prepare_cells(
        self, model: WorkloadModel, shares: Sequence[Floats], restrictions: Mapping[str, Restriction]
    ) -> None:
        weights: npt.NDArray[np.int64] | Floats = model.counts
        for codes, share in zip(model.codes, shares, strict=True):
            if (share < 1).any():
                is_whole = bool(np.isin(share, (0.0, 1.0)).all())
                weights = weights * (share.astype(np.int64) if is_whole else share)[codes]
        (kept,) = np.nonzero(weights)
        if not len(kept):
            ranges = ", ".join(f"{one.name} is {in_words(one)}" for one in model.parameters if one.name in restrictions)
            raise InvalidInputError([Violation(FIELD, f"no requests of the model satisfy all of them; {ranges}")])
        self._cells = np.zeros((self._word_count, len(kept)), np.uint64)
        for place, codes in enumerate(model.codes):
            word, byte = divmod(place, drawing.CODES_PER_WORD)
            self._cells[word] |= codes[kept].astype(np.uint64) << np.uint64(8 * byte)
        self._table = build_alias(weights[kept])

    def records(self, start: int, count: int) -> Keys:
        """Return the bins of requests, packed: words (rows) of requests (columns), see `drawing.py`."""
        first = np.uint64(start)
        if self._marginals:
            records = np.zeros((self._word_count, count), np.uint64)
            for place, table in enumerate(self._marginals):
                key = self._streams[place][0]
                drawing.draw_marginal(table.slots, table.shift, np.uint64(place), key, first, records)
        else:
            records = np.empty((self._word_count, count), np.uint64)
            drawing.draw_records(self._table.slots, self._table.shift, self._cells, self._key, first, records, count)
        return records

    def columns(self, start: int, count: int) -> dict[str, Column]:
        """Return the values of requests, by parameter."""
        rows = np.empty((len(self._parameters), count), np.int64)
        if self._marginals or self._tables:
            records = self.records(start, count)
            drawing.decode(records, count, self._points, rows, 0)
            self._draw_inside(records, start, rows)
        else:
            drawing.draw_rows(
                self._table.slots,
                self._table.shift,
                self._cells,
                self._key,
                np.uint64(start),
                self._points,
                rows,
            )
        columns: dict[str, Column] = dict(zip(self._names, rows, strict=True))
        if self._numbers:
            numbers = rows.view(np.float64)
            columns |= {name: numbers[place] for place, name in self._numbers}
        for place, name, labels in self._labels:
            columns[name] = labels.take(rows[place])
        self._adjustment.apply(columns)
        return columns

    def _draw_inside(self, records: Keys, start: int, rows: Integers) -> None:
        """Write the rows of the parameters of which a bin has more than one value."""
        numbers = rows.view(np.float64)
        for place, tables in self._tables.items():
            is_whole = self._parameters[place].kind is not Kind.NUMBER
            drawing.draw_inside(
                records,
                np.uint64(place),
                tables.slots,
                tables.firsts,
                tables.shifts,
                tables.lows,
                tables.highs,
                is_whole,
                self._streams[place][1],
                self._streams[place][2],
                np.uint64(start),
                numbers[place],
            )
            if is_whole:
                rows[place] = numbers[place]


def _parameter_keys(seed: int, place: int) -> list[np.uint64]:
    """Return the keys of a parameter's streams: for its bin, for a range inside the bin, for the value in that."""
    first = _FIRST_PARAMETER_STREAM + _STREAMS_PER_PARAMETER * place
    return [np.uint64(stream_key(seed, stream)) for stream in range(first, first + _STREAMS_PER_PARAMETER)]


def _unsatisfied(parameters: Sequence[Parameter], marginals: Sequence[Floats]) -> list[Violation]:
    """Say which parameters have no value that satisfies the conditions on them."""
    return [
        Violation(FIELD, f"no requests of the model satisfy those on {parameter.name}, which is {in_words(parameter)}")
        for parameter, weights in zip(parameters, marginals, strict=True)
        if not weights.any()
    ]
