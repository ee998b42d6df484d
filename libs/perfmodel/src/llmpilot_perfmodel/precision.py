"""The number formats that weights and caches are kept in.

Invariant: quantization changes the matrices of the layers only; embeddings, output head and norms keep the format of
the activations. Sources: the `quantization_config` of Hugging Face's transformers; GPTQ (Frantar et al., 2022) and AWQ
(Lin et al., 2023) for groups with a 16-bit scale and a zero point; OCP Microscaling Formats v1.0, 2023, for mxfp4.
"""

from dataclasses import dataclass, replace

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.config_reader import FIELD, ConfigReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A number format of weights."""

    name: str
    weight_bits: float
    """Per weight of a layer's matrices, its share of scales and zero points included."""
    activation_bits: int
    """Of activations, embeddings, output head, norms and, unless told otherwise, the cache."""
    experts_only: bool = False
    """Whether the attention of a mixture of experts keeps the format of the activations."""

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight of a layer's matrices."""
        return self.weight_bits / 8

    @property
    def activation_bytes(self) -> int:
        """Bytes per activation."""
        return self.activation_bits // 8


_GROUP_SIZE = 128
_SCALE_BITS = 16

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", weight_bits=32, activation_bits=32),
        Precision(name="fp16", weight_bits=16, activation_bits=16),
        Precision(name="bf16", weight_bits=16, activation_bits=16),
        Precision(name="fp8", weight_bits=8, activation_bits=16),
        Precision(name="int8", weight_bits=8, activation_bits=16),
        Precision(name="int4", weight_bits=4 + (_SCALE_BITS + 4) / _GROUP_SIZE, activation_bits=16),
        Precision(name="mxfp4", weight_bits=4 + 8 / 32, activation_bits=16, experts_only=True),
    )
}

_NAME_OF_BITS = {4: "int4", 8: "int8"}
_NAME_OF_METHOD = {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4"}
_LARGEST_BITS = 64
_LARGEST_GROUP = 2**20


def precision_named(name: str) -> Precision:
    """Return a precision by name; raise `InvalidInputError` that lists the known ones."""
    if name not in PRECISIONS:
        raise InvalidInputError([Violation("precision", f"must be one of {', '.join(PRECISIONS)}, is {name[:40]!r}")])
    return PRECISIONS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedPrecision:
    """What a config.json says its weights are served in."""

    precision: Precision
    violations: tuple[Violation, ...]
    """Why its quantization is not understood; `precision` is then a guess that must not be used."""


def stated_precision(quantization_config: dict[str, object] | None, torch_dtype: str) -> StatedPrecision:
    """Return what a config.json says its weights are served in.

    Published 32-bit weights are served in 16 bits, as every server does unless told otherwise.
    """
    if quantization_config is None:
        name = "bf16" if torch_dtype == "bfloat16" else "fp8" if "float8" in torch_dtype else "fp16"
        return StatedPrecision(precision=PRECISIONS[name], violations=())
    reader = ConfigReader(quantization_config)
    precision = _quantized(reader)
    violations = tuple(
        Violation(violation.field.replace(FIELD, f"{FIELD}.quantization_config", 1), violation.description)
        for violation in reader.violations
    )
    return StatedPrecision(precision=precision, violations=violations)


def _quantized(quantization: ConfigReader) -> Precision:
    """Return what a `quantization_config` says; a violation, and any precision, where it is not understood."""
    method = quantization.word("quant_method") or ""
    match method:
        case "gptq" | "awq":
            return _grouped(quantization, quantization.count("bits", "w_bit", maximum=_LARGEST_BITS) or 4)
        case "bitsandbytes":
            is_4_bit = quantization.flag("load_in_4bit", "_load_in_4bit", default=False)
            return PRECISIONS["int4" if is_4_bit else "int8"]
        case "compressed-tensors":
            return _compressed(quantization)
        case _ if method in _NAME_OF_METHOD:
            return PRECISIONS[_NAME_OF_METHOD[method]]
    known = ", ".join(("gptq", "awq", "bitsandbytes", "compressed-tensors", *_NAME_OF_METHOD))
    quantization.refuse(
        "quant_method",
        f"must be one of {known}, is {method[:40]!r}; else name the precision",
    )
    return PRECISIONS["fp16"]


def _grouped(quantization: ConfigReader, bits: int) -> Precision:
    """Return integers of so many bits with a scale and a zero point for every group of weights."""
    group_size = quantization.count("group_size", "q_group_size", minimum=-1, maximum=_LARGEST_GROUP)
    precision = _integers(quantization, "bits", bits)
    if group_size is None:
        return precision
    return replace(precision, weight_bits=bits + ((_SCALE_BITS + bits) / group_size if group_size > 0 else 0))


def _compressed(quantization: ConfigReader) -> Precision:
    """Return the format of the first group that has its weights quantized."""
    groups = quantization.section("config_groups") or {}
    for group in groups.values():
        section = ConfigReader(group).section("weights") if isinstance(group, dict) else None
        if section is not None:
            weights = ConfigReader(section)
            bits = weights.count("num_bits", maximum=_LARGEST_BITS) or 0
            if bits == 8 and weights.word("type") == "float":  # noqa: PLR2004 fp8
                return PRECISIONS["fp8"]
            return _integers(quantization, "config_groups", bits)
    quantization.refuse("config_groups", "must have a group with weights; it says how they are quantized")
    return PRECISIONS["fp16"]


def _integers(quantization: ConfigReader, field: str, bits: int) -> Precision:
    if bits not in _NAME_OF_BITS:
        quantization.refuse(field, f"must be integers of 4 or 8 bits, or 8-bit floats, are of {bits} bits")
        return PRECISIONS["fp16"]
    return PRECISIONS[_NAME_OF_BITS[bits]]
