"""The compiler of the inner loops, with types that mypy can follow.

Invariant: a compiled function behaves as the same Python would; the machine code is kept on disk beside the sources, so
only the first run after an installation compiles.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function of numbers and arrays when it is first called."""
    return cast("Callable[_P, _R]", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
