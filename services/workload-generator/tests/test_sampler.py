from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.csv_table import bundled_table
from llmpilot_workload_generator.fitting.sketch import round_down, sketch_of
from llmpilot_workload_generator.imports.model_import import import_model
from llmpilot_workload_generator.model import (
    ArrivalKind,
    Arrivals,
    Bins,
    Column,
    Floats,
    Kind,
    Parameter,
    Provenance,
    Sketch,
    WorkloadModel,
    bin_centres,
    encode_keys,
)
from llmpilot_workload_generator.sampling.sampler import Sample, SampleOptions, Sampler, ValueChoice

CRITICAL_POINT_ONE_PERCENT = 1.95
"""Of a KS distance times sqrt(n); less often exceeded where values repeat."""


def fitted(
    columns: Mapping[str, Sequence[float]], edges: Mapping[str, Sequence[float]], labels: Sequence[str] = ()
) -> WorkloadModel:
    """Count requests by brute force; temperature has fractions, model has labels, everything else is whole."""
    kinds = {"temperature": Kind.NUMBER, "model": Kind.CATEGORY}
    parameters, codes = [], []
    for name, column in columns.items():
        values, counts = np.unique(np.array(column, np.float64), return_counts=True)
        bins = Bins(
            name=name,
            kind=kinds.get(name, Kind.INTEGER),
            edges=np.array(edges[name], np.float64),
            categories=tuple(labels) if name == "model" else (),
        )
        code = bins.find(np.array(column, np.float64))
        inside = [np.array(column, np.float64)[code == place] for place in range(len(bins))]
        parameters.append(
            Parameter(
                bins=bins,
                sketch=Sketch(values=values, counts=counts, exact=True, low=float(values[0]), high=float(values[-1])),
                lows=np.array([found.min() for found in inside]),
                highs=np.array([found.max() for found in inside]),
            )
        )
        codes.append(code)
    keys = encode_keys(np.array(codes), [len(one.bins) for one in parameters])
    cells, counts = np.unique(keys, return_counts=True)
    return WorkloadModel(
        parameters=tuple(parameters), keys=cells, counts=counts, provenance=Provenance(source="by hand")
    )


ROWS: Mapping[str, Sequence[float]] = {
    "input_tokens": [1, 2, 3, 10, 11, 19, 30, 30, 500, 600],
    "output_tokens": [5, 5, 5, 6, 7, 8, 9, 9, 1, 1],
    "temperature": [0.7, 0.7, 0.7, 0.1, 0.1, 0.3, 1.0, 1.0, 0.7, 0.7],
    "model": [0, 0, 0, 0, 1, 1, 2, 0, 3, 0],
}
EDGES: Mapping[str, Sequence[float]] = {
    "input_tokens": [1, 10, 30, 500],
    "output_tokens": [1, 5, 6],
    "temperature": [0.1, 0.7, 1.0],
    "model": [0, 1, 2],
}
LABELS = ("gpt-4", "llama", "phi", "qwen")
MODEL = fitted(ROWS, EDGES, LABELS)


def draw(count: int, model: WorkloadModel = MODEL, **options: Any) -> Sample:
    return Sampler(model, SampleOptions(**options)).draw(0, count)


def rows_of(sample: Sample) -> list[tuple[object, ...]]:
    return list(zip(*(column.tolist() for column in sample.columns.values()), strict=True))


def distance(values: Floats, expected_values: Floats, weights: Floats) -> float:
    """The KS distance of values from a distribution over points."""
    points = np.unique(np.concatenate((values, expected_values)))
    order = np.argsort(expected_values, kind="stable")
    shares = np.concatenate(([0.0], np.cumsum(weights[order]) / weights.sum()))
    expected = shares[np.searchsorted(expected_values[order], points, side="right")]
    found = np.searchsorted(np.sort(values), points, side="right") / len(values)
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("choice", list(ValueChoice))
@settings(max_examples=25)
@given(start=st.integers(0, 2**61), sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=5))
def test_requests_are_the_same_however_the_stream_is_cut(
    independent: bool,
    choice: ValueChoice,
    start: int,
    sizes: list[int],
) -> None:
    options = SampleOptions(seed=7, independent=independent, value_choice=choice, conditions=("input_tokens < 550",))
    whole = Sampler(MODEL, options).draw(start, sum(sizes))
    sampler = Sampler(MODEL, options)
    parts = []
    for size in sizes:
        parts.append(sampler.draw(start, size))
        start += size
    for name, column in whole.columns.items():
        assert np.array_equal(column, np.concatenate([part.columns[name] for part in parts]))


