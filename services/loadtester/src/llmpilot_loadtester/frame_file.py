"""Frames of records on disk: what a long stage has recorded does not fill the memory of who collects it.

Invariant: frames come back as they were added, in their order; the file has no name, so nothing is left of it.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator

from llmpilot_contracts.errors import PreconditionError


class FrameFile:
    """A list of frames that can be added to and read, as often as wanted."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as its owner
        self._sizes = array("Q")

    def append(self, frame: bytes) -> None:
        """Add a frame; PreconditionError where the disk is full."""
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(frame)
        except OSError as error:
            raise PreconditionError(
                f"records cannot be kept in {tempfile.gettempdir()}: {error.strerror}; make room there, or set TMPDIR"
            ) from error
        self._sizes.append(len(frame))

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for size in self._sizes:
            yield self._file.read(size)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget the frames."""
        self._file.close()
