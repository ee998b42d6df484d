"""What is done to requests once they are there: lengths are scaled, and prompts cut to what a context holds.

Invariant: whole numbers stay whole, lengths stay >= 1, and prompt and reply together fit into the context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from llmpilot_contracts.errors import Violation
from llmpilot_workload_generator.model import (
    BATCH_SIZE,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    Column,
    Floats,
    Integers,
    Kind,
    Parameter,
)

_LENGTHS = (INPUT_TOKENS, OUTPUT_TOKENS, BATCH_SIZE)
_LEAST_CONTEXT = 2
_LARGEST_WHOLE = 2.0**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """What is changed."""

    scales: Mapping[str, float]
    """Factors by parameter."""
    context_length: int | None
    """Tokens of prompt and reply together at most."""

    @property
    def scales_prompts(self) -> bool:
        """Whether prompts are other than they were, so that nothing that is known of their text holds."""
        return self.scales.get(INPUT_TOKENS, 1.0) != 1.0

    def apply(self, columns: dict[str, Column]) -> None:
        """Put changed columns in place of those there are."""
        for name, factor in self.scales.items():
            with np.errstate(over="ignore"):  # whole numbers are limited, others infinite
                scaled: Floats = cast("Floats", columns[name]) * factor
            if columns[name].dtype.kind == "f":
                columns[name] = scaled
            else:
                least = 1 if name in _LENGTHS else -_LARGEST_WHOLE
                columns[name] = np.clip(np.rint(scaled), least, _LARGEST_WHOLE).astype(np.int64)
        if self.context_length is not None:
            self._cap(columns, self.context_length)

    @staticmethod
    def _cap(columns: dict[str, Column], context_length: int) -> None:
        """Leave room for a token of the prompt, then for the reply: applications cut the prompt, not the reply."""
        inputs, outputs = cast("Integers", columns[INPUT_TOKENS]), cast("Integers", columns[OUTPUT_TOKENS])
        columns[OUTPUT_TOKENS] = outputs = np.minimum(outputs, context_length - 1)
        columns[INPUT_TOKENS] = np.minimum(inputs, np.maximum(context_length - outputs, 1))


def adjustment_violations(adjustment: Adjustment, parameters: Sequence[Parameter]) -> list[Violation]:
    """Say what of an adjustment cannot be done to requests with these parameters."""
    violations = []
    kinds = {parameter.name: parameter.kind for parameter in parameters}
    for name, factor in adjustment.scales.items():
        if name not in kinds:
            violations.append(Violation("scales", f"there is no parameter {name!r}; parameters are {', '.join(kinds)}"))
        elif kinds[name] is Kind.CATEGORY:
            violations.append(Violation("scales", f"{name} is no number"))
        if not 0 < factor < math.inf:
            violations.append(Violation("scales", f"the factor of {name} must be > 0, is {factor:g}"))
    if adjustment.context_length is not None:
        if adjustment.context_length < _LEAST_CONTEXT:
            problem = f"must be >= {_LEAST_CONTEXT}, is {adjustment.context_length}"
            violations.append(Violation("context_length", problem))
        missing = [name for name in (INPUT_TOKENS, OUTPUT_TOKENS) if kinds.get(name) is not Kind.INTEGER]
        if missing:
            violations.append(Violation("context_length", f"the model has no whole numbers of {', '.join(missing)}"))
    return violations


def block_counts(input_tokens: Integers, block_tokens: int) -> Integers:
    """Return how many blocks prompts have, of which the last may be short."""
    return -(-input_tokens // block_tokens)
