"""The sections of a model file: columns of whole numbers, numbers or texts, coded and compressed with zstd.

Codings: `varint` and `zigzag` (`varints.py`); `delta-varint` and `delta-zigzag`, the same of the differences between
neighbours; `float64`, little-endian; `json`, a list of texts.
Invariant: what `pack` made, `unpack` returns exactly, and it takes no memory for a size that only a header claims.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmpilot_workload_generator.files import varints
from llmpilot_workload_generator.files.model_header import SectionForm

LARGEST_VALUE_COUNT = 1 << 27
"""Of all columns together: 1 GB of memory, a replay of 19 million requests of seven parameters."""
LARGEST_TEXT_BYTES = 1 << 26
_LARGEST_COMPRESSED_WELL = 1 << 20
"""Bytes; larger columns, which are those of a replay, are compressed faster and a little less."""
_INTEGER_CODINGS = ("varint", "zigzag", "delta-varint", "delta-zigzag")

Values = npt.NDArray[Any] | list[str]
"""Numbers of 64 bits, or texts."""


def pack(columns: Iterable[tuple[str, str, Values]]) -> tuple[list[SectionForm], bytes]:
    """Return the description and the bytes of columns, each a name, a coding and values."""
    forms, stored = [], []
    for name, coding, values in columns:
        raw = _encoded(coding, values)
        level = 19 if len(raw) <= _LARGEST_COMPRESSED_WELL else 6
        content = pa.Codec("zstd", compression_level=level).compress(raw, asbytes=True)
        sizes = {"value_count": len(values), "raw_bytes": len(raw), "stored_bytes": len(content)}
        forms.append(SectionForm(name=name, coding=coding, **sizes))
        stored.append(content)
    return forms, b"".join(stored)


def unpack(forms: Sequence[SectionForm], stored: bytes) -> dict[str, Values]:
    """Return the columns by name: int64, float64, or texts. Raises ValueError where there are none."""
    codec = pa.Codec("zstd")
    columns = {}
    start = 0
    for form in forms:
        content = stored[start : start + form.stored_bytes]
        start += form.stored_bytes
        try:
            raw = codec.decompress(content, decompressed_size=form.raw_bytes, asbytes=True)
            columns[form.name] = _decoded(form, raw)
        except (OSError, RecursionError, ValueError) as error:  # OSError is Arrow's word for what zstd did not write
            raise ValueError(f"section {form.name!r} cannot be read: {error}") from error
    return columns


def section_problems(forms: Sequence[SectionForm], stored_bytes: int) -> Iterator[str]:
    """Yield why sections of these descriptions, in so many bytes, cannot be read."""
    if len({form.name for form in forms}) < len(forms):
        yield "sections must have distinct names"
    if sum(form.value_count for form in forms) > LARGEST_VALUE_COUNT:
        yield f"the sections must have at most {LARGEST_VALUE_COUNT:,} values"
    if sum(form.stored_bytes for form in forms) != stored_bytes:
        yield f"the sections must take all of the {stored_bytes:,} bytes behind the header"
    for form in forms:
        count = form.value_count
        bounds = {
            "float64": (8 * count, 8 * count),
            "json": (2, LARGEST_TEXT_BYTES),
            **dict.fromkeys(_INTEGER_CODINGS, (count, varints.LARGEST_BYTES * count)),
        }
        if form.coding not in bounds:
            yield f"section {form.name!r} has the unknown coding {form.coding!r}"
        elif not bounds[form.coding][0] <= form.raw_bytes <= bounds[form.coding][1]:
            yield f"section {form.name!r} cannot have {form.raw_bytes:,} bytes for {count:,} values"


def _encoded(coding: str, values: Values) -> bytes:
    if isinstance(values, list):
        return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode()
    if coding == "float64":
        return values.astype("<f8").tobytes()
    numbers = values.view(np.uint64)
    if coding.startswith("delta-"):
        numbers = varints.to_deltas(numbers)
    return varints.encode(varints.to_zigzag(numbers.view(np.int64)) if coding.endswith("zigzag") else numbers)


def _decoded(form: SectionForm, raw: bytes) -> Values:
    if form.coding == "json":
        texts = json.loads(raw)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("must be a list of texts")
        if len(texts) != form.value_count:
            raise ValueError(f"must hold {form.value_count} texts, holds {len(texts)}")
        return texts
    if form.coding == "float64":
        values = np.frombuffer(raw, "<f8").astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("must hold finite numbers")
        return values
    numbers = varints.decode(raw, form.value_count)
    if form.coding.endswith("zigzag"):
        numbers = varints.from_zigzag(numbers).view(np.uint64)
    if form.coding.startswith("delta-"):
        numbers = varints.from_deltas(numbers)
    return numbers.view(np.int64)
