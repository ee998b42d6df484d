"""Tunings kept in a folder, so that the same command goes on where it was interrupted, or has its answer at once.

Invariant: what is kept counts only for the same specification, and on the same device with the same versions.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmpilot_servicekit.file_output import make_folder, write_whole
from llmpilot_tuner.domain.cache_key import cache_key
from llmpilot_tuner.domain.probing import Probe, ProbeFacts
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.spec import TuningSpec

_VERSION = 1
_NAME_DIGITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is known of a tuning."""

    version: int = _VERSION
    key: str = ""
    """Of everything that the weight depends on, device and versions included; empty: nothing is known yet."""
    probes: tuple[Probe, ...] = ()
    result: TuningResult | None = None


class KeptTunings:
    """The file of one specification in a folder; raises PreconditionError where it cannot be written."""

    def __init__(self, folder: Path, spec: TuningSpec) -> None:
        make_folder(folder)
        nowhere = ProbeFacts(kind=spec.probe, device="", capacity_bytes=spec.capacity_bytes, weight_bytes=0)
        self.path = folder / f"tuning-{cache_key(spec, nowhere)[:_NAME_DIGITS]}.json"

    def read(self) -> Kept:
        """Return what is kept; a file that cannot be read keeps nothing."""
        try:
            kept = msgspec.json.decode(self.path.read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            return Kept()
        return kept if kept.version == _VERSION else Kept()

    def write(self, kept: Kept) -> None:
        """Put it in place of what was kept."""
        write_whole(self.path, msgspec.json.encode(kept))
