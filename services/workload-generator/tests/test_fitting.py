import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_workload_generator.files.model_checks import model_problems
from llmpilot_workload_generator.fitting import replay_collection
from llmpilot_workload_generator.fitting.fit import FitOptions, fit
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Bins, Kind, WorkloadModel, bin_counts
from llmpilot_workload_generator.traces.trace import Trace, TraceBatch, TraceColumn

KINDS = {"input_tokens": Kind.INTEGER, "temperature": Kind.NUMBER, "model": Kind.CATEGORY}


def trace_of(batches: Sequence[TraceBatch], kinds: Mapping[str, Kind] = KINDS, *, size_bytes: int = 0) -> Trace:
    return Trace(
        source="test trace", format_name="test", kinds=kinds, read=lambda: iter(batches), size_bytes=size_bytes
    )


def batch_of(rows: Sequence[tuple[int, float, str]], *, skipped_row_count: int = 0) -> TraceBatch:
    tokens, temperatures, models = zip(*rows, strict=True) if rows else ((), (), ())
    columns: dict[str, TraceColumn] = {
        "input_tokens": np.array(tokens, np.int32),
        "temperature": np.array(temperatures, np.float64),
        "model": pa.array(models, pa.string()),
    }
    return TraceBatch(columns=columns, skipped_row_count=skipped_row_count)


def whole_numbers(*values: int, **more: object) -> TraceBatch:
    return TraceBatch(columns={"input_tokens": np.array(values, np.int16)}, **more)  # type: ignore[arg-type]


WHOLE = {"input_tokens": Kind.INTEGER}


def requests_of(model: WorkloadModel) -> Counter[tuple[int, ...]]:
    """Return how many requests each combination of bins holds."""
    return Counter(dict(zip(map(tuple, model.codes.T.tolist()), model.counts.tolist(), strict=True)))


ROWS = st.lists(
    st.tuples(
        st.integers(1, 40) | st.integers(-9, 10**6),
        st.sampled_from([0.0, 0.7, 1.0]) | st.floats(-9, 9),
        st.sampled_from(["llama", "mpt", "é", ""]),
    ),
    min_size=1,
    max_size=60,
)


@given(ROWS, st.integers(1, 60), st.integers(2, 8))
def test_cells_hold_the_rows_that_their_bins_say(
    rows: list[tuple[int, float, str]], batch_rows: int, max_bins: int
) -> None:
    """Against the bins as the model defines them, row by row, whatever the batches."""
    batches = [batch_of(rows[start : start + batch_rows]) for start in range(0, len(rows), batch_rows)]
    model = fit(trace_of(batches), FitOptions(max_bins=max_bins))
    assert list(model_problems(model)) == []
    bins = [parameter.bins for parameter in model.parameters]
    assert model.names == tuple(KINDS)
    assert all(len(one) <= max_bins for one in bins)
    values = [(tokens, warmth, bins[2].categories.index(name)) for tokens, warmth, name in rows]
    found = [one.find(np.array(column)) for one, column in zip(bins, zip(*values, strict=True), strict=True)]
    assert requests_of(model) == Counter(zip(*(codes.tolist() for codes in found), strict=True))
    for parameter, column, codes in zip(model.parameters, zip(*values, strict=True), found, strict=True):
        for code in range(len(parameter.bins)):
            inside = [value for value, bin_ in zip(column, codes, strict=True) if bin_ == code]
            assert parameter.lows[code] == min(inside)
            assert parameter.highs[code] == max(inside)


def test_a_model_over_many_different_values_keeps_the_true_range_of_each_bin() -> None:
    """More values than are counted exactly, as floats, as large and as small integers: bins agree with the sketch."""
    generator = np.random.default_rng(1)
    columns: dict[str, npt.NDArray[Any]] = {
        "number": generator.lognormal(3, 4, 60_000),
        "large": generator.integers(0, 2**40, 60_000),
        "small": generator.integers(0, 200_000, 60_000).astype(np.int32),
        "mixed": generator.integers(0, 300_000, 60_000).astype(np.int32),
    }
    batches = [
        TraceBatch(columns={name: column[start : start + 100] for name, column in columns.items()})
        for start in range(0, 60_000, 100)
    ]
    kinds = dict.fromkeys(columns, Kind.INTEGER) | {"number": Kind.NUMBER}
    model = fit(trace_of(batches, kinds), FitOptions())
    assert list(model_problems(model)) == []
    for parameter, column, codes in zip(model.parameters, columns.values(), model.codes, strict=True):
        assert not parameter.sketch.exact
        found = parameter.bins.find(column.astype(np.float64))
        masses = np.bincount(found, minlength=len(parameter.bins))
        assert np.array_equal(bin_counts(parameter), masses)
        assert np.array_equal(np.bincount(codes, weights=model.counts).astype(int), masses)
        assert parameter.lows.tolist() == [column[found == code].min() for code in range(len(parameter.bins))]
        assert parameter.highs.tolist() == [column[found == code].max() for code in range(len(parameter.bins))]
        assert masses.max() < 1.2 * masses.mean()


