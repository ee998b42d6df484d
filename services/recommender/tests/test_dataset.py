from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles


def measurement(llm: str, gpu_profile: str, users_count: int, itl_ms: float = 20) -> Measurement:
    return Measurement(
        llm=llm,
        gpu_profile=gpu_profile,
        users_count=users_count,
        origin=Origin.MEASURED,
        itl=Quantiles(median_ms=itl_ms),
    )


ROWS = (
    measurement("b", "1xT4-16GB", 16),
    measurement("b", "1xT4-16GB", 2),
    measurement("b", "2xT4-16GB", 128),
    measurement("a", "1xT4-16GB", 2),
)


def test_names_and_users_are_sorted() -> None:
    dataset = Dataset(ROWS)
    assert dataset.llms == ("a", "b")
    assert dataset.gpu_profiles == ("1xT4-16GB", "2xT4-16GB")
    assert dataset.users_counts == (2, 16, 128)


def test_curve_ascends_by_users() -> None:
    assert Dataset(ROWS).curve("b", "1xT4-16GB") == (ROWS[1], ROWS[0])


def test_curve_of_an_unmeasured_pair_is_empty() -> None:
    assert Dataset(ROWS).curve("a", "2xT4-16GB") == ()


def test_measurement_with_the_same_key_is_replaced() -> None:
    before = Dataset(ROWS)
    newer = replace(ROWS[0], itl=Quantiles(median_ms=21))
    after = before.with_measurement(newer)
    assert after.curve("b", "1xT4-16GB") == (ROWS[1], newer)
    assert len(after) == len(before) == 4
    assert before.curve("b", "1xT4-16GB") == (ROWS[1], ROWS[0])


def test_measurement_with_a_new_key_is_added() -> None:
    assert Dataset(ROWS).with_measurement(measurement("c", "1xT4-16GB", 1)).llms == ("a", "b", "c")


def test_repeated_keys_are_all_named() -> None:
    with pytest.raises(InvalidInputError) as caught:
        Dataset((*ROWS, ROWS[3], ROWS[0]))
    assert [violation.field for violation in caught.value.violations] == [
        "dataset (a, 1xT4-16GB, 2)",
        "dataset (b, 1xT4-16GB, 16)",
    ]


def test_version_carries_the_schema_and_twelve_digits() -> None:
    # From coreutils: printf 'a\037g\0371\037measured%18s\036' | tr ' ' '\037' | sha256sum
    only = Measurement(llm="a", gpu_profile="g", users_count=1, origin=Origin.MEASURED)
    assert Dataset([only]).version == "1-1bc00b28074b"


@given(st.permutations(ROWS))
def test_version_does_not_depend_on_the_order(rows: list[Measurement]) -> None:
    assert Dataset(rows).version == Dataset(ROWS).version


@given(st.sampled_from(ROWS), st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_version_changes_exactly_when_a_number_does(row: Measurement, itl_ms: float) -> None:
    changed = Dataset(ROWS).with_measurement(replace(row, itl=Quantiles(median_ms=itl_ms)))
    assert (changed.version == Dataset(ROWS).version) == (itl_ms == 20)


def test_adding_one_by_one_gives_the_version_of_all_at_once() -> None:
    dataset = Dataset()
    for row in ROWS:
        dataset = dataset.with_measurement(row)
    assert dataset.version == Dataset(ROWS).version
    assert dataset == Dataset(ROWS)
    assert hash(dataset) == hash(Dataset(ROWS))
