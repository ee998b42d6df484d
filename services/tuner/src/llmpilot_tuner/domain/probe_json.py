"""Probes as they are kept to go on from.

Invariant: `read_probe(probe_json(probe)) == probe`.
"""

import msgspec

from llmpilot_contracts.errors import PilotError
from llmpilot_tuner.domain.probing import Probe


def probe_json(probe: Probe) -> str:
    """Return a probe, with every batch that was run and how it went, as JSON."""
    return msgspec.json.encode(probe).decode()


def read_probe(text: str) -> Probe:
    """Return a probe as it was kept; PilotError: another version of the tuner kept it."""
    try:
        return msgspec.json.decode(text, type=Probe)
    except msgspec.DecodeError as error:
        raise PilotError(f"a probe that was kept cannot be read: {error}; start the tuning anew") from error
