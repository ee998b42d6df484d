"""Step constants from a server's rebuilt steps.

Invariant: no constant is negative, and a fit says how far it is from the steps it was made of.
Source: the linear form fits the steps in the raw records of Lazuka et al., 2024; the weights are Huber's (1964), the
standard errors White's (1980).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.steps.iterations import Booleans, Floats, Integers, ServerSteps
from llmpilot_perfmodel.steps.step_time import StepConstants

CONSTANT_NAMES = tuple(field.name for field in fields(StepConstants))
_PREFILL = [CONSTANT_NAMES.index(name) for name in CONSTANT_NAMES if name.startswith("prefill_")]
_HUBER_DEVIATIONS = 4.0
_ROUNDS = 20
_LEAST_STEPS = 20
_LEAST_SCALE = 0.005
"""Relative: below it, deviations are rounding."""
_DEVIATION_OF_MEDIAN = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""
_SYSTEMATIC_VARIANCE = 1e-5
"""Square of the .3 % of a step's time by which the linear form is off however many steps there are: against a prior,
a run counts for no more than that."""
_LONGEST_PAUSE = 5.0
"""Times the fitted prefill: what is beyond it counts as a fault of the test, not as part of the server's speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """Fitted constants and how well they are known."""

    constants: StepConstants
    standard_errors: StepConstants
    """One for each constant; 0 for one that is left at 0."""
    decode_error: float
    """Mean of |fitted - measured| / measured over the decodes."""
    prefill_error: float | None
    """The same over the prefills; None: every one shared its time with a decode."""
    step_count: int
    largest_batch_tokens: int
    """The most tokens that the batch held after a decode, padding included where the server pads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrior:
    """What is known of a server's constants before its own steps are seen."""

    constants: StepConstants
    """A constant of 0 is not known at all."""
    uncertainty: Mapping[str, float]
    """Relative, by constant; one that is missing or 0 is not known at all."""


@dataclass(frozen=True, slots=True)
class _Table:
    """One row per step: its work by constant, its time, and the weight of its run."""

    work: Floats
    seconds: Floats
    run_weights: Floats
    decodes: Booleans
    prefills: Booleans


def fit_steps(*runs: ServerSteps, prior: StepPrior | None = None) -> StepFit:
    """Return the constants that fit the steps best, relative to each step's time; every run weighs the same.

    prior: holds the constants that these steps cannot tell apart, as in one run of few users, near to what it says.

    Outliers are held back; then the prefill constants are raised so that all prefills together take the measured time,
    because their pauses are part of what a user waits for. Raises InvalidInputError where there are too few steps.
    """
    table = _table(runs)
    constants, errors = _robust_fit(table, prior)
    constants = _with_pauses(constants, table)
    deviations = np.abs(table.work @ constants / table.seconds - 1)
    alone = table.prefills & ~table.decodes
    return StepFit(
        constants=_constants(constants),
        standard_errors=_constants(errors),
        decode_error=float(deviations[~table.prefills].mean()),
        prefill_error=float(deviations[alone].mean()) if alone.any() else None,
        step_count=len(table.seconds),
        largest_batch_tokens=largest_batch_tokens(*runs),
    )


def largest_batch_tokens(*runs: ServerSteps) -> int:
    """Return the most tokens that a batch held after a decode; 0: nobody saw one."""
    return max((int(_held_tokens(run).max(initial=0)) for run in runs), default=0)


def _held_tokens(run: ServerSteps) -> Integers:
    return run.decode_cached_tokens + run.decode_sequences


def _table(runs: tuple[ServerSteps, ...]) -> _Table:
    work = np.concatenate([np.empty((0, len(CONSTANT_NAMES))), *(_work(run) for run in runs)])
    decodes, prefills = work[:, 0] > 0, work[:, 3] > 0
    violations = [
        Violation("steps", f"must have at least {_LEAST_STEPS} {kind}, have {count}; give a longer load test")
        for kind, count in (("decodes", int((decodes & ~prefills).sum())), ("prefills", int(prefills.sum())))
        if count < _LEAST_STEPS
    ]
    if violations:
        raise InvalidInputError(violations)
    counts = [len(run) for run in runs]
    return _Table(
        work=work,
        seconds=np.concatenate([run.seconds for run in runs]),
        run_weights=np.repeat([1 / max(1, count) for count in counts], counts) * max(counts),
        decodes=decodes,
        prefills=prefills,
    )