def test_columns_are_typed_and_in_the_order_of_the_model() -> None:
    sample = draw(1000)
    assert {name: column.dtype.kind for name, column in sample.columns.items()} == {
        "input_tokens": "i",
        "output_tokens": "i",
        "temperature": "f",
        "model": "U",
    }
    assert tuple(sample.columns) == MODEL.names
    assert (len(sample), sample.start, sample.arrival_nanos) == (1000, 0, None)
    table = sample.to_arrow()
    assert table.to_pydict() == {name: column.tolist() for name, column in sample.columns.items()}


def test_cells_are_drawn_as_often_as_they_were_seen() -> None:
    """Ten requests; in n = 10^5 draws a share p has a deviation of sqrt(p (1 - p) / n), at most .0016; five of them.

    Centres by hand: 1, 2, 3 have the mean 2; 10, 11, 19 13.33; 500, 600 550; .1, .1, .3 .1667; outputs 6..9 7.8.
    """
    sample = draw(100_000)
    drawn = rows_of(sample)
    expected = {(2, 5, 0.7): 0.3, (13, 8, 0.5 / 3): 0.3, (30, 8, 1.0): 0.2, (550, 1, 0.7): 0.2}
    for (inputs, outputs, temperature), share in expected.items():
        found = [row for row in drawn if row[:2] == (inputs, outputs) and row[2] == pytest.approx(temperature)]
        assert len(found) / len(drawn) == pytest.approx(share, abs=0.008)
    assert {row[3] for row in drawn} == {"gpt-4", "llama", "phi"}  # phi and qwen share a bin, and phi is first


def test_quantiles_are_as_often_as_seen_and_uniform_values_all_alike() -> None:
    """N = 10^5; five deviations of a share of a half are .008. The bin 10 to 29 has 10, 11, 19 and is 3 of 10."""
    by_quantiles = draw(100_000, value_choice=ValueChoice.QUANTILES)
    inputs = by_quantiles.columns["input_tokens"]
    values, counts = np.unique(inputs, return_counts=True)
    assert values.tolist() == [1, 2, 3, 10, 11, 19, 30, 500, 600]
    assert counts / 1e5 == pytest.approx([0.1] * 6 + [0.2] + [0.1] * 2, abs=0.008)
    labels, counts = np.unique(by_quantiles.columns["model"], return_counts=True)
    assert dict(zip(labels.tolist(), counts / 1e5, strict=True)) == pytest.approx(
        {"gpt-4": 0.6, "llama": 0.2, "phi": 0.1, "qwen": 0.1}, abs=0.008
    )
    uniform = draw(100_000, value_choice=ValueChoice.UNIFORM)
    values, counts = np.unique(uniform.columns["input_tokens"], return_counts=True)
    assert values.tolist() == [1, 2, 3, *range(10, 20), 30, *range(500, 601)]
    assert counts[3:13] / 1e5 == pytest.approx([0.03] * 10, abs=0.003)
    temperatures = np.array(uniform.columns["temperature"], np.float64)
    low = temperatures[temperatures < 0.7]
    assert (low.min(), low.max()) == (pytest.approx(0.1, abs=1e-4), pytest.approx(0.3, abs=1e-4))
    assert distance(low, np.linspace(0.1, 0.3, 10_001), np.ones(10_001)) < 2 / len(low) ** 0.5


@pytest.mark.parametrize("name", ["input_tokens", "temperature"])
def test_values_that_only_a_grid_was_kept_of_are_spread_as_they_were(name: str) -> None:
    """Lognormal values, 10^5 of them different; KS of two samples of n = 2 * 10^5 at .1 %: 1.95 sqrt(2 / n)."""
    count = 200_000
    values = np.random.default_rng(0).lognormal(9, 2, count)
    if name == "input_tokens":
        values = np.ceil(values)
    sketch = sketch_of(values, np.ones(count, np.int64), low=float(values.min()), high=float(values.max()))
    assert not sketch.exact
    edges = np.unique(round_down(np.quantile(values, np.linspace(0, 1, 20, endpoint=False))))
    bins = Bins(name=name, kind=Kind.NUMBER if name == "temperature" else Kind.INTEGER, edges=edges)
    places = bins.find(values)
    inside = [values[places == place] for place in range(len(bins))]
    parameter = Parameter(
        bins=bins,
        sketch=sketch,
        lows=np.array([found.min() for found in inside]),
        highs=np.array([found.max() for found in inside]),
    )
    model = WorkloadModel(
        parameters=(parameter,),
        keys=np.arange(len(bins), dtype=np.uint64),
        counts=np.bincount(places),
        provenance=Provenance(source="by hand"),
    )
    drawn = np.array(draw(count, model, value_choice=ValueChoice.QUANTILES).columns[name], np.float64)
    assert values.min() <= drawn.min()
    assert drawn.max() <= values.max()
    assert distance(drawn, values, np.ones(count)) < CRITICAL_POINT_ONE_PERCENT * (2 / count) ** 0.5
    bound = float(np.median(values)) + 0.25
    low = draw(count, model, value_choice=ValueChoice.QUANTILES, conditions=(f"{name} < {bound!r}",)).columns[name]
    kept = values[values < bound]
    assert max(low.tolist()) < bound
    near = distance(np.array(low, np.float64), kept, np.ones(len(kept)))
    assert near < CRITICAL_POINT_ONE_PERCENT * (1 / count + 1 / len(kept)) ** 0.5


