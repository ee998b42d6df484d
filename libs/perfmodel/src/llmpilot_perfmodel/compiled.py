"""The compiler of the inner functions, which call each other millions of times a second, with types for mypy.

Invariant: a compiled function allocates nothing and behaves as the same Python would; its machine code, kept on disk
beside the sources, is older than no source of this library.
"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba

_P = ParamSpec("_P")
_R = TypeVar("_R")


def sources_stamp(folder: Path) -> str:
    """Return a text that changes with any Python source in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        stat = path.stat()
        digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()


_STAMP = sources_stamp(Path(__file__).parent)


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function of numbers and arrays into its callers.

    References to arrays are not counted (`_nrt`), which would take several times as long as the steps themselves.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True, "_nrt": False}
    dispatcher: Any = numba.njit(**options)(function)
    with contextlib.suppress(RuntimeError):  # no folder to keep machine code in: every process compiles its own
        dispatcher.enable_caching()
        # numba looks at the function's own file only, but the machine code holds that of the functions it calls.
        dispatcher._cache._cache_file._source_stamp = _STAMP
    return cast("Callable[_P, _R]", dispatcher)
