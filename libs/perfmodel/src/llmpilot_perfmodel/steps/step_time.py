"""The time of one server step, from constants, from measurements of an LLM's layers, or from both added up.

Invariant: every scheduling policy pays by this one function, so a step of the same work costs the same everywhere.
Source of the linear form: it fits the steps in the raw records of Lazuka et al., 2024, within 2-3 % (decode).
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.compiled import compiled

_Floats = npt.NDArray[np.float64]
_Constants = tuple[float, float, float, float, float, float, float, float]


class StepLoad(NamedTuple):
    """The work of one step."""

    prefill_requests: int
    prefill_tokens: int
    """Prompt tokens computed in this step, padding included where the server pads."""
    prefill_pairs: float
    """Attention scores of those: for each the number of tokens up to and including it, summed."""
    decode_sequences: int
    decode_cached_tokens: int
    """Context of the decoding sequences, padding included where the server pads."""
    moved_tokens: int = 0
    """The same where sequences have joined or left the batch since the last decode, else 0."""


class ProfileSizes(NamedTuple):
    """How many nodes each part of a layer profile has; all 0 without a profile."""

    tokens: int = 0
    sequences: int = 0
    chunks: int = 0
    prefill_cached: int = 0
    decode_sequences: int = 0
    decode_cached: int = 0


class StepTables(NamedTuple):
    """What `step_seconds` reads; plain numbers where possible, as compiled code counts references to every array."""

    constants: _Constants
    """The fields of `StepConstants` in their order."""
    sizes: ProfileSizes
    profile: _Floats
    """Nodes and seconds of all dense layers over tokens; the same of output head and sampler over sequences; the nodes
    of the four axes of attention and, last axis fastest, its seconds over them. Empty without a profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """A step's time as a linear function of its work.

    seconds = max(decode_seconds if anything decodes, prefill_seconds if anything prefills)
    + decode_seconds_per_sequence * sequences + decode_seconds_per_cached_token * cached tokens of those
    + prefill_seconds_per_token * new tokens + prefill_seconds_per_request * requests
    + prefill_seconds_per_token_pair * (new, earlier or equal) token pairs
    + decode_seconds_per_moved_token * moved tokens: what a server without pages takes to copy its cache.
    """

    decode_seconds: float
    decode_seconds_per_sequence: float
    decode_seconds_per_cached_token: float
    prefill_seconds: float
    prefill_seconds_per_token: float
    prefill_seconds_per_request: float
    prefill_seconds_per_token_pair: float = 0.0
    decode_seconds_per_moved_token: float = 0.0

    def tables(self) -> StepTables:
        """Return what `step_seconds` reads; raise `InvalidInputError` with every constant that is no time."""
        values = {field.name: float(getattr(self, field.name)) for field in fields(self)}
        violations = [
            Violation(f"constants.{name}", f"must be a finite number of seconds >= 0, is {value}")
            for name, value in values.items()
            if not (math.isfinite(value) and value >= 0)
        ]
        if violations:
            raise InvalidInputError(violations)
        base, sequence, cached, prefill, token, request, pair, moved = values.values()
        constants = (base, sequence, cached, prefill, token, request, pair, moved)
        return StepTables(constants, ProfileSizes(), np.empty(0))


@compiled
def step_seconds(tables: StepTables, load: StepLoad) -> float:
    """Return the seconds of a step: what the constants say plus what the layer profile says."""
    decode, per_sequence, per_cached_token, prefill, per_token, per_request, per_pair, per_moved = tables.constants
    base = 0.0
    if load.decode_sequences > 0:
        base = decode
    if load.prefill_requests > 0:
        base = max(base, prefill)
    seconds = (
        base
        + per_sequence * load.decode_sequences
        + per_cached_token * load.decode_cached_tokens
        + per_token * load.prefill_tokens
        + per_request * load.prefill_requests
        + per_pair * load.prefill_pairs
        + per_moved * load.moved_tokens
    )
    if tables.sizes.tokens > 0:
        seconds += _profile_seconds(tables.sizes, tables.profile, load)
    return float(seconds)


@compiled
def _profile_seconds(sizes: ProfileSizes, profile: _Floats, load: StepLoad) -> float:
    sequences = load.prefill_requests + load.decode_sequences
    if sequences == 0:
        return 0.0
    head = 2 * sizes.tokens
    attention = head + 2 * sizes.sequences
    return float(
        _on_curve(profile, 0, sizes.tokens, load.prefill_tokens + load.decode_sequences)
        + _on_curve(profile, head, sizes.sequences, sequences)
        + _attention_seconds(profile, attention, sizes, load)
    )


@compiled
def _on_curve(profile: _Floats, start: int, count: int, place: float) -> float:
    node, share = _between(profile, start, count, place)
    low, high = profile[start + count + node], profile[start + count + node + 1]
    return float(low + share * (high - low))


@compiled
def _between(profile: _Floats, start: int, count: int, place: float) -> tuple[int, float]:
    """Return the node at or before a place and the way from there to the next node, above 1 beyond the last."""
    low, high = start, start + count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if profile[middle] <= place:
            low = middle
        else:
            high = middle
    share = (place - profile[low]) / (profile[low + 1] - profile[low])
    return low - start, max(0.0, share)


@compiled
def _attention_seconds(profile: _Floats, start: int, sizes: ProfileSizes, load: StepLoad) -> float:
    """Interpolate between the sixteen nodes around a step.

    The table was measured with one prompt; several become the one that has as many attention scores.
    """
    chunk, earlier, context = 0.0, 0.0, 0.0
    if load.prefill_tokens > 0:
        chunk = float(load.prefill_tokens)
        earlier = load.prefill_pairs / chunk - (chunk + 1.0) / 2.0
        if earlier < 0.0:
            chunk = (math.sqrt(1.0 + 8.0 * load.prefill_pairs) - 1.0) / 2.0
            earlier = 0.0
    if load.decode_sequences > 0:
        context = load.decode_cached_tokens / load.decode_sequences
    chunk_node, chunk_share = _between(profile, start, sizes.chunks, chunk)
    start += sizes.chunks
    earlier_node, earlier_share = _between(profile, start, sizes.prefill_cached, earlier)
    start += sizes.prefill_cached
    sequence_node, sequence_share = _between(profile, start, sizes.decode_sequences, load.decode_sequences)
    start += sizes.decode_sequences
    context_node, context_share = _between(profile, start, sizes.decode_cached, context)
    start += sizes.decode_cached
    seconds = 0.0
    for corner in range(8):
        chunk_step, earlier_step, sequence_step = corner >> 2, corner >> 1 & 1, corner & 1
        weight = chunk_share if chunk_step else 1.0 - chunk_share
        weight *= earlier_share if earlier_step else 1.0 - earlier_share
        weight *= sequence_share if sequence_step else 1.0 - sequence_share
        if weight != 0.0:
            place = (chunk_node + chunk_step) * sizes.prefill_cached + earlier_node + earlier_step
            place = place * sizes.decode_sequences + sequence_node + sequence_step
            place = start + place * sizes.decode_cached + context_node
            seconds += weight * (profile[place] + context_share * (profile[place + 1] - profile[place]))
    return max(0.0, seconds)
