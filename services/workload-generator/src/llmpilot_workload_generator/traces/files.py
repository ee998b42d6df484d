"""The files of a trace: which there are, and what a reader of one has to offer.

Invariant: files are taken in the order of their paths, so a trace is the same on every machine; nothing is unpacked to
disk, and a file that was cut off is an error.
"""

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, cast

import pyarrow as pa

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_workload_generator.traces.formats import FieldPath

BLOCK_BYTES = 1 << 24
"""How much of a text file is parsed at once: some 10^6 short rows."""
HEAD_BYTES = 1 << 20
"""How much of a text file is looked at to tell what its columns are."""

_TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_ARCHIVE_SUFFIXES = (".tar.xz", ".tar.gz", ".tgz", ".tar")
SUFFIXES = (
    *_TABLE_SUFFIXES,
    *(f"{suffix}{codec}" for suffix in _TABLE_SUFFIXES for codec in _CODECS),
    ".json",
    ".parquet",
    *_ARCHIVE_SUFFIXES,
)
_TAR_BLOCK_BYTES = 512
_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class RawBatch:
    """Rows as a file has them, unchecked."""

    columns: Mapping[FieldPath, pa.Array]
    first_row: int
    """Of the file, from 0."""
    bytes_done: int
    """How much of the file is read."""


class TraceFile(Protocol):
    """A file of rows, whatever its syntax. Every method raises InvalidInputError where the file cannot be read."""

    @property
    def label(self) -> str:
        """What messages call it."""

    omits_empty: ClassVar[bool]
    """Whether an empty value may be left out altogether, as in JSON objects."""

    def names(self) -> tuple[str, ...]:
        """Return its columns, or the keys of the outermost JSON object."""

    def head(self) -> Mapping[str, pa.Array]:
        """Return the first rows of every column; CSV as text."""

    def batches(self, fields: Mapping[FieldPath, pa.DataType]) -> Iterator[RawBatch]:
        """Read some fields. The types are for syntaxes that have none: JSON; what the file has itself prevails."""


class ByteSource(Protocol):
    """Where the bytes of a text file come from."""

    @property
    def label(self) -> str:
        """What messages call it."""

    def open(self) -> "ByteStream":
        """Open it at its start, uncompressed."""


class ByteStream:
    """An open file, uncompressed on the way, that knows how much of what is stored was read."""

    def __init__(self, stored: pa.NativeFile, codec: str | None) -> None:
        self._stored = stored
        self.file: pa.NativeFile = pa.CompressedInputStream(stored, codec) if codec else stored

    def position(self) -> int:
        """Return how many stored bytes were read."""
        return 0 if self._stored.closed else int(self._stored.tell())

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._stored.close()


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A file on disk, compressed as its name says."""

    path: Path
    label: str

    def open(self) -> ByteStream:
        """Open it. Raises InvalidInputError where that is refused."""
        try:
            return ByteStream(pa.OSFile(str(self.path)), _CODECS.get(self.path.suffix.lower()))
        except OSError as error:
            raise unreadable(self.label, error) from error


@dataclass(frozen=True, slots=True)
class MemberBytes:
    """A member of an archive."""

    content: bytes
    label: str

    def open(self) -> ByteStream:
        """Open it."""
        return ByteStream(pa.BufferReader(self.content), None)


def unreadable(label: str, error: Exception) -> InvalidInputError:
    """Return the error of a file whose bytes make no sense."""
    return InvalidInputError([Violation(label, f"cannot be read: {error}; it may be cut off, fetch it again")])


def suffix_of(path: Path) -> str:
    """Return the one of SUFFIXES that a file's name ends with; empty: none."""
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def is_archive(path: Path) -> bool:
    """Whether it holds several files."""
    return suffix_of(path) in _ARCHIVE_SUFFIXES


def partitions(path: Path) -> list[Path]:
    """Return the file, or all files of known suffixes in a folder, at any depth, that are not hidden.

    Raises NotFoundError where there is nothing, InvalidInputError where nothing can be a trace.
    """
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        try:
            found = sorted(file for file in path.rglob("*") if _is_partition(file.relative_to(path)) and file.is_file())
        except OSError as error:
            problem = f"must be a folder of nothing but readable files: {error}"
            raise InvalidInputError([Violation(str(path), problem)]) from error
        if not found:
            raise InvalidInputError([Violation(str(path), f"has no file of a trace; it must end with one of {known}")])
        return found
    if not path.exists():
        raise NotFoundError("trace", str(path), hint="give a file or a folder of files")
    if not suffix_of(path):
        raise InvalidInputError([Violation(str(path), f"must end with one of {known}")])
    return [path]


def _is_partition(path: Path) -> bool:
    return bool(suffix_of(path)) and not any(part.startswith((".", "_")) for part in path.parts)


def archive_members(path: Path, label: str) -> Iterator[tuple[MemberBytes, int]]:
    """Yield the CSV files of an archive, and how much of the archive was read."""
    try:
        with path.open("rb") as stored, _uncompressed(stored, path) as content:
            stream = _TailStream(content)
            with tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|", bufsize=_READ_BYTES) as archive:
                for member in archive:
                    if not member.isreg() or not _is_member(member.name):
                        continue
                    extracted = archive.extractfile(member)
                    if extracted is not None:
                        yield MemberBytes(extracted.read(), f"{label}: {member.name}"), stored.tell()
            if stream.tail != bytes(_TAR_BLOCK_BYTES):  # tarfile takes a cut between two members for the end
                raise EOFError("the end is missing")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise unreadable(label, error) from error


def _is_member(name: str) -> bool:
    file_name = name.rpartition("/")[2]
    return file_name.endswith(".csv") and not file_name.startswith(".")


def _uncompressed(stored: BinaryIO, path: Path) -> BinaryIO:
    if path.name.lower().endswith(".xz"):
        return cast("BinaryIO", lzma.open(stored))
    if path.name.lower().endswith("gz"):
        return cast("BinaryIO", gzip.open(stored))
    return stored


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
