"""What becomes of a cell: numbers as numbers and as text, times, categories, and every way of being wrong."""

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.model import Kind
from llmpilot_workload_generator.traces.columns import BadCellError, kind_of, nanos_of, values_of
from llmpilot_workload_generator.traces.formats import TimeUnit


def plain(column: Any) -> list[object]:
    values: list[object] = column.to_pylist() if isinstance(column, pa.Array) else column.tolist()
    return values


@pytest.mark.parametrize(("array", "kind", "expected"), [
    (pa.array([1, 2], pa.int8()), Kind.INTEGER, [1, 2]),
    (pa.array([374.0, 2.0]), Kind.INTEGER, [374, 2]),
    (pa.array([True, False]), Kind.INTEGER, [1, 0]),
    (pa.array(["374", "2"]), Kind.INTEGER, [374, 2]),
    (pa.array(["374.0", "2"]), Kind.INTEGER, [374, 2]),
    (pa.array([" 374", "2 "]), Kind.INTEGER, [374, 2]),
    (pa.array(["True", "false"]), Kind.INTEGER, [1, 0]),
    (pa.array([Decimal("1.00"), Decimal("2.00")]), Kind.INTEGER, [1, 2]),
    (pa.array(["1", "2", "1"]).dictionary_encode(), Kind.INTEGER, [1, 2, 1]),
    (pa.array(["0.7", "1"]), Kind.NUMBER, [0.7, 1.0]),
    (pa.array([" 0.7", "1 "]), Kind.NUMBER, [0.7, 1.0]),
    (pa.array([0, 1]), Kind.NUMBER, [0.0, 1.0]),
    (pa.array([0.7, 0.33], pa.float32()), Kind.NUMBER, [0.7, 0.33]),
    (pa.array(["a", "b"]), Kind.CATEGORY, ["a", "b"]),
    (pa.array(["a", "b"]).dictionary_encode(), Kind.CATEGORY, ["a", "b"]),
    (pa.array(["a", "b"], pa.large_string()), Kind.CATEGORY, ["a", "b"]),
    (pa.array([7, 8]), Kind.CATEGORY, ["7", "8"]),
    (pa.array([], pa.string()), Kind.INTEGER, []),
    (pa.array([], pa.float64()), Kind.NUMBER, []),
])  # fmt: skip
def test_values_are_what_the_cells_say(array: pa.Array, kind: Kind, expected: list[object]) -> None:
    assert plain(values_of(array, kind, "")) == expected


def test_integers_stay_as_narrow_as_they_are_stored() -> None:
    for width in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64):
        assert values_of(pa.array(np.array([1, 2], width)), Kind.INTEGER, "input_tokens").dtype == width


@pytest.mark.parametrize(("array", "kind", "name", "position", "problem"), [
    (pa.array([1, None]), Kind.INTEGER, "x", 1, "must not be empty"),
    (pa.array([None, None]), Kind.CATEGORY, "x", 0, "must not be empty"),
    (pa.array(["a", None]), Kind.CATEGORY, "x", 1, "must not be empty"),
    (pa.array(["a", ""]), Kind.CATEGORY, "x", 1, "must not be empty"),
    (pa.array(["12", "13", "abc", "def"]), Kind.INTEGER, "x", 2, "must be a whole number, is 'abc'"),
    (pa.array(["12", "13.5"]), Kind.INTEGER, "x", 1, "must be a whole number, is 13.5"),
    (pa.array(["0.5", "abc"]), Kind.NUMBER, "x", 1, "must be a number, is 'abc'"),
    (pa.array(["true", "2"]), Kind.INTEGER, "x", 0, "must be a whole number, is 'true'"),
    (pa.array([1.0, 1.5]), Kind.INTEGER, "x", 1, "must be a whole number, is 1.5"),
    (pa.array([1.0, float("nan")]), Kind.INTEGER, "x", 1, "must be a finite number, is nan"),
    (pa.array([1.0, float("nan")]), Kind.NUMBER, "x", 1, "must be a finite number, is nan"),
    (pa.array(["1.0", "-inf"]), Kind.NUMBER, "x", 1, "must be a finite number, is -inf"),
    (pa.array(["1", "nan"]), Kind.INTEGER, "x", 1, "must be a finite number, is nan"),
    (pa.array([1, -5]), Kind.INTEGER, "input_tokens", 1, "must be >= 1, is -5"),
    (pa.array([1, 0]), Kind.INTEGER, "batch_size", 1, "must be >= 1, is 0"),
    (pa.array([1, 2**53]), Kind.INTEGER, "x", 1, "must be less than 2^53, is 9007199254740992"),
    (pa.array([1, -(2**53)]), Kind.INTEGER, "x", 1, "must be less than 2^53, is -9007199254740992"),
    (pa.array([1, 2**64 - 1], pa.uint64()), Kind.INTEGER, "x", 1, "must be less than 2^53, is 18446744073709551615"),
    (pa.array(["1", "99999999999999999999"]), Kind.INTEGER, "x", 1, "must be less than 2^53, is 1e+20"),
    (pa.array([1, 2**60]), Kind.NUMBER, "x", 1, "must be less than 2^53, is 1152921504606846976"),
])  # fmt: skip
def test_the_first_bad_cell_is_named(array: pa.Array, kind: Kind, name: str, position: int, problem: str) -> None:
    with pytest.raises(BadCellError) as caught:
        values_of(array, kind, name)
    assert (caught.value.position, str(caught.value)) == (position, problem)


