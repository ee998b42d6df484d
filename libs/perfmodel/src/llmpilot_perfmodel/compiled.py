"""The compiler of the inner functions, which call each other millions of times a second, with types for mypy.

Invariant: a compiled function allocates nothing and behaves as the same Python would; its machine code, kept on disk
beside the sources, is older than no source of this library.
Both take more than numba's public interface; a numba without it makes slower code, or anew in every process.
"""

import contextlib
import hashlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make the import of a module fail, unless somebody has imported it before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast("Any", None)
    try:
        yield
    finally:
        del sys.modules[module]


with _hidden("scipy.linalg.cython_blas"), contextlib.suppress(ImportError):
    # Looks for SciPy, which takes a tenth of a second, to multiply matrices; nothing here does.
    importlib.import_module("numba.np.arraymath")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function of numbers and arrays into its callers."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
    with contextlib.suppress(AttributeError):
        if hasattr(numba.core.options.DefaultOptions, "_nrt"):
            options["_nrt"] = False  # counting references to arrays would take longer than the steps themselves
    dispatcher: Any = numba.njit(**options)(function)
    with contextlib.suppress(AttributeError, OSError, RuntimeError):  # another numba, or no folder to keep it in
        kept = numba.njit(**options, cache=True)(function)
        _keep_fresh_only(kept._cache._cache_file)
        dispatcher = kept
    return cast("Callable[_P, _R]", dispatcher)


def _keep_fresh_only(cache_file: Any) -> None:
    """Make machine code depend on all sources: numba looks at those of the function itself, not of what it calls.

    What is stale goes now. Numba writes first that there is something new and then what, and a process that starts
    together with this one could read in between.
    """
    if not hasattr(cache_file, "_source_stamp"):
        raise AttributeError("numba keeps its stamp elsewhere")
    cache_file._source_stamp = _STAMP
    if not cache_file._load_index():
        for number in itertools.count(1):
            path = Path(cache_file._data_path(cache_file._data_name(number)))
            if not path.exists():
                break
            path.unlink(missing_ok=True)
