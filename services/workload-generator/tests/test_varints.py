import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmpilot_workload_generator.files import varints

UNSIGNED = hnp.arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 2**64 - 1))
SIGNED = hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(-(2**63), 2**63 - 1))


def test_numbers_are_coded_as_protocol_buffers_do() -> None:
    """150 is 0x96 0x01 in the guide of Protocol Buffers."""
    assert varints.encode(np.array([150, 0, 127, 128], np.uint64)) == b"\x96\x01\x00\x7f\x80\x01"


def test_zigzag_is_that_of_protocol_buffers() -> None:
    values = np.array([0, -1, 1, -2, 2**63 - 1, -(2**63)], np.int64)
    assert varints.to_zigzag(values).tolist() == [0, 1, 2, 3, 2**64 - 2, 2**64 - 1]


@given(UNSIGNED)
def test_numbers_come_back(values: np.ndarray) -> None:
    assert varints.decode(varints.encode(values), len(values)).tolist() == values.tolist()


@given(SIGNED)
def test_differences_come_back_even_where_they_overflow(values: np.ndarray) -> None:
    coded = varints.to_zigzag(varints.to_deltas(values.view(np.uint64)).view(np.int64))
    decoded = varints.from_deltas(varints.from_zigzag(coded).view(np.uint64)).view(np.int64)
    assert decoded.tolist() == values.tolist()


@pytest.mark.parametrize("count", [0, 2])
def test_other_number_of_numbers_is_rejected(count: int) -> None:
    with pytest.raises(ValueError, match=f"must hold {count} numbers, holds 1"):
        varints.decode(b"\x05", count)


@pytest.mark.parametrize("content", [b"\x80" * 10 + b"\x01", b"\xff" * 9 + b"\x02"])
def test_number_beyond_64_bits_is_rejected(content: bytes) -> None:
    with pytest.raises(ValueError, match="more than 64 bits"):
        varints.decode(content, 1)


def test_number_cut_off_is_rejected() -> None:
    with pytest.raises(ValueError, match="must hold 2 numbers"):
        varints.decode(b"\x05\x80", 2)
    with pytest.raises(ValueError, match="must hold 1 numbers"):
        varints.decode(b"\x05\x80", 1)