def test_the_azure_trace_is_fitted_as_numpy_counts_it(public_data: Path) -> None:
    """All 19,366 requests of the published conversation trace, against numpy's own histogram over the bins."""
    with (public_data / "traces" / "azure_2023_conv.csv").open() as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    columns = {name: np.array(column) for name, column in zip("io", zip(*rows, strict=True), strict=True)}
    model = fit(trace_of([TraceBatch(columns=columns)], dict.fromkeys("io", Kind.INTEGER)), FitOptions())
    edges = [np.append(parameter.bins.edges, np.inf) for parameter in model.parameters]
    expected, _, _ = np.histogram2d(columns["i"], columns["o"], bins=edges)
    counted = np.zeros(expected.shape)
    counted[tuple(model.codes)] = model.counts
    assert np.array_equal(counted, expected)
    assert model.request_count == 19_366
    assert [len(parameter.bins) for parameter in model.parameters] == [64, 64]


def test_given_edges_are_used_and_the_trace_is_read_once() -> None:
    edges = (
        Bins(name="model", kind=Kind.CATEGORY, edges=np.array([0.0, 1.0]), categories=("mpt", "llama", "bloom")),
        Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([5.0, 10.0])),
        Bins(name="temperature", kind=Kind.NUMBER, edges=np.array([0.5])),
    )
    passes = []

    def read() -> Iterator[TraceBatch]:
        passes.append(1)
        yield batch_of([(1, 0.0, "llama"), (12, 1.0, "mpt"), (4, 0.0, "bloom")])

    model = fit(Trace(source="t", format_name="test", kinds=KINDS, read=read), FitOptions(edges=edges))
    assert len(passes) == 1
    assert [parameter.bins for parameter in model.parameters] == list(edges)
    assert requests_of(model) == {(1, 0, 0): 2, (0, 1, 0): 1}
    assert model.parameters[0].sketch.values.tolist() == [0, 1, 2]
    assert model.parameters[1].lows.tolist() == [1, 12]
    assert model.parameters[1].highs.tolist() == [4, 12]
    assert list(model_problems(model)) == []


def test_edges_that_do_not_suit_the_trace_are_refused_with_all_that_is_wrong() -> None:
    edges = (
        Bins(name="top_k", kind=Kind.INTEGER, edges=np.array([0.0])),
        Bins(name="temperature", kind=Kind.INTEGER, edges=np.array([0.0])),
        Bins(name="model", kind=Kind.CATEGORY, edges=np.array([0.0]), categories=("llama",)),
    )
    with pytest.raises(InvalidInputError) as caught:
        fit(trace_of([batch_of([(1, 0.0, "mpt")])]), FitOptions(edges=edges))
    assert [str(violation) for violation in caught.value.violations] == [
        "edges: must have input_tokens, which the trace has",
        "edges: must not have top_k, which the trace does not have",
        "edges: must have temperature as number, as the trace has it, have it as integer",
    ]
    twice = (Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([0.0])),) * 2
    with pytest.raises(InvalidInputError, match="edges: must have each parameter once"):
        fit(trace_of([whole_numbers(1)], WHOLE), FitOptions(edges=twice))
    with pytest.raises(InvalidInputError, match="edges: must have input_tokens"):
        fit(trace_of([whole_numbers(1)], WHOLE), FitOptions(edges=()))


def test_a_label_that_the_edges_do_not_know_is_refused() -> None:
    edges = (Bins(name="model", kind=Kind.CATEGORY, edges=np.array([0.0]), categories=("llama",)),)
    batch = TraceBatch(columns={"model": pa.array(["llama", "mpt"]).dictionary_encode()})
    with pytest.raises(InvalidInputError, match="model: has labels that the edges do not know: 'mpt'"):
        fit(trace_of([batch], {"model": Kind.CATEGORY}), FitOptions(edges=edges))


