"""The compiler of the inner loops, with types for mypy.

Invariant: a compiled function behaves as the same Python would, but that it does not check for division by zero.
Functions that call one another are in one file: what is kept compiled follows the changes of its own file only.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function of arrays; it is kept on disk where there is a folder to keep it in."""
    try:
        return cast("Callable[_P, _R]", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:
        return cast("Callable[_P, _R]", numba.njit(nogil=True, error_model="numpy")(function))
