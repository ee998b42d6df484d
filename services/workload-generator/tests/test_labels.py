import pyarrow as pa
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.fitting.labels import MOST_LABELS, LabelIndex, refuse_too_many, sketch_of_labels


def test_labels_are_numbered_as_they_occur_first_whatever_the_array() -> None:
    """Text, and a dictionary whose order is another and which has an entry that nothing refers to."""
    index = LabelIndex("model")
    assert index.positions(pa.array(["b", "a", "b"])).tolist() == [0, 1, 0]
    unused = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2], pa.int8()), pa.array(["a", "unused", "c"]))
    assert index.positions(unused).tolist() == [2, 1, 2]
    assert index.labels == ("b", "a", "c")


def test_given_labels_keep_their_numbers_and_others_are_refused() -> None:
    index = LabelIndex("model", ("a", "b"))
    assert index.positions(pa.array(["b", "a"])).tolist() == [1, 0]
    with pytest.raises(InvalidInputError, match=r"model: has labels that the edges do not know: 'x', 'y'; find edges"):
        index.positions(pa.array(["x", "a", "y", "x"]))
    assert index.labels == ("a", "b")


def test_some_of_many_unknown_labels_are_shown() -> None:
    with pytest.raises(InvalidInputError, match=r"'4', \.\.\.; find"):
        LabelIndex("model", ()).positions(pa.array([str(number) for number in range(9)]))


def test_an_identifier_is_no_category() -> None:
    """In one batch, and label by label over many."""
    labels = [str(number) for number in range(100_000)]
    expected = r"user: has more than 10,000 different labels: an identifier rather than a category; leave it out"
    with pytest.raises(InvalidInputError, match=expected):
        LabelIndex("user").positions(pa.array(labels))
    index = LabelIndex("user")
    index.positions(pa.array(labels[: MOST_LABELS // 2]))
    index.positions(pa.array(labels[:MOST_LABELS]))
    with pytest.raises(InvalidInputError, match=expected):
        index.positions(pa.array(labels[MOST_LABELS : MOST_LABELS + 1]))
    with pytest.raises(InvalidInputError, match=expected):
        LabelIndex("user", labels)
    refuse_too_many("user", MOST_LABELS)


def test_categories_are_ordered_by_frequency_then_name() -> None:
    labels, sketch = sketch_of_labels({"b": 2, "z": 9, "a": 2})
    assert labels == ("z", "a", "b")
    assert sketch.values.tolist() == [0, 1, 2]
    assert sketch.counts.tolist() == [9, 2, 2]
    assert (sketch.low, sketch.high, sketch.exact) == (0, 2, True)
