import collections
import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.imports.allowed_pickle import read_attributes

CLASS_NAME = f"{__name__}.Published"


class Published:
    """Stands for the class of the published model, whose module nobody has."""


class Touch:
    """What a harmful pickle holds: something that runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickled(protocol: int = 4, **attributes: Any) -> bytes:
    held = Published()
    held.__dict__.update(attributes)
    sys.modules.setdefault(__name__, sys.modules[Published.__module__])
    return pickle.dumps(held, protocol)


def read(content: bytes) -> Any:
    return read_attributes(content, class_name=CLASS_NAME, label="m.pkl")


def problem(content: bytes) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(content)
    (violation,) = caught.value.violations
    assert violation.field == "m.pkl"
    return violation.description


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_data_is_read(protocol: int) -> None:
    attributes = read(
        pickled(
            protocol,
            numbers=[np.float64(1.5), np.int64(-3), np.bool_(True)],
            cells=[(1, 0.5, False)],
            columns=pd.Index(["a", "b"], dtype=object),
        )
    )
    assert attributes == {"numbers": [1.5, -3, True], "cells": [(1, 0.5, False)], "columns": ["a", "b"]}


def test_names_of_numpy_1_and_2_are_the_same() -> None:
    content = pickled(3, number=np.float64(1.5))
    assert b"numpy._core" in content
    assert read(content.replace(b"numpy._core", b"numpy.core")) == read(content) == {"number": 1.5}


def test_nothing_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert problem(pickled(harm=Touch(target))) == "asks for posix.mkdir, which a pickle of plain data does not need"
    assert not target.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (collections.OrderedDict(), "collections.OrderedDict"),
        (print, "builtins.print"),
        (np.random.default_rng(0).bit_generator, "numpy.random._pickle.__bit_generator_ctor"),
        (Path("x"), "pathlib.PosixPath"),
    ],
)
def test_other_class_is_named_and_refused(value: Any, name: str) -> None:
    assert problem(pickled(value=value)) == f"asks for {name}, which a pickle of plain data does not need"


def test_attributes_of_what_is_allowed_are_not_reached() -> None:
    """Protocol 4 may name "dtype.__class__" as an attribute of numpy."""
    assert "asks for numpy.dtype.__class__" in problem(b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.")


def test_what_is_allowed_cannot_be_changed() -> None:
    """The BUILD of a class, which would set its attributes."""
    state = b"N}\x8c\x01xK\x01s\x86"  # (None, {"x": 1})
    assert "must be a pickle that can be read" in problem(b"\x80\x04cnumpy\ndtype\n" + state + b"b.")
    assert "must be a pickle that can be read" in problem(b"\x80\x04cnumpy.core.multiarray\nscalar\n" + state + b"b.")


@pytest.mark.parametrize("dtype", ["O", "S4", "M8[s]", "V8", "i4,i4", "(2,)f8"])
def test_number_that_is_none_is_rejected(dtype: str) -> None:
    """A numpy scalar of references to objects would let a pickle read any memory."""
    made = b"cnumpy\ndtype\n\x8c%c%s\x85R" % (len(dtype), dtype.encode())
    content = b"\x80\x04cnumpy.core.multiarray\nscalar\n" + made + b"C\x08\1\2\3\4\5\6\7\x08\x86R."
    assert "must be a pickle that can be read" in problem(content)


def test_other_object_is_rejected() -> None:
    assert problem(pickle.dumps([1, 2])) == f"must hold a {CLASS_NAME}"


def test_persistent_reference_is_rejected() -> None:
    assert "outside of itself" in problem(b"\x80\x04K\x01Q.")


def test_memo_of_a_large_number_takes_no_memory() -> None:
    """LONG_BINPUT to 2^32 - 1: the interpreter's own reader takes 64 GB for it."""
    assert problem(b"\x80\x04Nr\xff\xff\xff\xff.") == f"must hold a {CLASS_NAME}"


def test_size_that_lies_is_rejected() -> None:
    assert "must be a pickle" in problem(b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.")
    assert "must be a pickle" in problem(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.")


def test_deep_nesting_is_rejected() -> None:
    nested = b"\x80\x04" + b"(" * 5 + b")" + b"\x85" * 200_000
    assert problem(nested + b".") == f"must hold a {CLASS_NAME}"
    assert "must be a pickle" in problem(b"\x80\x04}" + nested[2:] + b"Ns.")


@given(st.data())
@settings(max_examples=500)
def test_damage_is_one_error_or_other_attributes(data: st.DataObject) -> None:
    content = bytearray(pickled(numbers=[np.float64(1.5)], columns=pd.Index(["a"], dtype=object), cells=[(1, True)]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidInputError):
        read(bytes(content[: data.draw(st.integers(0, len(content)))]))


def test_pandas_is_not_imported() -> None:
    code = (
        "import sys, pathlib; from llmpilot_workload_generator.imports.model_import import import_model;"
        "from llmpilot_workload_generator.imports.allowed_pickle import read_attributes;"
        "read_attributes(sys.stdin.buffer.read(), class_name=sys.argv[1], label='x');"
        "sys.exit('pandas' in sys.modules)"
    )
    content = pickled(columns=pd.Index(["a"], dtype=object))
    subprocess.run([sys.executable, "-c", code, CLASS_NAME], input=content, check=True)
