"""What LLM-Pilot knows of an LLM before anybody has run it: the features of Sec. IV-B1, Lazuka et al., 2024.

Invariant: a spec without violations can be turned into features, sized and put on the wire without a further check.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmpilot_contracts.errors import Violation

MODEL_TYPE_PATTERN = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
DTYPE_PATTERN = re.compile(r"float32|float16|bfloat16|float8_[a-z0-9]{1,16}")

LAYER_COUNT_RANGE = (1, 1_000)
HEAD_COUNT_RANGE = (1, 1_024)
VOCABULARY_SIZE_RANGE = (1, 10**7)
PARAMETER_COUNT_RANGE = (10**6, 10**13)
POSITION_COUNT_RANGE = (1, 10**8)
RELATIVE_ATTENTION_RANGE = (1, 10**6)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmSpec:
    """The architecture of an LLM, field for field `llmpilot.catalog.v1.LlmSpec`."""

    model_type: str
    """Family as Hugging Face's config.json names it, e.g. "llama" or "t5"."""
    is_encoder_decoder: bool
    parameter_count: int
    """Weights in total, all experts included; tied embeddings once."""
    layer_count: int
    """Of the decoder and, for an encoder-decoder, of each of the two halves."""
    head_count: int
    """Query heads per layer."""
    vocabulary_size: int
    max_position_count: int | None
    """None: positions have no limit, or none is stated."""
    uses_flash_attention: bool
    relative_attention_max_distance: int | None
    relative_attention_bucket_count: int | None
    torch_dtype: str
    """Data type of the published weights."""

    def violations(self) -> tuple[Violation, ...]:
        """Return everything that no real LLM has, one violation per field."""
        return tuple(self._violations())

    def _violations(self) -> Iterator[Violation]:
        if not MODEL_TYPE_PATTERN.fullmatch(self.model_type):
            yield Violation("model_type", f'must be a short name such as "llama", is {self.model_type[:80]!r}')
        sizes: tuple[tuple[str, int | None, tuple[int, int]], ...] = (
            ("parameter_count", self.parameter_count, PARAMETER_COUNT_RANGE),
            ("layer_count", self.layer_count, LAYER_COUNT_RANGE),
            ("head_count", self.head_count, HEAD_COUNT_RANGE),
            ("vocabulary_size", self.vocabulary_size, VOCABULARY_SIZE_RANGE),
            ("max_position_count", self.max_position_count, POSITION_COUNT_RANGE),
            ("relative_attention_max_distance", self.relative_attention_max_distance, RELATIVE_ATTENTION_RANGE),
            ("relative_attention_bucket_count", self.relative_attention_bucket_count, RELATIVE_ATTENTION_RANGE),
        )
        for field, value, (minimum, maximum) in sizes:
            if value is not None and not minimum <= value <= maximum:
                yield Violation(field, f"must be between {minimum:,} and {maximum:,}, is {value:,}")
        if not DTYPE_PATTERN.fullmatch(self.torch_dtype):
            known = '"float32", "float16", "bfloat16" or a "float8_..." type'
            yield Violation("torch_dtype", f"must be {known}, is {self.torch_dtype[:80]!r}")
