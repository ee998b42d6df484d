"""Between the protobuf and the domain form of an LLM's architecture."""

from llmpilot.catalog.v1 import llm_pb2
from llmpilot_perfmodel.llm_spec import LlmSpec


def read_llm_spec(wire: llm_pb2.LlmSpec) -> LlmSpec:
    """Return the spec as sent, unchecked."""
    return LlmSpec(
        model_type=wire.model_type,
        is_encoder_decoder=wire.is_encoder_decoder,
        parameter_count=wire.parameter_count,
        layer_count=wire.layer_count,
        head_count=wire.head_count,
        vocabulary_size=wire.vocabulary_size,
        max_position_count=wire.max_position_count if wire.HasField("max_position_count") else None,
        uses_flash_attention=wire.uses_flash_attention,
        relative_attention_max_distance=wire.relative_attention_max_distance
        if wire.HasField("relative_attention_max_distance")
        else None,
        relative_attention_bucket_count=wire.relative_attention_bucket_count
        if wire.HasField("relative_attention_bucket_count")
        else None,
        torch_dtype=wire.torch_dtype,
    )


def write_llm_spec(spec: LlmSpec) -> llm_pb2.LlmSpec:
    """Return the spec for the wire."""
    return llm_pb2.LlmSpec(
        model_type=spec.model_type,
        is_encoder_decoder=spec.is_encoder_decoder,
        parameter_count=spec.parameter_count,
        layer_count=spec.layer_count,
        head_count=spec.head_count,
        vocabulary_size=spec.vocabulary_size,
        max_position_count=spec.max_position_count,
        uses_flash_attention=spec.uses_flash_attention,
        relative_attention_max_distance=spec.relative_attention_max_distance,
        relative_attention_bucket_count=spec.relative_attention_bucket_count,
        torch_dtype=spec.torch_dtype,
    )
