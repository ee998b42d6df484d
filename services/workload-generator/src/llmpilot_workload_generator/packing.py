"""Sampled columns as bytes: of each parameter the narrowest type that holds all its values, the same in every batch.

Invariant: the types follow from the model and the scales alone, so that a stream that broke off goes on in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from llmpilot_workload_generator.model import Column, Kind, Parameter, WorkloadModel
from llmpilot_workload_generator.sampling.sampler import Sample


class PackedType(StrEnum):
    """How a value is stored, little-endian; the value is numpy's name of the type."""

    UINT8 = "<u1"
    UINT16 = "<u2"
    UINT32 = "<u4"
    INT64 = "<i8"
    FLOAT64 = "<f8"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedColumn:
    """The values of one parameter in a batch."""

    name: str
    type: PackedType
    values: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Some requests of a stream."""

    start_index: int
    request_count: int
    columns: list[PackedColumn]
    arrival_nanos: bytes
    """int64, little-endian; none where arrivals are closed."""


_NARROW = (PackedType.UINT8, PackedType.UINT16, PackedType.UINT32)


class Packer:
    """Packs the samples of one stream."""

    def __init__(self, model: WorkloadModel, scales: Mapping[str, float]) -> None:
        self._types = {
            parameter.name: packed_type(parameter, scales.get(parameter.name, 1.0)) for parameter in model.parameters
        }
        self._positions = {
            parameter.name: _Positions(parameter.bins.categories)
            for parameter in model.parameters
            if parameter.kind is Kind.CATEGORY
        }

    def pack(self, sample: Sample) -> PackedBatch:
        """Return a sample packed, of categories their positions in `Bins.categories`."""
        arrivals = sample.arrival_nanos
        return PackedBatch(
            start_index=sample.start,
            request_count=len(sample),
            columns=[self._pack(name, column) for name, column in sample.columns.items()],
            arrival_nanos=b"" if arrivals is None else arrivals.astype(PackedType.INT64.value, copy=False).tobytes(),
        )

    def _pack(self, name: str, column: Column) -> PackedColumn:
        positions = self._positions.get(name)
        values = column if positions is None else positions.of(column)
        kind = self._types[name]
        return PackedColumn(name=name, type=kind, values=values.astype(kind.value, copy=False).tobytes())


def packed_type(parameter: Parameter, scale: float) -> PackedType:
    """Return the narrowest type for the values of a parameter that is multiplied by `scale`."""
    if parameter.kind is Kind.NUMBER:
        return PackedType.FLOAT64
    low, high = np.floor(parameter.sketch.low * scale), np.ceil(parameter.sketch.high * scale)
    for kind in _NARROW:
        if low >= 0 and high <= np.iinfo(np.dtype(kind.value)).max:
            return kind
    return PackedType.INT64


class _Positions:
    """Finds categories by their names."""

    def __init__(self, categories: tuple[str, ...]) -> None:
        names = np.array(categories, np.str_)
        self._order = np.argsort(names)
        self._sorted = names[self._order]

    def of(self, column: Column) -> npt.NDArray[np.intp]:
        """Return the position of each; every name must be known."""
        return self._order[np.searchsorted(self._sorted, column)]
