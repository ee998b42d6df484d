"""Where raw CSVs come from: a folder or a tar archive, compressed or not.

Invariant: an archive is read as a stream, one member at a time; nothing of it is written to disk, and an archive that
was cut off, anywhere, is an error.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation

PROVENANCE = {"source": "IBM/LLM-performance-prediction (Lazuka et al., 2024)", "licence": "CDLA-Permissive-2.0"}
"""The first comment lines of a dataset file made from the public raw records; the command follows them."""

_READ_BYTES = 1 << 18  # a multiple of the tar block, and enough for few calls
_TAR_BLOCK_BYTES = 512
_OPENERS: dict[bytes, Callable[[Path], object]] = {
    b"\xfd7zXZ\x00": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}


def raw_csvs(path: Path) -> tuple[Iterator[tuple[str, bytes]], int | None]:
    """Return names and contents of the CSVs in a folder, at any depth, or an archive, and how many (None: not known).

    Raises NotFoundError at once, and InvalidInputError while iterating over an unreadable or incomplete source.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.csv") if _is_raw(file.name))
        return _contents(path, files), len(files)
    if not path.exists():
        raise NotFoundError("raw data", str(path), hint="give a folder of CSV files or a tar archive")
    return _members(path), None


def _is_raw(name: str) -> bool:
    file_name = PurePosixPath(name).name
    return file_name.endswith(".csv") and not file_name.startswith(".")


def _contents(folder: Path, files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        try:
            yield str(file.relative_to(folder)), file.read_bytes()
        except OSError as error:
            raise InvalidInputError([Violation(str(file), f"cannot be read: {error.strerror}")]) from error


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with _open(path) as file:
            stream = _TailStream(file)
            with tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|", bufsize=_READ_BYTES) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() and _is_raw(member.name) else None
                    if content is not None:
                        yield member.name, content.read()
            if stream.tail != bytes(_TAR_BLOCK_BYTES):  # tarfile takes a cut between two members for the end
                raise EOFError("the end is missing")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise InvalidInputError(
            [Violation(str(path), f"must be a complete tar archive or a folder: {error}; fetch it again")]
        ) from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((opener for prefix, opener in _OPENERS.items() if magic.startswith(prefix)), None)
    return cast("BinaryIO", opener(path)) if opener else path.open("rb")


class _TailStream(io.RawIOBase):
    """A reader that remembers the last tar block it gave."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self.tail = content[-_TAR_BLOCK_BYTES:] or self.tail
        return content
