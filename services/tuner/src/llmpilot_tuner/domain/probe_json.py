"""Probes as they are kept to go on from.

Invariant: `read_probe(probe_json(kept)) == kept`.
"""

from dataclasses import dataclass

import msgspec

from llmpilot_contracts.errors import PilotError
from llmpilot_tuner.domain.probing import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptProbe:
    """A probe that was made, and where it counts."""

    key: str
    """`cache_key` of the tuning on the machine that made it: on another one the same weight may not pass."""
    probe: Probe


def probe_json(kept: KeptProbe) -> str:
    """Return a probe, with every batch that was run and how it went, as JSON."""
    return msgspec.json.encode(kept).decode()


def read_probe(text: str) -> KeptProbe:
    """Return a probe as it was kept; PilotError: another version of the tuner kept it."""
    try:
        return msgspec.json.decode(text, type=KeptProbe)
    except msgspec.DecodeError as error:
        raise PilotError(f"a probe that was kept cannot be read: {error}; start the tuning anew") from error
