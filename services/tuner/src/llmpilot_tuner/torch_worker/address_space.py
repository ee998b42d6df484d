"""The memory of this process as the kernel and malloc count it, and the limit on it.

Invariant: sizes are of what is mapped, touched or not: that is what a limit is compared with, and what a GPU would give
out. In a process that was just forked the kernel counts the peak afresh.
"""

import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_KIB = 1024
_HOLES = (8192, 4096, 2048)
"""Bytes; smaller ones are of no account."""


@dataclass(frozen=True, slots=True)
class AddressSpace:
    """The sizes of a process."""

    size_bytes: int
    peak_bytes: int
    data_bytes: int
    """Of it, what RLIMIT_DATA counts."""

    @classmethod
    def now(cls) -> Self:
        """Return those of this process."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(*(int(fields[name].split()[0]) * _KIB for name in ("VmSize", "VmPeak", "VmData")))


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def malloc_bytes() -> int | None:
    """Return what malloc has given out and not got back; None: this C library does not tell."""
    library = _glibc()
    if library is None:
        return None
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def fill_holes() -> None:
    """Use up the unused pieces that malloc holds, so that whatever is allocated next makes the process larger."""
    library = _glibc()
    if library is None:
        return
    library.malloc_trim(0)
    for size in _HOLES:
        heap_bytes = library.mallinfo2().arena
        while True:
            piece = library.malloc(size)
            if library.mallinfo2().arena > heap_bytes:
                library.free(piece)
                break
    library.malloc_trim(0)


def _glibc() -> Any | None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):  # glibc before 2.33, other C libraries
        return None
    library.mallinfo2.restype = _MallInfo
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


def limit_data(limit_bytes: int | None) -> None:
    """Let allocations fail that would take this process beyond a limit; None: as far as it was allowed before."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if limit_bytes is None else limit_bytes
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
