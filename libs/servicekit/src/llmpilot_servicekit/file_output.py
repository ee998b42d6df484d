"""Writing results to disk: a file is written whole or not at all, and a place that cannot be written is said so."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmpilot_contracts.errors import PreconditionError

_SHOWN = 50
"""Characters of a file's name in that of its draft, which may have 255 bytes."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, and put it in place of the one there is, if any, at the end; raises PreconditionError.

    After an error inside, what was there before is there still.
    """
    draft = path.with_name(f".{path.name[:_SHOWN]}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # there is none, and there can be none
            draft.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place of the one there is, if any; raises PreconditionError."""
    with written_whole(path) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where there is none; raises PreconditionError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be made a folder: {error.strerror}") from error