def test_an_identifier_among_the_parameters_is_refused() -> None:
    batch = TraceBatch(columns={"user": pa.array([f"user-{number}" for number in range(100_000)])})
    with pytest.raises(InvalidInputError, match="user: has more than 10,000 different labels: an identifier"):
        fit(trace_of([batch], {"user": Kind.CATEGORY}), FitOptions())


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([], "test trace: has no requests"),
        ([whole_numbers()], "test trace: has no requests"),
        ([whole_numbers(skipped_row_count=1200)], "test trace: has nothing but 1,200 failed requests"),
    ],
)
def test_a_trace_without_requests_is_refused(batches: list[TraceBatch], problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        fit(trace_of(batches, WHOLE), FitOptions())
    assert str(caught.value) == problem


def test_a_trace_without_parameters_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="test trace: has no parameters"):
        fit(trace_of([], {}), FitOptions())


@pytest.mark.parametrize("batch", [whole_numbers(7), whole_numbers(7, 7, 7)])
def test_one_value_is_a_model_of_one_cell(batch: TraceBatch) -> None:
    model = fit(trace_of([batch], WHOLE), FitOptions())
    assert (model.keys.tolist(), model.counts.tolist()) == ([0], [len(batch)])
    parameter = model.parameters[0]
    assert parameter.bins.edges.tolist() == parameter.lows.tolist() == parameter.highs.tolist() == [7]


def test_combinations_that_do_not_fit_in_a_key_are_refused() -> None:
    """Ten parameters of 128 bins take 70 bits; of 63 bits, ten times 78 bins are the most."""
    columns = {f"p{number}": np.arange(128, dtype=np.uint8) for number in range(10)}
    trace = trace_of([TraceBatch(columns=columns)], dict.fromkeys(columns, Kind.INTEGER))
    with pytest.raises(InvalidInputError) as caught:
        fit(trace, FitOptions(max_bins=128))
    assert "70.0 bits where 63 fit" in str(caught.value)
    assert "(78 of each always fit); now p0 128, p1 128" in str(caught.value)
    assert fit(trace, FitOptions(max_bins=78)).request_count == 128
    edges = tuple(Bins(name=name, kind=Kind.INTEGER, edges=np.arange(128.0)) for name in columns)
    with pytest.raises(InvalidInputError, match="parameters: have too many combinations of bins"):
        fit(trace, FitOptions(edges=edges))


def test_the_largest_keys_that_fit_are_counted() -> None:
    """Nine parameters of 128 bins take exactly 63 bits: the last key is 2^63 - 1."""
    columns = {f"p{number}": np.arange(128, dtype=np.uint8) for number in range(9)}
    model = fit(trace_of([TraceBatch(columns=columns)], dict.fromkeys(columns, Kind.INTEGER)), FitOptions(max_bins=128))
    assert int(model.keys[-1]) == 2**63 - 1
    assert np.array_equal(model.codes, np.tile(np.arange(128), (9, 1)))


def test_a_number_of_bins_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="max_bins: must be 2 to 256, is 1000"):
        fit(trace_of([whole_numbers(1)], WHOLE), FitOptions(max_bins=1000))


def test_provenance_says_what_was_read() -> None:
    nanos = 1_700_000_000_123_456_789
    batches = [
        whole_numbers(1, 2, arrival_nanos=np.array([nanos + 5_000_000, nanos]), skipped_row_count=2),
        whole_numbers(3, arrival_nanos=np.array([nanos + 10**9]), skipped_row_count=1),
    ]
    trace = Trace(
        source="s", licence="l", format_name="test", kinds=WHOLE, read=lambda: iter(batches), has_absolute_times=True
    )
    arrivals = Arrivals(kind=ArrivalKind.POISSON, rate_per_second=3)
    model = fit(trace, FitOptions(command="llm-pilot workload fit x", arrivals=arrivals))
    assert model.arrivals == arrivals
    provenance = model.provenance
    assert (provenance.source, provenance.licence, provenance.command) == ("s", "l", "llm-pilot workload fit x")
    assert (provenance.row_count, provenance.skipped_row_count) == (6, 3)
    assert provenance.first_time == datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)
    assert provenance.last_time == datetime(2023, 11, 14, 22, 13, 21, 123456, tzinfo=UTC)
    named = fit(trace, FitOptions(source="mine", licence="CC0")).provenance
    assert (named.source, named.licence) == ("mine", "CC0")


def test_times_from_the_start_of_the_trace_are_no_dates() -> None:
    batch = whole_numbers(1, 2, arrival_nanos=np.array([0, 5]))
    provenance = fit(trace_of([batch], WHOLE), FitOptions()).provenance
    assert provenance.first_time is provenance.last_time is None


