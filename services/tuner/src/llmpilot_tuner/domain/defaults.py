"""What a tuning is asked to do where nobody says: one place, for the service and for the command line."""

from llmpilot_perfmodel.gpu_catalogue import BYTES_PER_GIB, Gpu
from llmpilot_perfmodel.memory_budget import COLLECTIVES_BYTES, RUNTIME_GIB
from llmpilot_tuner.domain.probing import ProbeKind

DEFAULT_MOST_REQUESTS = 256
DEFAULT_GRANULE = 1
_LONGEST_SEQUENCE = 8192
_UNKNOWN_CONTEXT_SEQUENCE = 2048
_MOST_NEW_TOKENS = 1024


def default_longest_sequence(max_position_count: int | None) -> int:
    """Return the most tokens of a request for an LLM of this context; None: its positions have no limit."""
    if max_position_count is None:
        return _UNKNOWN_CONTEXT_SEQUENCE
    return min(max_position_count, _LONGEST_SEQUENCE)


def default_most_new_tokens(longest_sequence: int) -> int:
    """Return the most output tokens of a request."""
    return max(1, min(_MOST_NEW_TOKENS, longest_sequence // 2))


def default_reserved_bytes(probe: ProbeKind, gpu: Gpu | None, gpu_count: int) -> int:
    """Return what of one GPU is not for tensors, by the catalogue; gpu None: of a GPU that it does not have.

    A CPU has no context, no kernels and no collectives.
    """
    if probe is ProbeKind.CPU:
        return 0
    runtime_gib = (gpu.runtime_memory_gib if gpu else None) or RUNTIME_GIB
    return round(runtime_gib * BYTES_PER_GIB) + (COLLECTIVES_BYTES if gpu_count > 1 else 0)
