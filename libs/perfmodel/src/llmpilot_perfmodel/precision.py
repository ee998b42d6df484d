"""The number formats that weights and caches are kept in.

Invariant: quantization changes the matrices of the layers only; embeddings, output head and norms keep the format of
the activations. Sources: the `quantization_config` of Hugging Face's transformers; GPTQ (Frantar et al., 2022) and AWQ
(Lin et al., 2023) for groups with a 16-bit scale and a zero point; OCP Microscaling Formats v1.0, 2023, for mxfp4.
"""

from dataclasses import dataclass

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.config_reader import ConfigReader


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


def precision_named(name: str) -> Precision:
    """Return a precision by name; raise `InvalidInputError` that lists the known ones."""
    if name not in PRECISIONS:
        raise InvalidInputError([Violation("precision", f"must be one of {', '.join(PRECISIONS)}, is {name[:40]!r}")])
    return PRECISIONS[name]


def stated_precision(reader: ConfigReader, torch_dtype: str) -> Precision:
    """Return what a config.json says its weights are served in.

    Published 32-bit weights are served in 16 bits, as every server does unless told otherwise.
    """
    section = reader.section("quantization_config")
    if section is None:
        return PRECISIONS["bf16" if torch_dtype == "bfloat16" else "fp8" if "float8" in torch_dtype else "fp16"]
    quantization = ConfigReader(section)
    method = quantization.word("quant_method") or "unknown"
    name = _stated_name(quantization, method)
    for violation in quantization.violations:
        reader.refuse(violation.field.replace("config_json", "quantization_config", 1), violation.description)
    if name is None:
        reader.refuse(
            "quantization_config.quant_method",
            f"is not understood: {method[:40]!r}; leave quantization_config out and name the precision instead",
        )
        return PRECISIONS["fp16"]
    return PRECISIONS[name]


def _stated_name(quantization: ConfigReader, method: str) -> str | None:
    if method in ("fp8", "mxfp4"):
        return method
    if method == "bitsandbytes":
        return "int4" if quantization.flag("load_in_4bit", "_load_in_4bit", default=False) else "int8"
    if method in ("gptq", "awq"):
        bits = quantization.count("bits", "w_bit", maximum=16)
        return _NAME_OF_BITS.get(bits or 4)
    if method == "compressed-tensors":
        return _compressed_name(quantization)
    return None


def _compressed_name(quantization: ConfigReader) -> str | None:
    groups = quantization.section("config_groups") or {}
    for group in groups.values():
        weights = ConfigReader(group).section("weights") if isinstance(group, dict) else None
        if weights is not None:
            reader = ConfigReader(weights)
            bits = reader.count("num_bits", maximum=16) or 0
            return "fp8" if bits == 8 and reader.word("type") == "float" else _NAME_OF_BITS.get(bits)  # noqa: PLR2004
    return None
