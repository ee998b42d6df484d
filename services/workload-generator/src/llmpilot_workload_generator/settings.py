"""The workload generator's settings, from the environment."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from llmpilot_servicekit.settings import ServiceSettings


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("must be a folder that exists")
    return path


class WorkloadSettings(ServiceSettings):
    """`LLMPILOT_...` variables beside those every service has."""

    traces: Annotated[Path, AfterValidator(_checked_folder)] | None = None
    """LLMPILOT_TRACES: the folder below which clients may name traces; unset: clients send what is fitted."""
    max_upload_bytes: int = Field(default=4 * 1024**3, gt=0)
    """LLMPILOT_MAX_UPLOAD_BYTES: the largest file that a client may send."""
    upload_idle_seconds: float = Field(default=60, gt=0, allow_inf_nan=False)
    """LLMPILOT_UPLOAD_IDLE_SECONDS: how long a client that sends a file may send nothing."""
    max_creations: int = Field(default=4, gt=0, le=64)
    """LLMPILOT_MAX_CREATIONS: models that are made at once; further clients are told to try again."""
    max_request_bytes: int = Field(default=32 * 1024 * 1024, gt=0, lt=2**31)
    """LLMPILOT_MAX_REQUEST_BYTES: tokenizers are big."""