def test_independent_parameters_have_the_same_marginals_and_nothing_in_common() -> None:
    """N = 10^5: correlations have a deviation of .0032, shares of .0016; five of them."""
    together, apart = draw(100_000), draw(100_000, independent=True)
    for name in ("input_tokens", "output_tokens", "temperature"):
        values, counts = np.unique(together.columns[name], return_counts=True)
        same, others = np.unique(apart.columns[name], return_counts=True)
        assert np.array_equal(values, same)
        assert np.abs(counts - others).max() < 2**0.5 * 800
    pairs = np.array([apart.columns["input_tokens"], apart.columns["output_tokens"]])
    assert abs(np.corrcoef(pairs)[0, 1]) < 0.016
    assert abs(np.corrcoef([together.columns["input_tokens"], together.columns["output_tokens"]])[0, 1]) > 0.3


CONDITIONS = [
    ("input_tokens <= 11",),
    ("input_tokens > 2", "input_tokens != 10"),
    ("temperature < 0.3",),
    ("temperature != 0.1",),
    ("model in llama, qwen",),
    ("input_tokens >= 3", "model != gpt-4"),
    ("output_tokens in 5, 7, 8, 9", "input_tokens < 500"),
]
CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "input_tokens <= 11": lambda row: row[0] <= 11,
    "input_tokens > 2": lambda row: row[0] > 2,
    "input_tokens != 10": lambda row: row[0] != 10,
    "temperature < 0.3": lambda row: row[2] < 0.3,
    "temperature != 0.1": lambda row: row[2] != 0.1,
    "model in llama, qwen": lambda row: row[3] in {"llama", "qwen"},
    "input_tokens >= 3": lambda row: row[0] >= 3,
    "model != gpt-4": lambda row: row[3] != "gpt-4",
    "output_tokens in 5, 7, 8, 9": lambda row: row[1] in {5, 7, 8, 9},
    "input_tokens < 500": lambda row: row[0] < 500,
}


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("choice", list(ValueChoice))
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_every_request_satisfies_the_conditions(
    conditions: tuple[str, ...],
    choice: ValueChoice,
    independent: bool,
) -> None:
    sample = draw(5_000, conditions=conditions, value_choice=choice, independent=independent)
    for row in set(rows_of(sample)):
        assert all(CHECKS[condition](row) for condition in conditions), row


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_conditional_draws_are_those_draws_that_satisfy_the_conditions(conditions: tuple[str, ...]) -> None:
    """Brute force: draw by quantiles, keep what fits.

    A share of 10^4 draws has a deviation of at most .005, that of 5 * 10^4 .0022: .025 is more than four of both.
    """
    everything = rows_of(draw(200_000, seed=1, value_choice=ValueChoice.QUANTILES))
    kept = [row for row in everything if all(CHECKS[condition](row) for condition in conditions)]
    assert len(kept) >= 10_000
    drawn = rows_of(draw(50_000, seed=2, value_choice=ValueChoice.QUANTILES, conditions=conditions))
    for row in set(kept) | set(drawn):
        assert drawn.count(row) / len(drawn) == pytest.approx(kept.count(row) / len(kept), abs=0.025)


def test_conditions_that_leave_nothing_say_what_there_is() -> None:
    with pytest.raises(InvalidInputError, match="input_tokens, which is 1 to 600"):
        draw(1, conditions=("input_tokens > 1000",))
    with pytest.raises(InvalidInputError, match=r"all of them; input_tokens is 1 to 600, output_tokens is 1 to 9"):
        draw(1, conditions=("input_tokens >= 500", "output_tokens > 5"))
    with pytest.raises(InvalidInputError, match="input_tokens, which is 1 to 600"):
        draw(1, conditions=("input_tokens > 1000",), independent=True)


