"""The compiler of the engine's inner functions, which call each other millions of times a second.

Invariant: a kernel allocates nothing; it is compiled again when any source of this library has changed.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _library_stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        stat = path.stat()
        digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()


_STAMP = _library_stamp()


def kernel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function of numbers and arrays into its callers.

    References to arrays are not counted (`_nrt`), which would take several times as long as the steps themselves.
    """
    options: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "forceinline": True, "_nrt": False}
    dispatcher: Any = numba.njit(**options)(function)
    # numba looks at the function's own file only, but the machine code holds that of the functions it calls.
    dispatcher._cache._cache_file._source_stamp = _STAMP
    return cast("Callable[_P, _R]", dispatcher)
