"""Labels of categorical parameters: their numbers while a trace is read, and their order in a model.

Invariant: the order of a model's categories depends on nothing but how often each label occurs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.fitting.sketch import sketch_of
from llmpilot_workload_generator.model import Sketch
from llmpilot_workload_generator.traces.columns import numpy_of

MOST_LABELS = 10_000
"""A parameter with more different labels than this is no category."""
_LABELS_SHOWN = 5

Positions = npt.NDArray[np.uint16]


class LabelIndex:
    """Numbers the labels of a parameter: in the given order, or as they occur first."""

    def __init__(self, name: str, known: Sequence[str] | None = None) -> None:
        """`known`: all labels there may be; None: any. Raises InvalidInputError where they are too many."""
        refuse_too_many(name, len(known or ()))
        self._name = name
        self._is_closed = known is not None
        self._positions = {label: position for position, label in enumerate(known or ())}

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, by their numbers."""
        return tuple(self._positions)

    def positions(self, column: pa.Array) -> Positions:
        """Return the number of each value of a column of text, which may be a dictionary array.

        Raises InvalidInputError where there are too many labels, or one that there may not be.
        """
        if not isinstance(column.type, pa.DictionaryType):
            column = column.dictionary_encode()
        indices: npt.NDArray[np.integer[Any]] = numpy_of(column.indices)
        labels = column.dictionary.to_pylist()
        numbers = np.zeros(len(labels), np.uint16)
        used = np.flatnonzero(np.bincount(indices, minlength=len(labels)))
        if self._is_closed:
            self._refuse_unknown([labels[index] for index in used])
        for index in used.tolist():
            numbers[index] = self._positions.setdefault(labels[index], len(self._positions))
            if not self._is_closed:
                refuse_too_many(self._name, len(self._positions))
        positions: Positions = numbers[indices]
        return positions

    def _refuse_unknown(self, labels: Sequence[str]) -> None:
        unknown = [label for label in labels if label not in self._positions]
        if unknown:
            shown = ", ".join(map(repr, unknown[:_LABELS_SHOWN])) + ", ..." * (len(unknown) > _LABELS_SHOWN)
            problem = f"has labels that the edges do not know: {shown}; find edges that suit this trace, too"
            raise InvalidInputError([Violation(self._name, problem)])


def sketch_of_labels(counts: Mapping[str, int]) -> tuple[tuple[str, ...], Sketch]:
    """Return the labels, the most frequent first and by name where equally frequent, and the sketch of their positions.

    Of every label there is at least one.
    """
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    positions = np.arange(len(labels), dtype=np.float64)
    numbers = np.array([counts[label] for label in labels], np.int64)
    return labels, sketch_of(positions, numbers, low=0.0, high=float(len(labels) - 1))


def refuse_too_many(name: str, count: int) -> None:
    """Raise InvalidInputError where a parameter has more labels than a category can have."""
    if count > MOST_LABELS:
        problem = f"has more than {MOST_LABELS:,} different labels: an identifier rather than a category; leave it out"
        raise InvalidInputError([Violation(name, problem)])