def test_a_replay_has_the_requests_in_the_order_of_their_arrivals() -> None:
    """By hand; the two that arrive together stay in the trace's order, and ids move with their requests."""
    kinds = {"input_tokens": Kind.INTEGER, "temperature": Kind.NUMBER, "model": Kind.CATEGORY}
    first, second = batch_of([(9, 0.5, "mpt"), (300_000, 0.0, "llama")]), batch_of([(7, 1.0, "mpt"), (8, 0.25, "mpt")])
    batches = [
        TraceBatch(
            columns=first.columns,
            arrival_nanos=np.array([50, 20]),
            prefix_ids=np.array([1, 2, 3]),
            prefix_starts=np.array([0, 2, 3]),
        ),
        TraceBatch(
            columns=second.columns,
            arrival_nanos=np.array([10, 20]),
            prefix_ids=np.array([99, 4, 5]),
            prefix_starts=np.array([1, 1, 3]),
        ),
    ]
    trace = Trace(source="s", format_name="t", kinds=kinds, read=lambda: iter(batches), prefix_block_tokens=512)
    replay = fit(trace, FitOptions(keep_replay=True)).replay
    assert replay is not None
    assert {name: column.tolist() for name, column in replay.columns.items()} == {
        "input_tokens": [7, 300_000, 8, 9],
        "temperature": [1.0, 0.0, 0.25, 0.5],
        "model": ["mpt", "llama", "mpt", "mpt"],
    }
    assert [column.dtype.kind for column in replay.columns.values()] == ["i", "f", "U"]
    assert replay.arrival_nanos.tolist() == [0, 10, 10, 40]
    assert replay.prefix_ids.tolist() == [3, 4, 5, 1, 2]
    assert replay.prefix_starts.tolist() == [0, 0, 1, 3, 5]
    assert replay.prefix_block_tokens == 512


def test_a_replay_without_prefixes_says_so() -> None:
    batch = whole_numbers(1, 2, arrival_nanos=np.array([3, 3]))
    replay = fit(trace_of([batch], WHOLE), FitOptions(keep_replay=True)).replay
    assert replay is not None
    assert (len(replay.prefix_ids), len(replay.prefix_starts), replay.prefix_block_tokens) == (0, 0, 0)
    assert fit(trace_of([batch], WHOLE), FitOptions()).replay is None


def test_a_replay_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="keep_replay: the trace does not say when its requests arrived"):
        fit(trace_of([whole_numbers(1)], WHOLE), FitOptions(keep_replay=True))
    batch = whole_numbers(1, 2, 3, arrival_nanos=np.arange(3))
    with (
        patch.object(replay_collection, "MOST_REQUESTS", 5),
        pytest.raises(InvalidInputError, match="keep_replay: keeps up to 5 requests, the trace has more"),
    ):
        fit(trace_of([batch, batch], WHOLE), FitOptions(keep_replay=True))


def test_a_trace_that_changes_between_the_passes_is_refused() -> None:
    lengths = iter([2, 3])
    trace = Trace(
        source="t",
        format_name="test",
        kinds=WHOLE,
        read=lambda: iter([whole_numbers(*range(next(lengths)))]),
    )
    with pytest.raises(PreconditionError, match="t had 2 requests when read first and 3 when read again"):
        fit(trace, FitOptions())


def test_progress_covers_both_passes() -> None:
    batches = [whole_numbers(1, bytes_done=40), whole_numbers(bytes_done=70), whole_numbers(2, bytes_done=100)]
    steps: list[tuple[int, int | None]] = []
    fit(trace_of(batches, WHOLE, size_bytes=100), FitOptions(), advance=lambda *step: steps.append(step))
    assert steps == [(done, 200) for done in (40, 70, 100, 140, 170, 200)]
    steps.clear()
    edges = (Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([0.0])),)
    fit(trace_of(batches, WHOLE, size_bytes=100), FitOptions(edges=edges), advance=lambda *step: steps.append(step))
    assert steps == [(done, 100) for done in (40, 70, 100)]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_fit_that_is_stopped_closes_the_trace(stop_at: int) -> None:
    """In either pass, before the error reaches the caller."""
    open_count = 0
    calls = 0

    def read() -> Iterator[TraceBatch]:
        nonlocal open_count
        open_count += 1
        try:
            yield from (whole_numbers(1), whole_numbers(2))
        finally:
            open_count -= 1

    def advance(_done: int, _all: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    trace = Trace(source="t", format_name="test", kinds=WHOLE, read=read)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(trace, FitOptions(), advance=advance)
    assert caught.value is not None
    assert open_count == 0