def test_scaled_lengths_stay_whole_and_at_least_one() -> None:
    """By hand: centres 2, 13, 30, 550 times .1 are .2, 1.3, 3, 55; outputs 1, 5, 8 times 1.5 are 1.5, 7.5, 12."""
    columns = draw(1000, scales={"input_tokens": 0.1, "output_tokens": 1.5, "temperature": 0.5}).columns
    assert set(columns["input_tokens"].tolist()) == {1, 3, 55}
    assert set(columns["output_tokens"].tolist()) == {2, 8, 12}
    assert columns["input_tokens"].dtype == np.int64
    assert max(columns["temperature"].tolist()) == 0.5


def test_a_context_cuts_the_prompt_to_leave_room_for_the_reply() -> None:
    """By hand, in a context of 8: 2 + 5 fits; 13 + 8 and 30 + 8 become 1 + 7; 550 + 1 becomes 7 + 1."""
    columns = draw(1000, context_length=8).columns
    pairs = set(zip(columns["input_tokens"].tolist(), columns["output_tokens"].tolist(), strict=True))
    assert pairs == {(2, 5), (1, 7), (7, 1)}


def test_seeds_give_different_requests() -> None:
    assert rows_of(draw(100, seed=1)) != rows_of(draw(100, seed=2))
    assert rows_of(draw(100, seed=2**64 - 1)) == rows_of(draw(100, seed=2**64 - 1))


def test_requests_get_the_arrivals_of_the_model_unless_asked_otherwise() -> None:
    open_model = WorkloadModel(
        parameters=MODEL.parameters,
        keys=MODEL.keys,
        counts=MODEL.counts,
        provenance=MODEL.provenance,
        arrivals=Arrivals(kind=ArrivalKind.CONSTANT, rate_per_second=2),
    )
    times = Sampler(open_model, SampleOptions()).draw(3, 2).arrival_nanos
    assert times is not None
    assert times.tolist() == [1_500_000_000, 2_000_000_000]
    assert draw(2, open_model, arrivals=Arrivals()).arrival_nanos is None
    assert Sampler(open_model, SampleOptions()).draw(0, 2).to_arrow()["arrival_nanos"].to_pylist() == [0, 500_000_000]


def test_codes_are_the_bins_of_the_values() -> None:
    sampler = Sampler(MODEL, SampleOptions())
    codes, columns = sampler.draw_codes(5, 1000), sampler.draw(5, 1000).columns
    for code, parameter in zip(codes, MODEL.parameters, strict=True):
        if parameter.kind is not Kind.CATEGORY:
            assert np.array_equal(code, parameter.bins.find(np.array(columns[parameter.name], np.float64)))
    assert sampler.request_count is None


def test_more_than_eight_parameters_are_drawn_together() -> None:
    columns = {f"x{place}": [place, place + 1, place + 5] for place in range(11)}
    model = fitted(columns, columns)
    drawn = {tuple(row) for row in rows_of(draw(1000, model))}
    assert drawn == {tuple(column[row] for column in columns.values()) for row in range(3)}
    apart = draw(1000, model, independent=True).columns
    assert all(set(apart[name].tolist()) == set(values) for name, values in columns.items())


def test_a_model_of_one_cell_gives_it() -> None:
    model = fitted({"input_tokens": [7]}, {"input_tokens": [7]})
    for choice in ValueChoice:
        assert draw(3, model, value_choice=choice).columns["input_tokens"].tolist() == [7, 7, 7]


def test_everything_wrong_with_the_options_is_said_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        Sampler(
            MODEL,
            SampleOptions(
                seed=-1,
                conditions=("tokens < 1", "input_tokens < 0"),
                scales={"length": 2.0, "input_tokens": 0.0, "model": 2.0, "output_tokens": float("nan")},
                context_length=1,
                arrivals=Arrivals(kind=ArrivalKind.TRACE, speed=-1),
            ),
        )
    assert [violation.field for violation in caught.value.violations] == [
        "seed",
        "scales",
        "scales",
        "scales",
        "scales",
        "context_length",
        "arrivals.kind",
        "arrivals.speed",
        "conditions",
        "conditions",
    ]


def test_a_context_needs_both_lengths() -> None:
    model = fitted({"input_tokens": [7]}, {"input_tokens": [7]})
    with pytest.raises(InvalidInputError, match="context_length: the model has no whole numbers of output_tokens"):
        draw(1, model, context_length=10)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (2**62, 1)])
