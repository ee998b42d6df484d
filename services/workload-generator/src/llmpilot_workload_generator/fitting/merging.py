"""Adds up models over the same bins, and finds bins that suit several models together.

Invariant: merging the fits of parts of a trace to the same edges gives what a fit of the whole to these edges gives,
whatever the order and the grouping, except for the order of what the provenance lists.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.fitting.bins import choose_bins
from llmpilot_workload_generator.fitting.counting import sum_equal
from llmpilot_workload_generator.fitting.labels import refuse_too_many, sketch_of_labels
from llmpilot_workload_generator.fitting.sketch import merge_sketches
from llmpilot_workload_generator.model import (
    MAX_BINS,
    ArrivalKind,
    Arrivals,
    Bins,
    Kind,
    Parameter,
    Provenance,
    WorkloadModel,
)

_BETWEEN = "; "


def merge_models(models: Sequence[WorkloadModel]) -> WorkloadModel:
    """Return the model of all requests that went into some models; without a replay.

    Arrivals are kept where all models agree. Raises InvalidInputError that lists the parameters whose bins differ.
    """
    _check_some(models)
    problems = list(dict.fromkeys(problem for model in models[1:] for problem in _differences(models[0], model)))
    if problems:
        raise InvalidInputError(Violation(name, problem) for name, problem in problems)
    keys, counts = sum_equal(
        np.concatenate([model.keys for model in models]), np.concatenate([model.counts for model in models])
    )
    return WorkloadModel(
        parameters=tuple(_merged_parameter(models, position) for position in range(len(models[0].parameters))),
        keys=keys,
        counts=counts,
        provenance=_merged_provenance([model.provenance for model in models]),
        arrivals=_merged_arrivals([model.arrivals for model in models]),
    )


def common_bins(models: Sequence[WorkloadModel], *, max_bins: int = MAX_BINS) -> tuple[Bins, ...]:
    """Return the bins that suit all requests of some models over the same parameters, whatever bins these have.

    Raises InvalidInputError that lists the parameters that are not the same.
    """
    _check_some(models)
    problems = list(dict.fromkeys(problem for model in models[1:] for problem in _other_parameters(models[0], model)))
    if problems:
        raise InvalidInputError(Violation(name, problem) for name, problem in problems)
    return tuple(
        _common_bins([model.parameters[model.index_of(name)] for model in models], max_bins) for name in models[0].names
    )


def _common_bins(parameters: Sequence[Parameter], max_bins: int) -> Bins:
    name, kind = parameters[0].name, parameters[0].kind
    if kind is not Kind.CATEGORY:
        return choose_bins(name, kind, merge_sketches([one.sketch for one in parameters]), max_bins=max_bins)
    counts: Counter[str] = Counter()
    for one in parameters:
        labels = (one.bins.categories[int(position)] for position in one.sketch.values)
        counts.update(dict(zip(labels, one.sketch.counts.tolist(), strict=True)))
    refuse_too_many(name, len(counts))
    categories, sketch = sketch_of_labels(counts)
    return choose_bins(name, kind, sketch, max_bins=max_bins, categories=categories)


def _check_some(models: Sequence[WorkloadModel]) -> None:
    if not models:
        raise InvalidInputError([Violation("models", "must be at least one")])


def _other_parameters(first: WorkloadModel, other: WorkloadModel) -> Iterator[tuple[str, str]]:
    """Yield the parameters, and what is wrong with them, that two models do not share."""
    for name in (*first.names, *(name for name in other.names if name not in first.names)):
        if name not in first.names or name not in other.names:
            yield name, "must be in all models"
        elif first.parameters[first.index_of(name)].kind is not other.parameters[other.index_of(name)].kind:
            yield name, "must be of the same kind in all models"


def _differences(first: WorkloadModel, other: WorkloadModel) -> Iterator[tuple[str, str]]:
    """Yield the parameters, and what is wrong with them, that keep two models from being added up."""
    wrong = dict(_other_parameters(first, other))
    yield from wrong.items()
    for parameter in first.parameters:
        name = parameter.name
        if name not in wrong and not parameter.bins.same_as(other.parameters[other.index_of(name)].bins):
            yield name, "must have the same bins in all models: fit them with the same edges"
    if not wrong and first.names != other.names:
        yield "parameters", "must be in the same order in all models: fit them with the same edges"


def _merged_parameter(models: Sequence[WorkloadModel], position: int) -> Parameter:
    parameters = [model.parameters[position] for model in models]
    bins = parameters[0].bins
    is_filled = np.array([np.bincount(model.codes[position], minlength=len(bins)) > 0 for model in models])
    lows = np.where(is_filled, [one.lows for one in parameters], np.inf).min(axis=0)
    highs = np.where(is_filled, [one.highs for one in parameters], -np.inf).max(axis=0)
    is_empty = ~is_filled.any(axis=0)
    return Parameter(
        bins=bins,
        sketch=merge_sketches([one.sketch for one in parameters]),
        lows=np.where(is_empty, bins.edges, lows),
        highs=np.where(is_empty, bins.edges, highs),
    )


def _merged_provenance(parts: Sequence[Provenance]) -> Provenance:
    first_times = [part.first_time for part in parts if part.first_time is not None]
    last_times = [part.last_time for part in parts if part.last_time is not None]
    return Provenance(
        source=_joined(part.source for part in parts),
        licence=_joined(part.licence for part in parts),
        command=_joined(part.command for part in parts),
        row_count=sum(part.row_count for part in parts),
        skipped_row_count=sum(part.skipped_row_count for part in parts),
        first_time=min(first_times, default=None),
        last_time=max(last_times, default=None),
    )


def _joined(texts: Iterable[str]) -> str:
    """Return the different parts of texts, some of which may be joined ones."""
    return _BETWEEN.join(dict.fromkeys(part for text in texts for part in text.split(_BETWEEN) if part))


def _merged_arrivals(arrivals: Sequence[Arrivals]) -> Arrivals:
    is_same = len(set(arrivals)) == 1 and arrivals[0].kind is not ArrivalKind.TRACE
    return arrivals[0] if is_same else Arrivals()
