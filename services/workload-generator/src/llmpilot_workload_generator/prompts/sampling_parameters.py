"""How a server chooses tokens, in words that mean the same for every server.

Invariant: None is "the server's own default", which is not "no limit". The columns of a model are TGIS's: there 0 is
"no limit", and `is_greedy` alone says whether the likeliest token is taken.
Source: parameters of the fmaas protocol (proto/fmaas/generation.proto); vllm/sampling_params.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import IS_GREEDY, TEMPERATURE, TOP_K, TOP_P, Column, Floats

NO_TEMPERATURE = 1.0
NO_TOP_P = 1.0
NO_TOP_K = 0
"""What changes no probability, and limits nothing."""

_DECIMALS = 6
"""Published models have 0.09999999999999999 for 0.1."""
_WORDS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How the tokens of a reply are chosen; None: as the server does unless told."""

    greedy: bool | None = None
    """Take the likeliest token; then the others are None."""
    temperature: float | None = None
    """> 0; NO_TEMPERATURE: probabilities as they are."""
    top_p: float | None = None
    """Only the likeliest that make up this probability; NO_TOP_P: all."""
    top_k: int | None = None
    """Only so many of the likeliest; NO_TOP_K: all."""


def read_sampling(columns: Mapping[str, Column], count: int) -> list[SamplingParameters]:
    """Return the parameters of each request; those without a column are None. Raises InvalidInputError."""
    violations: list[Violation] = []
    greedy = _greedy(columns, violations)
    temperature = _numbers(columns, TEMPERATURE, np.inf, violations)
    top_p = _numbers(columns, TOP_P, 1.0, violations)
    top_k = _numbers(columns, TOP_K, np.inf, violations)
    if violations:
        raise InvalidInputError(violations)
    absent = [None] * count
    rows = zip(
        absent if greedy is None else greedy.astype(bool).tolist(),
        absent if temperature is None else _unlimited(temperature, NO_TEMPERATURE),
        absent if top_p is None else _unlimited(top_p, NO_TOP_P),
        absent if top_k is None else np.maximum(top_k, NO_TOP_K).astype(np.int64).tolist(),
        strict=True,
    )
    known = _Known()
    return [known[row] for row in rows]


_Row = tuple[bool | None, float | None, float | None, int | None]


class _Known(dict[_Row, SamplingParameters]):
    """One object for all requests with the same parameters: few differ, and many share one."""

    def __missing__(self, row: _Row) -> SamplingParameters:
        greedy, temperature, top_p, top_k = row
        if greedy:
            parameters = SamplingParameters(greedy=True)
        else:
            parameters = SamplingParameters(greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k)
        self[row] = parameters
        return parameters


def _unlimited(values: Floats, limit: float) -> list[float]:
    least = 10.0**-_DECIMALS  # 0 would be no limit
    rounded: list[float] = np.where(values > 0, np.maximum(np.round(values, _DECIMALS), least), limit).tolist()
    return rounded


def _numbers(columns: Mapping[str, Column], name: str, most: float, violations: list[Violation]) -> Floats | None:
    if name not in columns:
        return None
    column = columns[name]
    if column.dtype.kind not in "iufb":
        violations.append(Violation(name, "must be a column of numbers, is one of text"))
        return None
    values = column.astype(np.float64)
    least = -1.0 if name == TOP_K else 0.0  # vLLM writes -1 for all
    if (wrong := ~((values >= least) & (values <= most))).any():
        limits = f"from {least:g} to {most:g}" if np.isfinite(most) else f">= {least:g}"
        violations.append(Violation(name, f"must be {limits}, is {values[wrong][0]:g}"))
    return values


def _greedy(columns: Mapping[str, Column], violations: list[Violation]) -> Floats | None:
    if IS_GREEDY not in columns:
        return None
    column = columns[IS_GREEDY]
    if column.dtype.kind in "iufb":
        values = column.astype(np.float64)
    else:
        values = np.array([_WORDS.get(str(word).lower(), np.nan) for word in column.tolist()])
    if not np.isin(values, (0.0, 1.0)).all():
        wrong = column[~np.isin(values, (0.0, 1.0))][0]
        violations.append(Violation(IS_GREEDY, f"must be 0 or 1, false or true, is {wrong}"))
    return values
