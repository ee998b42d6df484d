"""Features of an LLM, a GPU profile and a load as the columns of a regressor: Sec. IV-B1, Lazuka et al., 2024.

Categories are one-hot over those of the training data; a category never seen is all zeros. Missing numbers are NaN,
which XGBoost handles itself. Invariant: the names alone rebuild the schema, so a model's manifest is enough to use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec

USERS = "users_count"
LLM_NUMBERS = (
    "parameter_count",
    "is_encoder_decoder",
    "layer_count",
    "head_count",
    "vocabulary_size",
    "max_position_count",
    "uses_flash_attention",
    "relative_attention_max_distance",
    "relative_attention_bucket_count",
)
LLM_CATEGORIES = ("model_type", "torch_dtype")
GPU_NUMBERS = (
    "tensor_core_count",
    "rt_core_count",
    "cuda_core_count",
    "sm_count",
    "rop_count",
    "tmu_count",
    "cuda_mixed_tflops",
    "cuda_fp32_tflops",
    "cuda_fp64_tflops",
    "tensor_bf16_tflops",
    "tensor_fp16_tflops",
    "tensor_fp32_tflops",
    "tensor_tf32_tflops",
    "tensor_fp64_tflops",
    "memory_bytes",
    "memory_bandwidth_gb_per_second",
    "pcie_generation",
    "compute_capability",
    "is_sxm",
    "is_nvlink",
)
GPU_CATEGORIES = ("architecture",)
PROFILE_NUMBERS = ("gpu_count", "total_memory_bytes")


@dataclass(frozen=True, kw_only=True)
class FeatureSchema:
    """Which columns there are; the numbers are fixed, the categories come from the training data."""

    names: tuple[str, ...]

    @classmethod
    def covering(cls, specs: Sequence[LlmSpec], profiles: Sequence[GpuProfile]) -> "FeatureSchema":
        """Return the schema with every category of these LLMs and GPUs."""
        gpus = [profile.gpu for profile in profiles]
        return cls(
            names=(
                *LLM_NUMBERS,
                *(f"{name}={value}" for name in LLM_CATEGORIES for value in sorted({getattr(s, name) for s in specs})),
                *GPU_NUMBERS,
                *(f"{name}={value}" for name in GPU_CATEGORIES for value in sorted({getattr(g, name) for g in gpus})),
                *PROFILE_NUMBERS,
                USERS,
            )
        )

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "FeatureSchema":
        """Return the schema of a manifest; raises InvalidInputError for columns this version cannot make."""
        known = {*LLM_NUMBERS, *GPU_NUMBERS, *PROFILE_NUMBERS, USERS}
        categories = {*LLM_CATEGORIES, *GPU_CATEGORIES}
        unknown = [
            name for name in names if name not in known and not ("=" in name and name.split("=")[0] in categories)
        ]
        missing = sorted(known - set(names))
        problems = [f"{name!r} is unknown to this version" for name in unknown] + [
            f"{name!r} is missing" for name in missing
        ]
        if len(set(names)) < len(names):
            problems.append("a name is repeated")
        if problems:
            raise InvalidInputError(Violation("manifest.features", f"{problem}; train again") for problem in problems)
        return cls(names=tuple(names))

    def encode(self, spec: LlmSpec, profiles: Sequence[GpuProfile], users_counts: Sequence[int]) -> NDArray[np.float32]:
        """Return one row per profile and number of users, users varying fastest: (profiles * users, features)."""
        rows = np.empty((len(profiles), len(users_counts), len(self.names)), dtype=np.float32)
        rows[..., self._llm_columns] = _values(spec, self._llm_names)
        for index, profile in enumerate(profiles):
            rows[index, :, self._gpu_columns] = self._gpu_values(profile)[:, np.newaxis]
        rows[..., self._column_of[USERS]] = users_counts
        return rows.reshape(-1, len(self.names))

    def monotone_constraints(self) -> str:
        """Return XGBoost's parameter: latencies never fall as users are added."""
        return "(" + ",".join("1" if name == USERS else "0" for name in self.names) + ")"

    @cached_property
    def _column_of(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.names)}

    @cached_property
    def _llm_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in LLM_NUMBERS or name.split("=")[0] in LLM_CATEGORIES)

    @cached_property
    def _llm_columns(self) -> NDArray[np.intp]:
        return np.array([self._column_of[name] for name in self._llm_names])

    @cached_property
    def _gpu_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in GPU_NUMBERS or name.split("=")[0] in GPU_CATEGORIES)

    @cached_property
    def _gpu_columns(self) -> NDArray[np.intp]:
        return np.array([self._column_of[name] for name in (*self._gpu_names, *PROFILE_NUMBERS)])

    @cached_property
    def _gpu_cache(self) -> dict[GpuProfile, NDArray[np.float32]]:
        return {}

    def _gpu_values(self, profile: GpuProfile) -> NDArray[np.float32]:
        if profile not in self._gpu_cache:
            of_profile = np.array([profile.gpu_count, profile.memory_bytes], dtype=np.float32)
            self._gpu_cache[profile] = np.concatenate([_values(profile.gpu, self._gpu_names), of_profile])
        return self._gpu_cache[profile]


def _values(source: object, names: Sequence[str]) -> NDArray[np.float32]:
    return np.array([_value(source, name) for name in names], dtype=np.float32)


def _value(source: object, name: str) -> float:
    attribute, is_category, category = name.partition("=")
    value = getattr(source, attribute)
    if is_category:
        return float(value == category)
    return np.nan if value is None else float(value)