def test_only_lengths_must_be_positive() -> None:
    assert plain(values_of(pa.array([-1, 0]), Kind.INTEGER, "top_k")) == [-1, 0]


@pytest.mark.parametrize(("head", "kind"), [
    (pa.array([1]), Kind.INTEGER),
    (pa.array([True]), Kind.INTEGER),
    (pa.array([1.0]), Kind.NUMBER),
    (pa.array(["1", "2"]), Kind.INTEGER),
    (pa.array(["1.0", "2"]), Kind.INTEGER),
    (pa.array(["1", "2.5"]), Kind.NUMBER),
    (pa.array(["true", "False"]), Kind.INTEGER),
    (pa.array(["1", "abc"]), Kind.NUMBER),  # so that reading names the row of "abc"
    (pa.array(["gpt-4", "7"]), Kind.CATEGORY),
    (pa.array([], pa.string()), Kind.CATEGORY),
    (pa.array([None]), Kind.CATEGORY),
    (pa.array(["a"]).dictionary_encode(), Kind.CATEGORY),
    (pa.array(["2023-11-16 18:17:03.9799600"]), None),
    (pa.array(["2023-11-16"]), None),
    (pa.array([[1]]), None),
    (pa.array([{"a": 1}]), None),
    (pa.array([1], pa.timestamp("ns")), None),
])  # fmt: skip
def test_the_first_rows_tell_what_a_column_is(head: pa.Array, kind: Kind | None) -> None:
    assert kind_of(head) == kind


@pytest.mark.parametrize(("array", "unit", "nanos"), [
    (pa.array(["2023-11-16 18:17:03.9799600"]), TimeUnit.DATE_TIME, 1700158623_979960000),
    (pa.array(["2023-11-16T18:17:03Z"]), TimeUnit.DATE_TIME, 1700158623_000000000),
    (pa.array([" 2023-11-16 19:17:03+01:00"]), TimeUnit.DATE_TIME, 1700158623_000000000),
    (pa.array(["2023-11-16"]), TimeUnit.DATE_TIME, 1700092800_000000000),
    (pa.array([1700158623], pa.timestamp("s")), TimeUnit.SECONDS, 1700158623_000000000),
    (pa.array([19677], pa.date32()), TimeUnit.DATE_TIME, 1700092800_000000000),
    (pa.array(["0.25"]), TimeUnit.SECONDS, 250_000_000),
    (pa.array([5]), TimeUnit.SECONDS, 5_000_000_000),
    (pa.array([-0.5]), TimeUnit.SECONDS, -500_000_000),
    (pa.array([1697242031021.0]), TimeUnit.MILLISECONDS, 1697242031_021000000),
    (pa.array(["1697242031021"]), TimeUnit.MILLISECONDS, 1697242031_021000000),
    (pa.array(["1759813207532900363"]), TimeUnit.NANOSECONDS, 1759813207532900363),
])  # fmt: skip
def test_times_are_exact(array: pa.Array, unit: TimeUnit, nanos: int) -> None:
    assert nanos_of(array, unit).tolist() == [nanos]


@pytest.mark.parametrize(("array", "unit", "problem"), [
    (pa.array(["2023-11-16 18:17:03", "yesterday"]), TimeUnit.DATE_TIME,
     "must be a date and time such as 2023-11-16 18:17:03.979, is 'yesterday'"),
    (pa.array(["2024-05-10 00:00:00+00:00", "2024-05-10 00:00:01"]), TimeUnit.DATE_TIME,
     "must be a date and time such as 2024-05-10 08:00:00.123+00:00, is '2024-05-10 00:00:01'"),
    (pa.array([0, None]), TimeUnit.SECONDS, "must not be empty"),
    (pa.array(["1", "soon"]), TimeUnit.SECONDS, "must be a number, is 'soon'"),
    (pa.array([1.0, float("inf")]), TimeUnit.SECONDS, "must be a finite number, is inf"),
    (pa.array([1, 1715299200000]), TimeUnit.SECONDS, "must be seconds, is 1715299200000"),
    (pa.array([1.5, 1e16]), TimeUnit.MILLISECONDS, "must be milliseconds, is 1e+16"),
])  # fmt: skip
def test_the_first_bad_time_is_named(array: pa.Array, unit: TimeUnit, problem: str) -> None:
    with pytest.raises(BadCellError) as caught:
        nanos_of(array, unit)
    assert (caught.value.position, str(caught.value)) == (1, problem)


@given(st.lists(st.integers(-(2**53) + 1, 2**53 - 1), min_size=1))
def test_whole_numbers_survive_every_way_of_writing(values: list[int]) -> None:
    texts = pa.array([str(value) for value in values])
    for array in (texts, pa.array(values, pa.int64()), pa.array([float(value) for value in values])):
        assert plain(values_of(array, Kind.INTEGER, "")) == values


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_survive_as_text(values: list[float]) -> None:
    assert plain(values_of(pa.array([repr(value) for value in values]), Kind.NUMBER, "")) == values


@given(st.lists(st.sampled_from(["7", "0.5", "x", "1e3", "-"]), min_size=1, max_size=40))
def test_the_bad_cell_is_the_first_one(texts: list[str]) -> None:
    bad = [position for position, text in enumerate(texts) if text in {"x", "-"}]
    if not bad:
        assert plain(values_of(pa.array(texts), Kind.NUMBER, "")) == [float(text) for text in texts]
        return
    with pytest.raises(BadCellError) as caught:
        values_of(pa.array(texts), Kind.NUMBER, "")
    assert caught.value.position == bad[0]
