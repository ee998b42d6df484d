"""What of a specification an LLM, or a server, cannot do is said before anything is computed."""

from dataclasses import replace

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_tuner.domain.plan import plan_of
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec

SPEC = TuningSpec(
    config_json=bundled_config("google/flan-t5-xl"),
    gpu_memory_bytes=80 << 30,
    reserved_bytes=1 << 30,
    longest_sequence=4096,
    most_new_tokens=512,
    most_requests=8,
)


def test_requests_longer_than_the_context_are_refused_but_not_for_relative_positions() -> None:
    plan_of(SPEC)
    with pytest.raises(InvalidInputError, match="longest_sequence: must be <= 2048, the LLM's context, is 4096"):
        plan_of(replace(SPEC, config_json=bundled_config("EleutherAI/gpt-neox-20b")))


def test_vllm_has_no_eager_attention() -> None:
    spec = replace(SPEC, config_json=bundled_config("EleutherAI/gpt-neox-20b"), longest_sequence=2048)
    plan_of(replace(spec, server=Server.VLLM))
    with pytest.raises(InvalidInputError, match="eager_attention: is nothing that vllm has"):
        plan_of(replace(spec, server=Server.VLLM, eager_attention=True))