def test_requests_that_cannot_be_are_refused(start: int, count: int) -> None:
    with pytest.raises(InvalidInputError, match="start"):
        Sampler(MODEL, SampleOptions()).draw(start, count)


@pytest.fixture(scope="module")
def fmperf(public_data: Path) -> WorkloadModel:
    """The published model of 46,526 cells."""
    return import_model(public_data / "fmperf" / "all_nbins_64.pkl")


def test_ten_million_draws_follow_the_published_cells(fmperf: WorkloadModel) -> None:
    """Chi-square over the cells expected at least 20 times, and one of all others.

    With k cells and a fixed seed, the statistic has the mean k - 1 and a deviation of sqrt(2 (k - 1)): four of them.
    """
    count = 10_000_000
    (records,) = Sampler(fmperf, SampleOptions(seed=42)).draw_records(0, count)
    shifts = np.arange(0, 8 * len(fmperf.codes), 8, dtype=np.uint64)
    cells = (fmperf.codes.astype(np.uint64) << shifts[:, None]).sum(axis=0, dtype=np.uint64)
    order = np.argsort(cells)
    places = order[np.searchsorted(cells, records, sorter=order)]
    assert np.array_equal(cells[places], records)
    seen = np.bincount(places, minlength=len(fmperf.keys))
    expected = fmperf.counts * (count / fmperf.request_count)
    large = expected >= 20
    seen_cells = np.append(seen[large], seen[~large].sum())
    expected_cells = np.append(expected[large], expected[~large].sum())
    freedom = len(seen_cells) - 1
    statistic = ((seen_cells - expected_cells) ** 2 / expected_cells).sum()
    assert large.sum() > 10_000
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    for parameter, codes in zip(fmperf.parameters, fmperf.codes, strict=True):
        marginal, drawn = np.bincount(codes, fmperf.counts), np.bincount(codes, seen) / count
        gap = np.abs(np.cumsum(drawn) - np.cumsum(marginal) / marginal.sum()).max()
        assert gap < CRITICAL_POINT_ONE_PERCENT / count**0.5, parameter.name


@pytest.mark.parametrize("choice", [ValueChoice.CENTRE, ValueChoice.QUANTILES])
@pytest.mark.parametrize("independent", [False, True])
def test_drawn_values_follow_the_published_marginals(
    fmperf: WorkloadModel,
    choice: ValueChoice,
    independent: bool,
) -> None:
    """KS of 10^6 values against the sketch, or against the centres of its bins, at .1 %."""
    count = 1_000_000
    columns = draw(count, fmperf, seed=3, value_choice=choice, independent=independent).columns
    for parameter in fmperf.parameters:
        sketch, values = parameter.sketch, parameter.sketch.values
        if choice is ValueChoice.CENTRE:
            centres = bin_centres(parameter)
            whole = parameter.kind is Kind.INTEGER
            values = (np.rint(centres) if whole else centres)[parameter.bins.find(values)]
        drawn = np.array(columns[parameter.name], np.float64)
        near = distance(np.round(drawn, 9), np.round(values, 9), sketch.counts.astype(np.float64))
        assert near < CRITICAL_POINT_ONE_PERCENT / count**0.5, parameter.name


@pytest.mark.parametrize("condition", ["input_tokens <= 874", "input_tokens < 947"])
def test_the_request_list_of_the_measurements_follows_the_model(fmperf: WorkloadModel, condition: str) -> None:
    """KS of the 929 requests against 10^6 draws; the 5 % critical value is 1.36 / sqrt(929) = .0446.

    874 is the centre of the bin of 810 to 946, which the second condition takes whole.
    """
    lines = bundled_table("characterization_requests.csv").splitlines()
    rows = np.array([[int(word) for word in line.split(",")] for line in lines if line[0].isdigit()])
    assert rows[:, 2].sum() == 929
    columns = draw(1_000_000, fmperf, conditions=(condition,)).columns
    for place, name in enumerate(("input_tokens", "output_tokens")):
        near = distance(np.array(columns[name], np.float64), rows[:, place] * 1.0, rows[:, 2] * 1.0)
        assert near < 1.36 / 929**0.5, name
    whole: Column = draw(1_000_000, fmperf).columns["input_tokens"]
    assert distance(np.array(whole, np.float64), rows[:, 0] * 1.0, rows[:, 2] * 1.0) > 1.36 / 929**0.5
