from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.files.model_checks import model_problems
from llmpilot_workload_generator.fitting import sketch
from llmpilot_workload_generator.fitting.fit import FitOptions, fit
from llmpilot_workload_generator.fitting.merging import common_bins, merge_models
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Bins, Kind, Provenance, WorkloadModel
from llmpilot_workload_generator.traces.trace import Trace, TraceBatch

KINDS = {"input_tokens": Kind.INTEGER, "temperature": Kind.NUMBER, "model": Kind.CATEGORY}
LABELS = ("llama", "mpt", "bloom")
Row = tuple[int, float, str]
ROWS = st.lists(
    st.tuples(
        st.integers(1, 40) | st.integers(-9, 10**6) | st.integers(999_900, 10**6),
        st.sampled_from([0.0, 0.7, 1.0]) | st.floats(-9, 9) | st.floats(0.7, 0.702),
        st.sampled_from(LABELS),
    ),
    min_size=1,
    max_size=40,
)
NUMBERS = st.floats(-10, 10) | st.integers(-9, 10**6).map(float)
EDGES = st.lists(NUMBERS, min_size=1, max_size=8, unique=True).map(sorted).map(np.array)


def fit_rows(rows: Sequence[Row], options: FitOptions) -> WorkloadModel:
    tokens, temperatures, models = zip(*rows, strict=True)
    batch = TraceBatch(
        columns={
            "input_tokens": np.array(tokens, np.int32),
            "temperature": np.array(temperatures),
            "model": pa.array(models),
        }
    )
    trace = Trace(source="rows", format_name="test", kinds=KINDS, read=lambda: iter([batch]))
    return fit(trace, options)


def arrays_of(model: WorkloadModel) -> list[object]:
    """Return everything a model counts."""
    found: list[object] = [model.keys.tolist(), model.counts.tolist(), model.provenance]
    for one in model.parameters:
        found += [one.bins.name, one.bins.kind, one.bins.edges.tolist(), one.bins.categories]
        found += [one.sketch.values.tolist(), one.sketch.counts.tolist()]
        found += [one.sketch.exact, one.sketch.low, one.sketch.high, one.lows.tolist(), one.highs.tolist()]
    return found


@given(ROWS, ROWS, EDGES, EDGES, st.sampled_from([5, 40, 10_000]))
def test_merged_fits_of_parts_are_the_fit_of_the_whole(
    first: list[Row], second: list[Row], tokens: np.ndarray, temperatures: np.ndarray, exact_values: int
) -> None:
    """In every array, with edges that neither part suggested, and with sketches that are exact, or not, or no more."""
    edges = (
        Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.unique(np.rint(tokens))),
        Bins(name="temperature", kind=Kind.NUMBER, edges=temperatures),
        Bins(name="model", kind=Kind.CATEGORY, edges=np.array([0.0, 1.0]), categories=LABELS),
    )
    options = FitOptions(edges=edges)
    with patch.object(sketch, "EXACT_VALUES", exact_values):
        merged = merge_models([fit_rows(first, options), fit_rows(second, options)])
        whole = fit_rows(first + second, options)
    assert arrays_of(merged) == arrays_of(whole)
    assert list(model_problems(merged)) == []


@given(ROWS, ROWS, st.integers(2, 16))
def test_edges_common_to_parts_are_those_of_the_whole(first: list[Row], second: list[Row], max_bins: int) -> None:
    """A fit over partitions is a map and a sum: fit each, find common edges, fit each to them, merge."""
    parts = [fit_rows(rows, FitOptions(max_bins=max_bins)) for rows in (first, second)]
    edges = common_bins(parts, max_bins=max_bins)
    merged = merge_models([fit_rows(rows, FitOptions(edges=edges)) for rows in (first, second)])
    assert arrays_of(merged) == arrays_of(fit_rows(first + second, FitOptions(max_bins=max_bins)))


CLOSED = Arrivals()
NO_PROVENANCE = Provenance(source="")


def model_of(*bins: Bins, provenance: Provenance = NO_PROVENANCE, arrivals: Arrivals = CLOSED) -> WorkloadModel:
    """A model of one request, all of whose values are 0."""
    columns = {
        one.name: pa.array(one.categories[:1]) if one.kind is Kind.CATEGORY else np.zeros(1, np.int8) for one in bins
    }
    trace = Trace(
        source="",
        format_name="test",
        kinds={one.name: one.kind for one in bins},
        read=lambda: iter([TraceBatch(columns=columns)]),
    )
    return replace(fit(trace, FitOptions(edges=bins, arrivals=arrivals)), provenance=provenance)


