"""Turns the measured times of an LLM's layers into the tables that `step_seconds` reads.

Invariant: a profile that loads was read whole, and a step that was measured costs what was measured.
Source of the layout: the profiler of casys-kaist/LLMServingSim, which times the CUDA kernels of one layer inside vLLM.
A folder holds dense.csv, per_sequence.csv and attention.csv of one of the GPUs of a server; meta.yaml is in the folder
above.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.csv_table import read_table
from llmpilot_perfmodel.steps.layer_tables import AttentionGrid, Curve, Floats, read_attention, read_curves
from llmpilot_perfmodel.steps.step_time import ProfileSizes, StepTables

_BLOCK_LAYERS = {
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
"""How often a decoder block runs them; its attention has a table of its own."""
_OPTIONAL_LAYERS = ("qk_norm",)
_OUTER_LAYERS = {"embedding": 1, "final_layernorm": 1}
_HEAD_LAYERS = {"lm_head": 1, "sampler": 1}
_ALL_REDUCES_OF_A_BLOCK = 2
"""After o_proj and after down_proj (Shoeybi et al., Megatron-LM, 2019)."""
_META_PATTERN = re.compile(r"^(vllm_version|gpu|model|profiled_at):[ \t]*'?([^'\r\n]*)'?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelism:
    """How the GPUs of a server that splits every layer add up their results: in a ring."""

    gpu_count: int
    bytes_per_second: float
    """What a GPU sends to the next."""
    hidden_size: int
    bytes_per_value: int = 2
    all_reduce_seconds: float = 0.0
    """Of one all-reduce, whatever its size."""

    def violations(self) -> Iterator[Violation]:
        """Yield everything that no server has."""
        for name in ("gpu_count", "hidden_size", "bytes_per_value"):
            if getattr(self, name) < 1:
                yield Violation(name, f"must be >= 1, is {getattr(self, name)}")
        if not 0 < self.bytes_per_second < math.inf:
            yield Violation("bytes_per_second", f"must be finite and > 0, is {self.bytes_per_second}")
        if not 0 <= self.all_reduce_seconds < math.inf:
            yield Violation("all_reduce_seconds", f"must be finite and >= 0, is {self.all_reduce_seconds}")

    def block_seconds(self, tokens: Floats) -> Floats:
        """Return the seconds that a decoder block spends on the all-reduces of so many tokens."""
        if self.gpu_count == 1:
            return np.zeros_like(tokens)
        sent_bytes = 2 * (self.gpu_count - 1) / self.gpu_count * self.hidden_size * self.bytes_per_value * tokens
        return _ALL_REDUCES_OF_A_BLOCK * (sent_bytes / self.bytes_per_second + self.all_reduce_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """The step times of an LLM on a GPU profile, measured layer by layer."""

    tables: StepTables
    source: str
    """What was measured, with what, where and when, as far as meta.yaml says it."""


def load_layer_profile(folder: Path, *, layer_count: int, parallelism: TensorParallelism | None = None) -> LayerProfile:
    """Read a profile; layer_count: decoder blocks of the LLM.

    Raises `InvalidInputError` with everything that is wrong with the arguments and with any of the files.
    """
    violations: list[Violation] = list(parallelism.violations() if parallelism else ())
    if layer_count < 1:
        violations.append(Violation("layer_count", f"must be >= 1, is {layer_count}"))
    inner = tuple(layer for layer in _BLOCK_LAYERS if layer not in _OPTIONAL_LAYERS)
    with _collected(violations):
        dense = read_curves(
            folder / "dense.csv", axis="tokens", required=(*_OUTER_LAYERS, *inner), optional=_OPTIONAL_LAYERS
        )
    with _collected(violations):
        head = read_curves(folder / "per_sequence.csv", axis="sequences", required=tuple(_HEAD_LAYERS), optional=())
    with _collected(violations):
        attention = read_attention(folder / "attention.csv")
    if violations:
        raise InvalidInputError(violations)
    block, outer, last = _sum(dense, _BLOCK_LAYERS), _sum(dense, _OUTER_LAYERS), _sum(head, _HEAD_LAYERS)
    if parallelism is not None:
        block = Curve(nodes=block.nodes, seconds=block.seconds + parallelism.block_seconds(block.nodes))
    all_layers = Curve(nodes=block.nodes, seconds=layer_count * block.seconds + outer.seconds)
    return LayerProfile(tables=_tables(all_layers, last, attention, layer_count), source=_source(folder))


def _tables(layers: Curve, head: Curve, attention: AttentionGrid, layer_count: int) -> StepTables:
    layers, head = _prolonged(layers), _prolonged(head)
    axes = (attention.chunks, attention.prefill_cached, attention.sequences, attention.decode_cached)
    parts = (layers.nodes, layers.seconds, head.nodes, head.seconds, *axes, layer_count * attention.seconds.ravel())
    return StepTables(
        constants=(0.0,) * 8,
        sizes=ProfileSizes(len(layers.nodes), len(head.nodes), *(len(nodes) for nodes in axes)),
        profile=np.concatenate(parts),
    )


@contextmanager
def _collected(violations: list[Violation]) -> Iterator[None]:
    try:
        yield
    except InvalidInputError as error:
        violations.extend(error.violations)


def _sum(curves: Mapping[str, Curve], counts: Mapping[str, int]) -> Curve:
    present = [(count, curves[layer]) for layer, count in counts.items() if layer in curves]
    return Curve(nodes=present[0][1].nodes, seconds=np.sum([count * curve.seconds for count, curve in present], axis=0))


def _prolonged(curve: Curve) -> Curve:
    """Return the curve with a node more, on the line through the last one and the one at half of it.

    Beyond its last node a curve is a straight line; the last two nodes alone may be neighbours a few tokens apart.
    """
    nodes, seconds = curve.nodes, curve.seconds
    half = int(np.searchsorted(nodes[:-1], nodes[-1] / 2, side="right")) - 1
    half = max(half, 0)
    slope = max(0.0, (seconds[-1] - seconds[half]) / (nodes[-1] - nodes[half]))
    return Curve(nodes=np.append(nodes, 2 * nodes[-1]), seconds=np.append(seconds, seconds[-1] + slope * nodes[-1]))


def _source(folder: Path) -> str:
    path = folder.parent / "meta.yaml"
    if not path.is_file():
        return "layer profile without meta.yaml"
    meta = dict(_META_PATTERN.findall(read_table(path)))
    known = {name: meta.get(name) or "unknown" for name in ("model", "gpu", "vllm_version", "profiled_at")}
    return "{model} on {gpu}, layers timed in vLLM {vllm_version}, {profiled_at}".format_map(known)
