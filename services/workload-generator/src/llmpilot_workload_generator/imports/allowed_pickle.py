"""Reading a pickle of plain data without running what it asks for.

Invariant: a pickle reaches nothing but the classes of `_STANDS_FOR`, which make numbers and lists, and one that only
holds attributes; whatever else it names is refused before it is looked up.
"""

import io
import pickle
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation

_NUMBERS = "biuf"
_OBJECTS = "O"


def read_attributes(content: bytes, *, class_name: str, label: str) -> Mapping[str, Any]:
    """Return the attributes of the object of class `class_name`, "module.Class", that a pickle holds.

    Numpy numbers come as Python's, arrays and pandas' indexes as lists. `label` is what errors call the file.
    Raises InvalidInputError, which names the class that a pickle may not ask for.
    """
    try:
        held = _Unpickler(io.BytesIO(content), class_name, label).load()
    except InvalidInputError:
        raise
    except (MemoryError, RecursionError) as error:
        raise _refusal(label, "must be a pickle that fits into memory") from error
    except _DAMAGE as error:
        raise _refusal(label, f"must be a pickle that can be read: {str(error) or type(error).__name__}") from error
    if not isinstance(held, _Held) or not isinstance(held.state, dict):
        raise _refusal(label, f"must hold a {class_name}")
    return MappingProxyType(held.state)


_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)
"""What the standard library and the classes below raise where a pickle is cut or changed."""


def _refusal(label: str, description: str) -> InvalidInputError:
    return InvalidInputError([Violation(label, description)])


class _StandIn:
    """A class that a pickle gets in place of the one it names; having __setstate__, it cannot be given attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"a {type(self).__name__.strip('_')} has no state")


class _Held(_StandIn):
    """In place of the pickle's own class."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype(_StandIn):
    """In place of numpy.dtype: a kind of numbers, or references to other objects."""

    __slots__ = ("dtype",)

    def __init__(self, text: str, _align: bool = False, _copy: bool = False) -> None:
        self.dtype = np.dtype(str(text))
        if self.dtype.kind not in _NUMBERS + _OBJECTS:
            raise pickle.UnpicklingError(f"a dtype must be of numbers, is {text!r}")

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise pickle.UnpicklingError("a dtype must be of numbers, has fields")


class _Scalar(_StandIn):
    """In place of numpy.core.multiarray.scalar: becomes a number of Python's."""

    __slots__ = ()

    def __new__(cls, dtype: _Dtype, content: bytes) -> Any:
        (value,) = np.frombuffer(content, dtype.dtype).tolist()  # refuses references to objects
        return value


class _Array(_StandIn):
    """In place of numpy.core.multiarray._reconstruct: an array, as a list."""

    __slots__ = ("values",)

    def __init__(self, _kind: object, _shape: object, _dtype: object) -> None:
        self.values: list[Any] = []

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, (_,), _Dtype() as dtype, _, list() as values) if dtype.dtype.kind == _OBJECTS:
                self.values = values
            case (_, (_,), _Dtype() as dtype, _, bytes() as content):
                self.values = np.frombuffer(content, dtype.dtype).tolist()
            case _:
                raise pickle.UnpicklingError("an array must have one axis")


class _Named(_StandIn):
    """In place of numpy.ndarray and pandas' Index, which are named as the kind of something and never made."""

    __slots__ = ()

    def __new__(cls) -> Any:
        raise pickle.UnpicklingError("an array must be made by _reconstruct")


class _Index(_StandIn):
    """In place of pandas' _new_Index: becomes the list of its labels."""

    __slots__ = ()

    def __new__(cls, _kind: object, attributes: Mapping[str, Any]) -> Any:
        return list(attributes["data"].values)


_STANDS_FOR: Mapping[str, type[_StandIn]] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Named,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy.core.multiarray._reconstruct": _Array,
    "pandas.Index": _Named,  # as pandas 3 calls it
    "pandas.core.indexes.base.Index": _Named,
    "pandas.core.indexes.base._new_Index": _Index,
}


class _Unpickler(pickle._Unpickler):  # the one in Python: the other one takes 64 GB for a memo of number 2^32
    def __init__(self, file: io.BytesIO, class_name: str, label: str) -> None:
        super().__init__(file)
        self._class_name = class_name
        self._label = label

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        full_name = f"{module}.{name}"
        if full_name == self._class_name:
            return _Held
        found = _STANDS_FOR.get(full_name.replace("numpy._core.", "numpy.core."))  # as numpy 2 calls it
        if found is None:
            raise _refusal(self._label, f"asks for {full_name}, which a pickle of plain data does not need")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse a reference to something outside the pickle."""
        raise pickle.UnpicklingError(f"refers to {pid!r} outside of itself")
