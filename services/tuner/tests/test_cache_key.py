"""What a kept result depends on: everything but names, paths and patience."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from llmpilot_tuner.domain.cache_key import cache_key
from llmpilot_tuner.domain.probing import ProbeFacts, ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec

SPEC = TuningSpec(
    config_json='{"model_type": "llama", "hidden_size": 128}',
    gpu_memory_bytes=40 * 2**30,
    reserved_bytes=2**30,
    longest_sequence=2048,
    most_new_tokens=1024,
    most_requests=256,
)
FACTS = ProbeFacts(
    kind=ProbeKind.TORCH,
    device="NVIDIA A100-SXM4-40GB",
    capacity_bytes=39 * 2**30,
    weight_bytes=16 * 10**9,
    versions=(("torch", "2.13.0"), ("driver", "550.54")),
)
SPEC_CHANGES: dict[str, Any] = {
    "config_json": '{"model_type": "llama", "hidden_size": 256}',
    "model_folder": Path("weights"),
    "probe": ProbeKind.CPU,
    "server": Server.VLLM,
    "gpu_count": 2,
    "gpu_memory_bytes": 24 * 2**30,
    "reserved_bytes": 0,
    "precision_name": "bf16",
    "eager_attention": True,
    "longest_sequence": 1024,
    "most_new_tokens": 512,
    "most_requests": 128,
    "prefill_limit": 4096,
    "prompt_logprobs": True,
    "granule": 16,
    "precision": 0.02,
    "soak_steps": 10,
    "seed": 1,
    "target": ServerTarget(url="http://host:8000"),
}
FACT_CHANGES: dict[str, Any] = {
    "kind": ProbeKind.DRY,
    "device": "NVIDIA H100 80GB HBM3",
    "capacity_bytes": 38 * 2**30,
    "weight_bytes": 15 * 10**9,
    "versions": (("torch", "2.13.0"), ("driver", "560.35")),
}
SAME_SPEC: dict[str, Any] = {"llm_name": "other", "gpu_name": "A100-40GB", "step_seconds": 7.0}
SAME_FACTS: dict[str, Any] = {"notes": ("could not do that",)}


def test_every_field_of_a_specification_is_known_to_count_or_not() -> None:
    assert {field.name for field in fields(TuningSpec)} == set(SPEC_CHANGES) | set(SAME_SPEC)
    assert {field.name for field in fields(ProbeFacts)} == set(FACT_CHANGES) | set(SAME_FACTS)


@pytest.mark.parametrize("name", SPEC_CHANGES)
def test_another_specification_has_another_key(name: str) -> None:
    assert cache_key(replace(SPEC, **{name: SPEC_CHANGES[name]}), FACTS) != cache_key(SPEC, FACTS)


@pytest.mark.parametrize("name", FACT_CHANGES)
def test_another_machine_has_another_key(name: str) -> None:
    assert cache_key(SPEC, replace(FACTS, **{name: FACT_CHANGES[name]})) != cache_key(SPEC, FACTS)


def test_names_and_patience_do_not_count() -> None:
    assert cache_key(replace(SPEC, **SAME_SPEC), replace(FACTS, **SAME_FACTS)) == cache_key(SPEC, FACTS)


def test_how_a_config_json_is_written_does_not_count() -> None:
    turned = json.dumps(dict(reversed(json.loads(SPEC.config_json).items())), indent=4)
    assert turned != SPEC.config_json
    assert cache_key(replace(SPEC, config_json=turned), FACTS) == cache_key(SPEC, FACTS)


def test_the_order_of_versions_does_not_count() -> None:
    turned = replace(FACTS, versions=tuple(reversed(FACTS.versions)))
    assert cache_key(SPEC, turned) == cache_key(SPEC, FACTS)


def test_where_real_weights_lie_does_not_count() -> None:
    here, there = (replace(SPEC, model_folder=Path(name)) for name in ("here", "there"))
    assert cache_key(here, FACTS) == cache_key(there, FACTS)


def test_a_key_is_a_name_that_a_file_can_have() -> None:
    assert len(cache_key(SPEC, FACTS)) == 64
    assert set(cache_key(SPEC, FACTS)) <= set("0123456789abcdef")