def bins(name: str, *edges: float, kind: Kind = Kind.INTEGER, categories: tuple[str, ...] = ()) -> Bins:
    return Bins(name=name, kind=kind, edges=np.array(edges), categories=categories)


def test_models_over_other_bins_are_refused_with_the_parameters_that_differ() -> None:
    one = model_of(bins("a", 0, 1), bins("b", 0), bins("c", 0), bins("d", 0, kind=Kind.CATEGORY, categories=("x",)))
    other = model_of(bins("a", 0, 2), bins("b", 0), bins("d", 0, kind=Kind.CATEGORY, categories=("y",)), bins("e", 0))
    with pytest.raises(InvalidInputError) as caught:
        merge_models([one, one, other, other])
    assert [str(violation) for violation in caught.value.violations] == [
        "c: must be in all models",
        "e: must be in all models",
        "a: must have the same bins in all models: fit them with the same edges",
        "d: must have the same bins in all models: fit them with the same edges",
    ]


def test_parameters_of_another_kind_or_in_another_order_are_refused() -> None:
    one = model_of(bins("a", 0), bins("b", 0))
    with pytest.raises(InvalidInputError, match="a: must be of the same kind in all models"):
        merge_models([one, model_of(bins("a", 0, kind=Kind.NUMBER), bins("b", 0))])
    with pytest.raises(InvalidInputError, match="parameters: must be in the same order in all models"):
        merge_models([one, model_of(bins("b", 0), bins("a", 0))])
    with pytest.raises(InvalidInputError, match="a: must be of the same kind in all models"):
        common_bins([one, model_of(bins("a", 0, kind=Kind.NUMBER), bins("b", 0))])


def test_nothing_cannot_be_merged() -> None:
    for merge in (merge_models, common_bins):
        with pytest.raises(InvalidInputError, match="models: must be at least one"):
            merge([])


def test_provenance_is_added_up() -> None:
    """Sources that several parts share are told once, even where parts were merged before."""
    early, late = datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 6, 1, tzinfo=UTC)
    parts = [
        model_of(bins("a", 0), provenance=provenance)
        for provenance in (
            Provenance(source="x", licence="MIT", row_count=3, first_time=late, last_time=late),
            Provenance(source="y; x", licence="MIT", row_count=4, skipped_row_count=1, command="fit"),
            Provenance(source="", row_count=5, skipped_row_count=2, first_time=early, last_time=early),
        )
    ]
    assert merge_models(parts).provenance == Provenance(
        source="x; y",
        licence="MIT",
        command="fit",
        row_count=12,
        skipped_row_count=3,
        first_time=early,
        last_time=late,
    )


def test_arrivals_stay_where_all_agree() -> None:
    poisson = Arrivals(kind=ArrivalKind.POISSON, rate_per_second=2)
    one, other = model_of(bins("a", 0), arrivals=poisson), model_of(bins("a", 0))
    assert merge_models([one, one]).arrivals == poisson
    assert merge_models([one, other]).arrivals == Arrivals()


def test_a_merged_model_has_no_replay() -> None:
    """Nor arrivals at the times of the trace, which it does not have any more."""
    batch = TraceBatch(columns={"a": np.ones(2, np.int8)}, arrival_nanos=np.arange(2))
    trace = Trace(source="", format_name="test", kinds={"a": Kind.INTEGER}, read=lambda: iter([batch]))
    model = fit(trace, FitOptions(keep_replay=True, arrivals=Arrivals(kind=ArrivalKind.TRACE)))
    merged = merge_models([model])
    assert merged.replay is None
    assert merged.arrivals == Arrivals()


def test_too_many_labels_together_are_no_category() -> None:
    """Of two models with 6,000 labels each, all different."""
    models = []
    for start in (0, 6000):
        batch = TraceBatch(columns={"user": pa.array([str(number) for number in range(start, start + 6000)])})
        trace = Trace(source="", format_name="t", kinds={"user": Kind.CATEGORY}, read=partial(iter, [batch]))
        models.append(fit(trace, FitOptions()))
    with pytest.raises(InvalidInputError, match="user: has more than 10,000 different labels"):
        common_bins(models)
