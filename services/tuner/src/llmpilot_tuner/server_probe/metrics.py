"""Reads the text that Prometheus collects from a server.

Invariant: what cannot be read is not there.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One number."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(text: str) -> Iterator[Sample]:
    """Give every number of a page."""
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        try:
            value = float(found["value"])
        except ValueError:
            continue
        yield Sample(name=found["name"], labels=dict(_LABEL.findall(found["labels"] or "")), value=value)


def largest(text: str, name: str) -> float | None:
    """Return the largest number of this name; None: there is none."""
    return max((sample.value for sample in samples(text) if sample.name == name), default=None)


def vllm_cache_tokens(text: str) -> int | None:
    """Return the tokens that vLLM's KV blocks have room for, of the engine that has fewest; None: it does not say."""
    found = []
    for sample in samples(text):
        if sample.name == "vllm:cache_config_info":
            labels = sample.labels
            tokens, blocks, size = (labels.get(n, "") for n in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
            if tokens.isdigit():  # newer servers say it themselves
                found.append(int(tokens))
            elif blocks.isdigit() and size.isdigit():
                found.append(int(blocks) * int(size))
    return min(found, default=None)
