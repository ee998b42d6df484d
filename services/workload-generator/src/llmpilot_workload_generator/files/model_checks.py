"""What must hold in a workload model, for those that come from outside.

Invariant: a model without a problem can be described, drawn from and merged.
"""

import math
from collections.abc import Iterator

import numpy as np

from llmpilot_workload_generator.model import Kind, Parameter, Replay, WorkloadModel

LARGEST_WHOLE = 2.0**53
"""Up to here every whole number is a float64."""
LARGEST_REQUEST_COUNT = 2**53


def model_problems(model: WorkloadModel) -> Iterator[str]:
    """Yield what is wrong with the columns of a model whose bins are right."""
    radices = [len(parameter.bins) for parameter in model.parameters]
    if len(model.keys) == 0:
        yield "must have a cell"
    if len(model.counts) != len(model.keys):
        yield f"must have a count for each of the {len(model.keys)} cells, has {len(model.counts)}"
    if not (model.keys[1:] > model.keys[:-1]).all():
        yield "the keys of the cells must rise strictly"
    if len(model.keys) and int(model.keys[-1]) >= math.prod(radices):
        yield f"the last key must be below the number of combinations, {math.prod(radices)}, is {model.keys[-1]}"
    if not (model.counts > 0).all():
        yield "the counts of the cells must be > 0"
    total = float(model.counts.sum(dtype=np.float64))
    if total > LARGEST_REQUEST_COUNT:
        yield "the counts of the cells must add up to at most 2^53"
    for parameter in model.parameters:
        for problem in _parameter_problems(parameter, total):
            yield f"{parameter.name}: {problem}"
    if model.replay is not None:
        names = set(model.names)
        if set(model.replay.columns) != names:
            yield "the kept requests must have a column for each parameter"
        for problem in _replay_problems(model.replay):
            yield f"the kept requests: {problem}"


def _parameter_problems(parameter: Parameter, total: float) -> Iterator[str]:
    sketch, bins = parameter.sketch, parameter.bins
    if len(parameter.lows) != len(bins) or len(parameter.highs) != len(bins):
        yield f"must have a smallest and a largest value for each of the {len(bins)} bins"
    elif not ((parameter.lows <= parameter.highs) & (bins.find(parameter.lows) == bins.find(parameter.highs))).all():
        yield "the smallest value of a bin must be at most its largest, and both in the bin"
    if len(sketch.values) == 0 or len(sketch.values) != len(sketch.counts):
        yield "the sketch must have values, and as many counts"
        return
    if not (sketch.values[1:] > sketch.values[:-1]).all():
        yield "the values of the sketch must rise strictly"
    if not (sketch.counts > 0).all() or sketch.counts.sum(dtype=np.float64) != total:
        yield "the counts of the sketch must be > 0 and add up to those of the cells"
    ends = (sketch.values[0], sketch.values[-1])
    if sketch.low > sketch.high or (sketch.exact and (sketch.low, sketch.high) != ends):
        yield "the smallest and the largest value of the sketch must be such"
    if parameter.kind is not Kind.NUMBER and np.abs(sketch.values).max() > LARGEST_WHOLE:
        yield "the values of the sketch must be at most 2^53"
    if (
        parameter.kind is Kind.CATEGORY
        and not (
            (sketch.values == np.trunc(sketch.values)) & (sketch.values >= 0) & (sketch.values < len(bins.categories))
        ).all()
    ):
        yield "the values of the sketch must be positions in the categories"


def _replay_problems(replay: Replay) -> Iterator[str]:
    count = len(replay)
    for name, column in replay.columns.items():
        if len(column) != count:
            yield f"{name} must have {count} values, has {len(column)}"
    if not (replay.arrival_nanos[1:] >= replay.arrival_nanos[:-1]).all():
        yield "the arrivals must never fall"
    starts = replay.prefix_starts
    if len(starts) == len(replay.prefix_ids) == 0:
        return
    if len(starts) != count + 1 or starts[0] != 0 or starts[-1] != len(replay.prefix_ids):
        yield "the starts of the prefix ids must be one for each request and one more, from 0 to the number of ids"
    elif not (starts[1:] >= starts[:-1]).all():
        yield "the starts of the prefix ids must never fall"