def _work(run: ServerSteps) -> Floats:
    """Return what each constant is multiplied by; token pairs and tokens are too alike below 1,000 to be told apart."""
    columns = {
        "decode_seconds": run.decode_sequences > 0,
        "decode_seconds_per_sequence": run.decode_sequences,
        "decode_seconds_per_cached_token": run.decode_cached_tokens,
        "prefill_seconds": run.prefill_requests > 0,
        "prefill_seconds_per_token": run.prefill_tokens,
        "prefill_seconds_per_request": run.prefill_requests,
        "decode_seconds_per_moved_token": run.moved_tokens,
    }
    nothing = np.zeros(len(run))
    return np.column_stack([columns.get(name, nothing) for name in CONSTANT_NAMES]).astype(np.float64)


def _constants(values: Floats) -> StepConstants:
    return StepConstants(**dict(zip(CONSTANT_NAMES, values.tolist(), strict=True)))


def _robust_fit(table: _Table, prior: StepPrior | None) -> tuple[Floats, Floats]:
    """Return coefficients >= 0 and their standard errors, by reweighted least squares of relative deviations."""
    relative = table.work / table.seconds[:, None]
    known, precisions = _prior_rows(prior)
    rows = np.concatenate([relative, known])
    weights = table.run_weights
    for _ in range(_ROUNDS):
        prior_weights = _SYSTEMATIC_VARIANCE * precisions * weights.sum()
        coefficients, errors = _weighted_fit(rows, np.concatenate([weights, prior_weights]))
        deviations = np.abs(relative @ coefficients - 1)
        limit = _HUBER_DEVIATIONS * max(_LEAST_SCALE, _DEVIATION_OF_MEDIAN * float(np.median(deviations)))
        weights = table.run_weights * np.minimum(1.0, limit / np.maximum(deviations, limit / 1e6))
    return coefficients, errors


def _prior_rows(prior: StepPrior | None) -> tuple[Floats, Floats]:
    """Return a row for each constant that the prior knows, 1 where the constant is what it says, and its precision."""
    if prior is None:
        return np.empty((0, len(CONSTANT_NAMES))), np.empty(0)
    values = np.array([getattr(prior.constants, name) for name in CONSTANT_NAMES])
    uncertainty = np.array([prior.uncertainty.get(name, 0.0) for name in CONSTANT_NAMES])
    known = np.flatnonzero((values > 0) & (uncertainty > 0))
    rows = np.zeros((len(known), len(CONSTANT_NAMES)))
    rows[np.arange(len(known)), known] = 1 / values[known]
    return rows, uncertainty[known] ** -2


def _weighted_fit(relative: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Leave out the coefficient that is most clearly negative until none is."""
    count = relative.shape[1]
    free = np.flatnonzero(np.abs(relative).max(axis=0) > 0)
    while True:
        part = relative[:, free]
        part = part / np.linalg.norm(part, axis=0)
        size = np.linalg.norm(relative[:, free], axis=0)
        inverse = np.linalg.pinv(part.T @ (part * weights[:, None]), hermitian=True)
        solved = inverse @ (part.T @ weights)
        scatter = part * ((part @ solved - 1) * weights)[:, None]
        deviations = np.sqrt(np.diag(inverse @ (scatter.T @ scatter) @ inverse))
        if (solved >= 0).all():
            coefficients, errors = np.zeros(count), np.zeros(count)
            coefficients[free], errors[free] = solved / size, deviations / size
            return coefficients, errors
        free = np.delete(free, np.argmin(solved / np.maximum(deviations, np.finfo(float).tiny)))


def _with_pauses(coefficients: Floats, table: _Table) -> Floats:
    alone = table.prefills & ~table.decodes
    if not alone.any():
        return coefficients
    fitted, weights = (table.work @ coefficients)[alone], table.run_weights[alone]
    measured = np.minimum(table.seconds[alone], _LONGEST_PAUSE * fitted)
    raised = coefficients.copy()
    raised[_PREFILL] *= max(1.0, float((measured * weights).sum() / (fitted * weights).sum()))
    return raised
