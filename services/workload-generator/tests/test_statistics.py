import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.model import Bins, Kind, Parameter, Provenance, Sketch, WorkloadModel, encode_keys
from llmpilot_workload_generator.profiles import load_profile
from llmpilot_workload_generator.statistics import compare, describe, entropy_bits, quantile, spearman

ROWS = [(1, 10, "a"), (1, 10, "a"), (2, 10, "b"), (2, 30, "a"), (3, 20, "a"), (9, 30, "b")]


def bits(*counts: int) -> float:
    """The entropy of counts."""
    return sum(count / sum(counts) * math.log2(sum(counts) / count) for count in counts)


def correlation(first: list[int], second: list[int]) -> float:
    """Spearman's, by pandas."""
    return float(pd.DataFrame({"first": first, "second": second}).corr(method="spearman").loc["first", "second"])


def parameter(name: str, values: list[float], *, kind: Kind = Kind.INTEGER, texts: tuple[str, ...] = ()) -> Parameter:
    """One bin per value."""
    found, counts = np.unique(np.array(values, np.float64), return_counts=True)
    sketch = Sketch(values=found, counts=counts, exact=True, low=float(found[0]), high=float(found[-1]))
    return Parameter(
        bins=Bins(name=name, kind=kind, edges=found, categories=texts), sketch=sketch, lows=found, highs=found
    )


def model(rows: list[tuple[int, int, str]], texts: tuple[str, ...] = ("a", "b")) -> WorkloadModel:
    """The joint histogram of rows, one bin per value."""
    first, second, third = zip(*rows, strict=True)
    parameters = (
        parameter("input_tokens", list(first)),
        parameter("output_tokens", list(second)),
        parameter("llm", [texts.index(text) for text in third], kind=Kind.CATEGORY, texts=texts),
    )
    columns = [np.array(first), np.array(second), np.array([texts.index(text) for text in third])]
    codes = np.array(
        [one.bins.find(column.astype(np.float64)) for one, column in zip(parameters, columns, strict=True)]
    )
    keys, counts = np.unique(encode_keys(codes, [len(one.bins) for one in parameters]), return_counts=True)
    return WorkloadModel(
        parameters=parameters, keys=keys, counts=counts.astype(np.int64), provenance=Provenance(source="by hand")
    )


def test_marginals_are_those_of_the_rows() -> None:
    tokens, _, llm = describe(model(ROWS)).marginals
    assert tokens.counts.tolist() == [2, 2, 1, 1]
    assert (tokens.mean, tokens.median, tokens.p90, tokens.p99) == (3, 2, 9, 9)
    assert (tokens.low, tokens.high, tokens.distinct_count) == (1, 9, 4)
    assert tokens.entropy_bits == pytest.approx(bits(2, 2, 1, 1))
    assert (llm.mean, llm.median, llm.p90, llm.p99) == (None, None, None, None)
    assert llm.counts.tolist() == [4, 2]
    assert llm.categories == ("a", "b")


def test_the_entropy_of_one_value_is_zero_without_a_sign() -> None:
    assert str(entropy_bits(np.array([7]))) == "0.0"


def test_entropy_and_total_correlation_are_those_of_the_rows() -> None:
    """Five cells, one of them with two rows."""
    description = describe(model(ROWS))
    assert (description.request_count, description.cell_count) == (6, 5)
    assert description.entropy_bits == pytest.approx(bits(2, 1, 1, 1, 1))
    parts = [bits(2, 2, 1, 1), bits(3, 1, 2), bits(4, 2)]
    assert description.total_correlation_bits == pytest.approx(sum(parts) - description.entropy_bits)


def test_correlations_are_those_of_numbers_only() -> None:
    description = describe(model(ROWS))
    expected = correlation([row[0] for row in ROWS], [row[1] for row in ROWS])
    assert description.spearman[0][1] == description.spearman[1][0] == pytest.approx(expected)
    assert description.spearman[0][0] == pytest.approx(1)
    assert description.spearman[2] == (None, None, None)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_that_of_the_single_requests(pairs: list[tuple[int, int]]) -> None:
    """Mid-ranks of pandas over the rows, against weights over the cells."""
    cells, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
    found = spearman(cells[:, 0], cells[:, 1], counts)
    first, second = np.array(pairs).T
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert found is None
    else:
        assert found == pytest.approx(correlation(first.tolist(), second.tolist()))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_the_smallest_value_that_enough_do_not_exceed(values: list[int], share: float) -> None:
    sketch = parameter("x", list(map(float, values))).sketch
    assert quantile(sketch, share) == np.quantile(values, share, method="inverted_cdf")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_ks_distance_is_that_of_the_single_requests(first: list[int], second: list[int]) -> None:
    rows = [[(value, 1, "a") for value in values] for values in (first, second)]
    distance = compare(model(rows[0]), model(rows[1])).distances[0]
    gaps = [
        sum(one <= value for one in first) / len(first) - sum(one <= value for one in second) / len(second)
        for value in range(10)
    ]
    assert distance.distance == pytest.approx(max(map(abs, gaps)))


def test_critical_value_is_that_of_the_tables() -> None:
    """1.36 sqrt(1/n + 1/m), for 100 and 50 requests."""
    rows = [[(value, 1, "a") for value in range(count)] for count in (100, 50)]
    distance = compare(model(rows[0]), model(rows[1])).distances[0]
    assert distance.critical == pytest.approx(1.358 * (1 / 100 + 1 / 50) ** 0.5, rel=1e-3)
    assert distance.means == (49.5, 24.5)


def test_categories_are_compared_by_their_texts() -> None:
    """a: 4/6 and 1/2, b: 2/6 and 0, c: 0 and 1/2; half the sum of the differences is 1/2."""
    other = model([(1, 10, "c"), (1, 20, "a")], texts=("c", "a"))
    distance = compare(model(ROWS), other).distances[2]
    assert (distance.name, distance.critical, distance.means) == ("llm", None, None)
    assert distance.distance == pytest.approx(0.5)


def test_parameters_of_one_model_only_are_named() -> None:
    comparison = compare(load_profile("code"), load_profile("production"))
    assert comparison.only_first == ()
    assert comparison.only_second == ("temperature", "top_p", "top_k", "batch_size", "is_greedy")
    assert [distance.name for distance in comparison.distances] == ["input_tokens", "output_tokens"]
    (difference,) = comparison.correlations
    assert difference.second == pytest.approx(0.545, abs=5e-4)


def test_model_is_at_no_distance_from_itself() -> None:
    comparison = compare(model(ROWS), model(ROWS))
    assert [distance.distance for distance in comparison.distances] == [0, 0, 0]
    assert all(one.first == one.second for one in comparison.correlations)


def test_category_against_number_is_rejected() -> None:
    one = model(ROWS)
    numbers = (*one.parameters[:2], parameter("llm", [0, 0, 1, 0, 0, 1]))
    other = WorkloadModel(parameters=numbers, keys=one.keys, counts=one.counts, provenance=one.provenance)
    with pytest.raises(
        InvalidInputError, match="llm: must be of one kind, is category in the first model and integer in"
    ):
        compare(one, other)
