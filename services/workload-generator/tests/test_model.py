import numpy as np
import pytest

from llmpilot_workload_generator.model import Bins, Kind, decode_keys, encode_keys, key_bits, strides


def test_keys_are_mixed_radix_numbers_with_the_last_parameter_varying_fastest() -> None:
    """By hand: radices 3, 4, 5; digits 2, 1, 3 are 2 * 20 + 1 * 5 + 3."""
    assert strides([3, 4, 5]).tolist() == [20, 5, 1]
    keys = encode_keys(np.array([[2, 0], [1, 0], [3, 0]]), [3, 4, 5])
    assert keys.tolist() == [48, 0]
    assert decode_keys(keys, [3, 4, 5]).tolist() == [[2, 0], [1, 0], [3, 0]]


def test_key_bits_say_whether_keys_fit() -> None:
    assert key_bits([64] * 7) == pytest.approx(42)


def test_a_value_below_the_first_edge_falls_in_the_first_bin() -> None:
    bins = Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([5.0, 8.0]))
    assert bins.find(np.array([1.0, 5.0, 7.0, 8.0, 1e9])).tolist() == [0, 0, 0, 1, 1]
