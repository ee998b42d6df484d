from dataclasses import replace

import pytest

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.cli_request import error_in_options, in_options, requested_spec
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    LoadTestSpec,
    PromptRequests,
    Protocol,
    Requests,
    Stage,
    SyntheticRequests,
    Target,
    WorkloadRequests,
)
from llmpilot_loadtester.wire_spec import read_spec

SPEC = LoadTestSpec(
    target=Target(
        url="https://host:1/prefix",
        protocol=Protocol.OPENAI_CHAT,
        served_model="model",
        api_key="sk-1",
        headers=(("X-Team", "blue"), ("X-Other", "")),
        ca_certificates_pem="-----BEGIN CERTIFICATE-----",
        request_timeout_seconds=5.0,
        connect_timeout_seconds=6.0,
    ),
    requests=SyntheticRequests(input_tokens=1, output_tokens=2, seed=3),
    stages=(Stage(load=Load(kind=LoadKind.POISSON, rate_per_second=2.0), warm_up_seconds=1.0, measure_seconds=2.0),),
    seed=4,
    worker_count=5,
    llm_name="mine",
    gpu_profile="1xA100-40GB",
    reply_tokenizer_json=b'{"model": {}}',
)


@pytest.mark.parametrize(
    "requests",
    [
        SPEC.requests,
        PromptRequests(jsonl=b'{"prompt": "p"}\n', output_tokens=7, fixed_output_length=False),
        WorkloadRequests(
            workload_model="conversation",
            seed=1,
            conditions=("input_tokens <= 874",),
            value_choice="centre",
            scales=(("output_tokens", 0.5),),
            tokenizer_json=b'{"model": {"type": "BPE"}}',
            shared_prefix_ratio=0.5,
            prefix_group_count=3,
        ),
    ],
)
def test_what_is_asked_for_is_whole(requests: Requests) -> None:
    spec = replace(SPEC, requests=requests)
    violations: list[Violation] = []
    assert read_spec(requested_spec(spec, llm_config_json=""), violations) == spec
    assert violations == []


def test_the_config_of_an_llm_goes_with_its_name() -> None:
    wire = requested_spec(SPEC, llm_config_json="{}")
    assert (wire.llm.name, wire.llm.config_json) == ("mine", "{}")


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("spec.target.headers[2].name", "--header"),
        ("spec.target.url", "--target"),
        ("spec.stages[3].load.user_steps[1].users_count", "--users"),
        ("spec.workload.sampling.workload_model", "--profile"),
        ("spec.workload.sampling.scales[0].factor", "--scale"),
        ("spec.llm.spec.layer_count", "--llm"),
        ("load_test_id", "--name"),
    ],
)
def test_a_field_is_told_by_its_option(field: str, option: str) -> None:
    assert in_options(f"{field}: must be > 0") == f"{option}: must be > 0"


def test_a_field_without_an_option_keeps_its_name() -> None:
    assert in_options("spec.novelty: must be > 0") == "spec.novelty: must be > 0"


def test_one_option_is_told_once() -> None:
    """--seed sets that of the requests and that of the arrivals."""
    problem = "must be >= 0, is -1"
    error = InvalidInputError([Violation("spec.synthetic.seed", problem), Violation("spec.seed", problem)])
    assert error_in_options(error).violations == (Violation("--seed", problem),)
