"""The ten measured LLMs and their architectures, as published (data/llms.csv).

Source: llm_features.csv of IBM/LLM-performance-prediction (Lazuka et al., 2024).
"""

import csv
from dataclasses import dataclass
from importlib import resources

from llmpilot_perfmodel.llm_spec import LlmSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLlm:
    """An LLM of the bundled dataset."""

    name: str
    """As in the dataset, e.g. llama-13b."""
    aliases: tuple[str, ...]
    """Hugging Face ids of the same LLM, other than `name`."""
    spec: LlmSpec


def load_measured_llms() -> dict[str, MeasuredLlm]:
    """Return the measured LLMs by name."""
    text = resources.files("llmpilot_recommender").joinpath("data/llms.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row["name"]: _measured_llm(row) for row in rows}


def _measured_llm(row: dict[str, str]) -> MeasuredLlm:
    return MeasuredLlm(
        name=row["name"],
        aliases=tuple(filter(None, row["aliases"].split(";"))),
        spec=LlmSpec(
            model_type=row["model_type"],
            is_encoder_decoder=row["is_encoder_decoder"] == "true",
            parameter_count=int(row["parameter_count"]),
            layer_count=int(row["layer_count"]),
            head_count=int(row["head_count"]),
            vocabulary_size=int(row["vocabulary_size"]),
            max_position_count=_optional_int(row["max_position_count"]),
            uses_flash_attention=row["uses_flash_attention"] == "true",
            relative_attention_max_distance=_optional_int(row["relative_attention_max_distance"]),
            relative_attention_bucket_count=_optional_int(row["relative_attention_bucket_count"]),
            torch_dtype=row["torch_dtype"],
        ),
    )


def _optional_int(cell: str) -> int | None:
    return int(cell) if cell else None
