"""The time of one server step, from constants or from tables of per-layer measurements.

Invariant: every scheduling policy pays by this one function, so a step of the same work costs the same everywhere.
Source of the linear form: it fits the steps in the raw records of Lazuka et al., 2024, within 2-3 % (decode).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.compiled import compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """A step's time as a linear function of its work.

    seconds = max(decode_seconds if anything decodes, prefill_seconds if anything prefills)
    + decode_seconds_per_sequence * sequences + decode_seconds_per_cached_token * cached tokens of those
    + prefill_seconds_per_token * new tokens + prefill_seconds_per_request * requests
    + prefill_seconds_per_token_pair * (new, earlier or equal) token pairs.
    """

    decode_seconds: float
    decode_seconds_per_sequence: float
    decode_seconds_per_cached_token: float
    prefill_seconds: float
    prefill_seconds_per_token: float
    prefill_seconds_per_request: float
    prefill_seconds_per_token_pair: float = 0.0


class StepTables(NamedTuple):
    """What `step_seconds` reads; without a layer profile every array but `constants` is empty."""

    constants: npt.NDArray[np.float64]
    """The fields of `StepConstants` in their order."""


@compiled
def step_seconds(
    tables: StepTables,
    prefill_requests: int,
    prefill_tokens: int,
    prefill_pairs: float,
    prefill_cached_tokens: int,
    decode_sequences: int,
    decode_cached_tokens: int,
) -> float:
    """Return the seconds of a step.

    prefill_tokens: prompt tokens computed in this step; prefill_pairs: attention scores of those, summed over requests;
    prefill_cached_tokens: tokens of the same requests computed before; decode_cached_tokens: context of the decoding
    sequences, padding included where the server pads.
    """
    constants = tables.constants
    base = 0.0
    if decode_sequences > 0:
        base = constants[0]
    if prefill_requests > 0:
        base = max(base, constants[3])
    return float(
        base
        + constants[1] * decode_sequences
        + constants[2] * decode_cached_tokens
        + constants[4] * prefill_tokens
        + constants[5] * prefill_requests
        + constants[6] * prefill_pairs
    )
