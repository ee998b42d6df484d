import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import Violation
from llmpilot_workload_generator.model import Bins, Kind, Parameter, Sketch
from llmpilot_workload_generator.sampling.conditions import Ranges, Restriction, parse_conditions, restrict


def parameter(name: str, kind: Kind, values: list[float], categories: tuple[str, ...] = ()) -> Parameter:
    edges = np.array(values)
    sketch = Sketch(
        values=edges, counts=np.ones(len(values), np.int64), exact=True, low=float(edges[0]), high=float(edges[-1])
    )
    bins = Bins(name=name, kind=kind, edges=edges, categories=categories)
    return Parameter(bins=bins, sketch=sketch, lows=edges, highs=edges)


PARAMETERS = [
    parameter("input_tokens", Kind.INTEGER, [1, 2, 874, 4093]),
    parameter("temperature", Kind.NUMBER, [0, 0.7, 1]),
    parameter("model", Kind.CATEGORY, [0, 1, 2], ("gpt-4", "llama, 7b", "a=b")),
]


def admitted(text: str, values: list[float]) -> list[float]:
    violations: list[Violation] = []
    (restriction,) = parse_conditions([text], PARAMETERS, violations).values()
    assert not violations
    return [value for value, good in zip(values, restriction.admits(np.array(values)), strict=True) if good]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input_tokens <= 874", [1, 2, 874]),
        ("input_tokens<874", [1, 2]),
        (" input_tokens > 2 ", [874, 4093]),
        ("input_tokens >= 2", [2, 874, 4093]),
        ("input_tokens <= 873.5", [1, 2]),
        ("input_tokens < 2.5", [1, 2]),
        ("input_tokens >= 1.5", [2, 874, 4093]),
        ("input_tokens = 2", [2]),
        ("input_tokens == 2", [2]),
        ("input_tokens != 2", [1, 874, 4093]),
        ("input_tokens in 1, 4093,7", [1, 4093]),
        ("input_tokens = 1.5", []),
        ("input_tokens<=1e3", [1, 2, 874]),
    ],
)
def test_conditions_on_numbers(text: str, expected: list[float]) -> None:
    assert admitted(text, [1, 2, 874, 4093]) == expected


def test_bounds_of_fractions_are_included_or_not_as_asked() -> None:
    values = [0, 0.7, 1]
    assert admitted("temperature < 0.7", values) == [0]
    assert admitted("temperature <= 0.7", values) == [0, 0.7]
    assert admitted("temperature > 0.7", values) == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model = gpt-4", [0]),
        ("model = llama, 7b", [1]),
        ("model = a=b", [2]),
        ("model != a=b", [0, 1]),
        ("model in gpt-4, a=b", [0, 2]),
    ],
)
def test_conditions_on_labels(text: str, expected: list[float]) -> None:
    assert admitted(text, [0, 1, 2]) == expected


def test_several_conditions_hold_together() -> None:
    texts = ["input_tokens > 1", "input_tokens != 874", "input_tokens in 1, 2, 874", "temperature > 0"]
    restrictions = parse_conditions(texts, PARAMETERS, [])
    assert list(restrictions) == ["input_tokens", "temperature"]
    assert restrictions["input_tokens"].admits(np.array([1, 2, 874, 4093])).tolist() == [False, True, False, False]


def test_everything_wrong_with_conditions_is_said_at_once() -> None:
    violations: list[Violation] = []
    texts = [
        "nonsense",
        "input_tokens <=",
        "tokens < 3",
        "input_tokens < many",
        "input_tokens = nan",
        "model < gpt-4",
        "model in gpt-4, mistral",
        "input_tokens in 1,,2",
    ]
    assert not any(one.chosen for one in parse_conditions(texts, PARAMETERS, violations).values())
    assert {violation.field for violation in violations} == {"conditions"}
    assert len(violations) == len(texts)
    for violation, text in zip(violations, texts, strict=True):
        assert repr(text) in violation.description
    assert "parameters are input_tokens, temperature, model" in violations[2].description
    assert "model is never mistral" in violations[6].description


WHOLE = st.integers(-6, 6)
RANGES = st.lists(st.tuples(st.integers(0, 2), WHOLE, st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=6)
RESTRICTIONS = st.builds(
    Restriction,
    is_whole=st.just(True),
    low=WHOLE | st.just(-np.inf),
    high=WHOLE | st.just(np.inf),
    chosen=st.none() | st.frozensets(WHOLE.map(float), max_size=3),
    excluded=st.frozensets(WHOLE.map(float), max_size=3),
)


@given(RANGES, RESTRICTIONS)
def test_a_restricted_range_is_what_is_left_of_its_whole_numbers(
    rows: list[tuple[int, int, int, int]], restriction: Restriction
) -> None:
    """Brute force: every whole number of a range has the same part of its mass."""

    def masses(ranges: Ranges) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = {}
        for place, low, high, mass in zip(ranges.bins, ranges.lows, ranges.highs, ranges.masses, strict=True):
            for value in range(int(low), int(high) + 1):
                key = (int(place), value)
                found[key] = found.get(key, 0.0) + float(mass) / (high - low + 1)
        return found

    bins, lows, widths, counts = np.array(sorted(rows)).T
    ranges = Ranges(
        bins=bins, lows=lows.astype(np.float64), highs=(lows + widths) * 1.0, masses=counts.astype(np.float64)
    )
    left = restrict(ranges, restriction)
    expected = {key: mass for key, mass in masses(ranges).items() if bool(restriction.admits(np.array([key[1]]))[0])}
    assert masses(left) == pytest.approx(expected)
    assert (np.diff(left.bins) >= 0).all()


def test_of_a_range_of_fractions_the_part_within_bounds_is_left() -> None:
    """By hand: a quarter of 0 to 1 is above .75; one fraction is no part of it, and stands for all if asked for."""
    whole = Ranges(bins=np.array([0]), lows=np.array([0.0]), highs=np.array([1.0]), masses=np.array([8.0]))
    above = restrict(whole, Restriction(is_whole=False, low=0.75))
    assert (above.lows.tolist(), above.highs.tolist(), above.masses.tolist()) == ([0.75], [1.0], [2.0])
    without = restrict(whole, Restriction(is_whole=False, excluded=frozenset({0.5})))
    assert without.masses.tolist() == pytest.approx([4, 4])
    assert without.highs[0] < 0.5 < without.lows[1]
    only = restrict(whole, Restriction(is_whole=False, chosen=frozenset({0.25, 3.0})))
    assert (only.lows.tolist(), only.highs.tolist(), only.masses.tolist()) == ([0.25], [0.25], [8.0])


def test_a_fraction_is_no_value_of_whole_numbers_in_a_range() -> None:
    ranges = Ranges(bins=np.array([0]), lows=np.array([1000.0]), highs=np.array([1010.0]), masses=np.array([5.0]))
    violations: list[Violation] = []
    restriction = parse_conditions(["input_tokens = 1000.5"], PARAMETERS, violations)["input_tokens"]
    assert len(restrict(ranges, restriction)) == 0
    assert not restriction.admits(np.array([1000, 1001])).any()
    both = parse_conditions(["input_tokens in 1000.5, 1001"], PARAMETERS, violations)["input_tokens"]
    assert restrict(ranges, both).lows.tolist() == [1001]
