"""Values of a trace, made of what a file has: numbers of any width, numbers as text, text.

Invariant: what comes out has no empty cell and no NaN; whole numbers are exact in a float64, and lengths at least 1.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmpilot_workload_generator.model import (
    BATCH_SIZE,
    INPUT_TOKENS,
    IS_GREEDY,
    OUTPUT_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Integers,
    Kind,
)
from llmpilot_workload_generator.traces.formats import TimeUnit
from llmpilot_workload_generator.traces.trace import TraceColumn

KINDS = {
    INPUT_TOKENS: Kind.INTEGER,
    OUTPUT_TOKENS: Kind.INTEGER,
    BATCH_SIZE: Kind.INTEGER,
    TEMPERATURE: Kind.NUMBER,
    TOP_P: Kind.NUMBER,
    TOP_K: Kind.INTEGER,
    IS_GREEDY: Kind.INTEGER,
}
"""What the parameters of requests are, whatever a file's types say."""
LENGTHS = (INPUT_TOKENS, OUTPUT_TOKENS, BATCH_SIZE)

_LARGEST_WHOLE = 1 << 53  # above, a float64 skips whole numbers
_PROBED_ROWS = 64
_WORDS = {"true": 1, "false": 0}
_NANOS = {TimeUnit.SECONDS: 10**9, TimeUnit.MILLISECONDS: 10**6, TimeUnit.NANOSECONDS: 1}
_LARGEST_NANOS = (1 << 63) - 1
_DATE_TIME = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?")
_UTC_OFFSET = re.compile(r".*\d{2}:\d{2}.*(Z|[+-]\d{2}:?\d{2})")


class BadCellError(ValueError):
    """A cell that cannot be used; `position` is its row in the batch."""

    def __init__(self, position: int, description: str) -> None:
        self.position = position
        super().__init__(description)


def kind_of(head: pa.Array) -> Kind | None:
    """Return what the first rows of a column hold; None: nothing that a parameter can be, such as a list or a time."""
    kind = head.type.value_type if pa.types.is_dictionary(head.type) else head.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return Kind.INTEGER
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Kind.NUMBER
    if pa.types.is_null(kind):
        return Kind.CATEGORY
    if not is_text(kind):
        return None
    first = first_text(head)
    if first and _DATE_TIME.fullmatch(first):
        return None
    return _kind_of_text(head) if first and _is_number(first) else Kind.CATEGORY


def _kind_of_text(head: pa.Array) -> Kind:
    """Return the kind of a column whose first cell is a number or a truth value; so all others must be."""
    try:
        whole_numbers(head.drop_null(), "")
    except BadCellError:
        return Kind.NUMBER
    return Kind.INTEGER


def is_text(value_type: pa.DataType) -> bool:
    """Whether values of an Arrow type are text."""
    return bool(
        pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_string_view(value_type)
    )


def first_text(head: pa.Array) -> str:
    """Return the first cell that is not empty, as text; empty: there is none."""
    filled = head.drop_null()
    return str(filled[0].as_py()).strip() if len(filled) else ""


def has_utc_offset(text: str) -> bool:
    """Whether a date and time says how far it is from UTC."""
    return bool(_UTC_OFFSET.fullmatch(text))


def is_date_time(head: pa.Array) -> bool:
    """Whether the first rows of a column are dates or times."""
    return bool(pa.types.is_temporal(head.type)) or bool(_DATE_TIME.fullmatch(first_text(head)))


def _is_number(text: str) -> bool:
    if text.lower() in _WORDS:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def values_of(array: pa.Array, kind: Kind, name: str) -> TraceColumn:
    """Return a column's values, checked; `name` is the parameter's. Raises BadCellError at the first bad cell."""
    if array.null_count:
        raise BadCellError(_first(pc.is_null(array)), "must not be empty")
    if kind is Kind.CATEGORY:
        return _categories(array)
    array = _plain(array)
    return whole_numbers(array, name) if kind is Kind.INTEGER else _numbers(array)


def _plain(array: pa.Array) -> pa.Array:
    """Return numbers or text without a dictionary, spaces or decimals of their own type."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return array


def whole_numbers(array: pa.Array, name: str) -> npt.NDArray[np.integer[Any]]:
    """Return whole numbers as narrow as they are stored; truth values are 1 and 0."""
    if is_text(array.type):
        array = _whole_numbers_of_text(array)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values = numpy_of(array)
    if values.dtype.kind == "f":
        values = _whole(_finite(values))
    if len(values) and (int(values.max()) >= _LARGEST_WHOLE or int(values.min()) <= -_LARGEST_WHOLE):
        _refuse(values, (values >= _LARGEST_WHOLE) | (values <= -_LARGEST_WHOLE), "must be less than 2^53")
    if name in LENGTHS and len(values) and values.min() < 1:
        _refuse(values, values < 1, "must be >= 1")
    return values


def numpy_of(numbers: pa.Array) -> npt.NDArray[Any]:
    """Return numbers, of which none is empty, without a copy. Arrow's own `to_numpy` imports pandas where it is."""
    found: npt.NDArray[Any] = np.from_dlpack(numbers)
    return found


def _whole(values: npt.NDArray[Any]) -> Integers:
    if (np.abs(values) >= _LARGEST_WHOLE).any():
        _refuse(values, np.abs(values) >= _LARGEST_WHOLE, "must be less than 2^53")
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        _refuse(values, whole != values, "must be a whole number")
    return whole


