"""Writing results to disk: a file is written whole or not at all, and a place that cannot be written is said so."""

import os
import uuid
from pathlib import Path

from llmpilot_contracts.errors import PreconditionError


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place of the one there is, if any; raises PreconditionError."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where there is none; raises PreconditionError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be made a folder: {error.strerror}") from error
