import numpy as np
import pytest

from llmpilot_workload_generator.model import Bins, Floats, Kind, Parameter, Sketch
from llmpilot_workload_generator.packing import PackedType, packed_type


def parameter(low: float, high: float, kind: Kind = Kind.INTEGER) -> Parameter:
    ends: Floats = np.array([low, high])
    categories = ("a", "b") if kind is Kind.CATEGORY else ()
    return Parameter(
        bins=Bins(name="p", kind=kind, edges=ends, categories=categories),
        sketch=Sketch(values=ends, counts=np.ones(2, np.int64), exact=True, low=low, high=high),
        lows=ends,
        highs=ends,
    )


@pytest.mark.parametrize(
    ("low", "high", "scale", "expected"),
    [
        (0, 255, 1, PackedType.UINT8),
        (0, 256, 1, PackedType.UINT16),
        (0, 65_535, 1, PackedType.UINT16),
        (0, 65_536, 1, PackedType.UINT32),
        (0, 2**32 - 1, 1, PackedType.UINT32),
        (0, 2**32, 1, PackedType.INT64),
        (-1, 5, 1, PackedType.INT64),
        (1, 200, 1.275, PackedType.UINT8),
        (1, 200, 1.276, PackedType.UINT16),
        (1, 65_535, 0.001, PackedType.UINT8),
        (1, 65_535, 1e308, PackedType.INT64),
    ],
)
def test_integers_take_the_narrowest_type_of_their_scaled_range(
    low: float, high: float, scale: float, expected: PackedType
) -> None:
    assert packed_type(parameter(low, high), scale) is expected


def test_numbers_stay_numbers_and_categories_are_positions() -> None:
    assert packed_type(parameter(0, 1, Kind.NUMBER), 1) is PackedType.FLOAT64
    assert packed_type(parameter(0, 1, Kind.CATEGORY), 1) is PackedType.UINT8
