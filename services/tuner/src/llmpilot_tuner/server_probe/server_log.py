"""What the log of an inference server says of memory.

Invariant: only words that cannot mean anything else are taken for memory that ran out. Sources of the servers' words:
vLLM v1/core/kv_cache_utils.py and v1/worker/gpu_worker.py; TGI server/models and router.
"""

import re
from dataclasses import dataclass

from llmpilot_tuner.torch_worker.failures import FailureKind, classify

_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = r"([\d.]+) (bytes|B|KiB|MiB|GiB)"
_TRIED = re.compile(rf"Tried to allocate {_AMOUNT}")
_FREE = re.compile(rf"of which {_AMOUNT} is free")
_SERVER_WORDS = re.compile(
    r"Not enough memory to handle|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|less than desired GPU memory utilization|needs [\d.,]+ \w+ of cache on each GPU",
    re.IGNORECASE,
)
"""What servers say themselves, beside what an allocator says."""
_IN_FORCE = (
    re.compile(r"\b[CGX]PU KV cache size: ([\d,]+) tokens"),
    re.compile(r"Inferred max batch total tokens: ([\d,]+)"),
    re.compile(r"Setting max batch total tokens to ([\d,]+)"),
)
_ROOM = re.compile(r"room for ([\d,]+) tokens")
_OVERRIDE = re.compile(r"Overriding num_gpu_blocks=(\d+) with num_gpu_blocks_override=(\d+)")
_LOADING = re.compile(rf"Model loading took {_AMOUNT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    """Numbers of a log; None: it has none."""

    weight: int | None = None
    """The maximum batch weight that the server keeps to."""
    room_tokens: int | None = None
    """Tokens that the server says its memory has room for."""
    room_ratio: float | None = None
    """Blocks that vLLM had counted by those it was told to have."""
    weight_bytes: int | None = None
    missing_bytes: int | None = None
    """What the allocation that failed lacked."""


def is_out_of_memory(text: str) -> bool:
    """Return whether a text says that memory ran out."""
    return classify(text).kind is FailureKind.OUT_OF_MEMORY or _SERVER_WORDS.search(text) is not None


def memory_line(text: str) -> str:
    """Return the line that says so."""
    if found := _SERVER_WORDS.search(text):
        start, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
        return text[start : end if end >= 0 else None].strip()
    return classify(text).message


def read_log(text: str) -> LogFacts:
    """Return the last of each number."""
    weights = [match for pattern in _IN_FORCE for match in pattern.findall(text)]
    rooms = _ROOM.findall(text)
    blocks = [(int(counted), int(told)) for counted, told in _OVERRIDE.findall(text)]
    loading = _LOADING.findall(text)
    return LogFacts(
        weight=int(weights[-1].replace(",", "")) if weights else None,
        room_ratio=blocks[-1][0] / max(1, blocks[-1][1]) if blocks else None,
        room_tokens=int(rooms[-1].replace(",", "")) if rooms else None,
        weight_bytes=_bytes(*loading[-1]) if loading else None,
        missing_bytes=missing_bytes(text),
    )


def missing_bytes(text: str) -> int | None:
    """Return by how much the last allocation that failed was larger than what was free; None: it is not said."""
    tried = _TRIED.findall(text)
    if not tried:
        return None
    free = _FREE.findall(text)
    return max(0, _bytes(*tried[-1]) - (_bytes(*free[-1]) if free else 0))


def _bytes(amount: str, unit: str) -> int:
    return round(float(amount) * _UNITS[unit])
