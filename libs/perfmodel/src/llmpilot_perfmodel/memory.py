"""Whether an LLM's weights fit into the memory of a GPU profile.

The rule is a veto, not a promise. On the 101 pairs of Table III, Lazuka et al., 2024, it rules out none of the 66 that
worked and 23 of the 35 that did not; the other 12 had room for the weights alone.
"""

from dataclasses import dataclass

from llmpilot_perfmodel.gpu_catalogue import BYTES_PER_GB, GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec

BYTES_PER_PARAMETER = 2
"""Weights are served in 16 bits, whatever type they were published in."""
WEIGHTS_PERCENT = 95
"""Share of the memory that weights may take; the rest is the runtime's and the requests'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFit:
    """The weights of an LLM against the memory of a GPU profile."""

    needed_bytes: int
    available_bytes: int
    """What weights may take of the profile's memory."""
    fits: bool
    explanation: str


def weights_memory(spec: LlmSpec, profile: GpuProfile) -> WeightsFit:
    """Return whether 16-bit weights fit into 95 % of the profile's memory."""
    needed_bytes = BYTES_PER_PARAMETER * spec.parameter_count
    available_bytes = profile.memory_bytes * WEIGHTS_PERCENT // 100
    fits = needed_bytes <= available_bytes
    return WeightsFit(
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
        fits=fits,
        explanation=(
            f"16-bit weights take {needed_bytes / BYTES_PER_GB:.1f} GB, which {'fits' if fits else 'does not fit'} "
            f"into {available_bytes / BYTES_PER_GB:.1f} GB ({WEIGHTS_PERCENT} % of the memory of {profile.name})"
        ),
    )