def _whole_numbers_of_text(texts: pa.Array) -> pa.Array:
    trimmed = texts
    for prepare in (_same, pc.utf8_trim_whitespace):
        trimmed = prepare(trimmed)
        for target in (pa.int64(), pa.float64()):
            if (values := _cast(trimmed, target)) is not None:
                return values
    words = pc.utf8_lower(trimmed)
    if pc.all(pc.is_in(words, pa.array(list(_WORDS)))).as_py():
        return pc.equal(words, "true")
    raise BadCellError(*_misfit(trimmed, texts, "a whole number"))


def _numbers(array: pa.Array) -> npt.NDArray[np.float64]:
    if is_text(array.type):
        array = _numbers_of_text(array)
    if pa.types.is_float16(array.type) or pa.types.is_float32(array.type):
        array = _shortest(array)
    values = numpy_of(array)
    if values.dtype.kind != "f":
        values = whole_numbers(array, "")
    return _finite(values.astype(np.float64, copy=False))


def _numbers_of_text(texts: pa.Array) -> pa.Array:
    if (values := _cast(texts, pa.float64())) is not None:
        return values
    trimmed = pc.utf8_trim_whitespace(texts)
    if (values := _cast(trimmed, pa.float64())) is not None:
        return values
    raise BadCellError(*_misfit(trimmed, texts, "a number"))


def _shortest(array: pa.Array) -> pa.Array:
    """Return float64 that read as the narrower floats do: .7 stays .7."""
    encoded = array.cast(pa.float32()).dictionary_encode()
    return encoded.dictionary.cast(pa.string()).cast(pa.float64()).take(encoded.indices)


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(values) and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        _refuse(values, ~np.isfinite(values), "must be a finite number")
    return values


def _categories(array: pa.Array) -> pa.Array:
    """Return text with a dictionary, without empty ones."""
    if not pa.types.is_dictionary(array.type):
        array = array.cast(pa.string()).dictionary_encode()
    if not is_text(array.type.value_type):
        array = pa.DictionaryArray.from_arrays(array.indices, array.dictionary.cast(pa.string()))
    empty = pc.index(array.dictionary, pa.scalar("", array.type.value_type)).as_py()
    if empty >= 0 and (at := pc.index(array.indices, pa.scalar(empty, array.indices.type)).as_py()) >= 0:
        raise BadCellError(at, "must not be empty")
    return array


def nanos_of(array: pa.Array, unit: TimeUnit) -> Integers:
    """Return times in nanoseconds. Raises BadCellError at the first that is none."""
    if array.null_count:
        raise BadCellError(_first(pc.is_null(array)), "must not be empty")
    array = _plain(array)
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s"))
    if unit is TimeUnit.DATE_TIME and is_text(array.type):
        array = _date_times(array)
    if pa.types.is_timestamp(array.type):
        unit, array = TimeUnit.NANOSECONDS, _nanoseconds(array)
    scale = _NANOS[unit]
    if is_text(array.type) and (whole := _cast(array, pa.int64())) is not None:
        array = whole
    if pa.types.is_integer(array.type):
        values: Integers = numpy_of(array.cast(pa.int64()))
        if len(values) and max(abs(int(values.min())), abs(int(values.max()))) > _LARGEST_NANOS // scale:
            _refuse(values, np.abs(values.astype(np.float64)) > _LARGEST_NANOS // scale, f"must be {unit}")
        return values * scale
    numbers = _numbers(array)
    if len(numbers) and np.abs(numbers).max() >= _LARGEST_NANOS // scale:
        _refuse(numbers, np.abs(numbers) >= _LARGEST_NANOS // scale, f"must be {unit}")
    whole_units = np.floor(numbers)  # apart from the rest, so that a whole millisecond of today stays exact
    return whole_units.astype(np.int64) * scale + np.rint((numbers - whole_units) * scale).astype(np.int64)


def _nanoseconds(times: pa.Array) -> pa.Array:
    return times.cast(pa.timestamp("ns", times.type.tz)).cast(pa.int64())


def _date_times(texts: pa.Array) -> pa.Array:
    zone = "UTC" if has_utc_offset(first_text(texts)) else None
    target = pa.timestamp("ns", zone)
    trimmed = texts
    for prepare in (_same, pc.utf8_trim_whitespace):
        trimmed = prepare(trimmed)
        if (times := _cast(trimmed, target)) is not None:
            return times
    like = "2024-05-10 08:00:00.123+00:00" if zone else "2023-11-16 18:17:03.979"
    position = _first_misfit(trimmed, target)
    raise BadCellError(position, f"must be a date and time such as {like}, is {texts[position].as_py()!r}")


def _same(array: pa.Array) -> pa.Array:
    return array


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array | None:
    """Return values of another type; None: some cannot be. Tries a few first, for every text that fails takes 1 us."""
    try:
        array[:_PROBED_ROWS].cast(target)
        return array.cast(target)
    except pa.ArrowInvalid:
        return None


def _misfit(trimmed: pa.Array, texts: pa.Array, wanted: str) -> tuple[int, str]:
    position = _first_misfit(trimmed, pa.float64())
    return position, f"must be {wanted}, is {texts[position].as_py()!r}"


def _first_misfit(texts: pa.Array, target: pa.DataType) -> int:
    """Return the position of the first text that is no value of a type, given that there is one."""
    low, size = 0, _PROBED_ROWS
    while low + size < len(texts) and _cast(texts[low : low + size], target) is not None:
        low, size = low + size, 2 * size
    high = min(low + size, len(texts))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _cast(texts[low:middle], target) is not None else (low, middle)
    return low


def _refuse(values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], requirement: str) -> None:
    position = int(bad.argmax())
    raise BadCellError(position, f"{requirement}, is {values[position]}")


def _first(mask: pa.BooleanArray) -> int:
    return int(pc.index(mask, pa.scalar(True)).as_py())
