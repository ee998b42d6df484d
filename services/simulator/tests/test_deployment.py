from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError
from llmpilot_perfmodel.batching.policies import TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_simulator.cli_options import POLICIES
from llmpilot_simulator.deployment import POLICY_NAMES, DeploymentRequest, deploy, read_llm


def wanted(
    *,
    llm: str = "llama-2-13b",
    gpu_profile: str = "1xA100-40GB",
    policy: str = "tgis",
    max_batch_weight: int | None = None,
    precision: str | None = None,
) -> DeploymentRequest:
    return DeploymentRequest(
        llm=llm, gpu_profile=gpu_profile, policy=policy, max_batch_weight=max_batch_weight, precision=precision
    )


def test_the_help_names_every_policy() -> None:
    assert ", ".join(POLICY_NAMES) == POLICIES


def test_the_batch_weight_is_the_largest_safe_one_unless_told_otherwise() -> None:
    deployment = deploy(wanted())
    assert isinstance(deployment.policy, TgisPolicy)
    assert deployment.policy.max_batch_weight == deployment.budget.safe_batch_weight
    assert deployment.out_of_memory_tokens is None


def test_an_unsafe_batch_weight_runs_out_of_memory() -> None:
    deployment = deploy(wanted(max_batch_weight=15_000))
    assert deployment.out_of_memory_tokens is not None
    assert deployment.budget.largest_batch_weight <= deployment.out_of_memory_tokens < 15_000
    assert "that are safe" in deployment.notes(explain=False)[0]


def test_a_batch_weight_larger_than_the_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(PreconditionError, match=r"30,000 tokens needs 24.58 GB"):
        deploy(wanted(max_batch_weight=30_000))


@pytest.mark.parametrize(
    ("policy", "kind"), [("tgi", TgiPolicy), ("vllm-0.2", Vllm0Policy), ("vllm", Vllm1Policy), ("tgis", TgisPolicy)]
)
def test_every_policy_can_be_chosen(policy: str, kind: type[object]) -> None:
    assert isinstance(deploy(wanted(policy=policy)).policy, kind)


def test_an_llm_without_flash_attention_is_served_in_padded_batches() -> None:
    policy = deploy(wanted(llm="flan-t5-xxl")).policy
    assert isinstance(policy, TgisPolicy)
    assert policy.is_padded


def test_the_weight_of_padded_batches_is_such_that_as_many_requests_as_there_may_be_fit_into_the_memory() -> None:
    """256 requests of 101 tokens; the setting of the server in the public load tests was 3,279,584."""
    deployment = deploy(wanted(llm="mpt-7b-instruct2"))
    assert deployment.batch_weight == deployment.safe_batch_weight == deployment.budget.safe_batch_weight**2 // 256
    assert deployment.batch_weight == pytest.approx(3_279_584, rel=0.25)
    assert deployment.out_of_memory_tokens is None
    assert "requests x longest^2 tokens" in deployment.notes(explain=False)[0]


def test_the_largest_of_the_published_requests_is_let_in_even_if_many_at_once_run_out_of_memory() -> None:
    deployment = deploy(wanted(llm="flan-t5-xxl"))
    assert deployment.batch_weight == 1255**2 > deployment.safe_batch_weight
    assert deployment.out_of_memory_tokens == deployment.budget.largest_batch_weight


def test_a_padded_batch_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"a batch of 160,000 tokens needs"):
        deploy(wanted(llm="flan-t5-xxl", max_batch_weight=10**8))


def test_an_llm_that_does_not_fit_is_refused_with_where_the_memory_would_go() -> None:
    with pytest.raises(PreconditionError, match=r"(?s)does not fit on 1xT4-16GB.*26.03 GB weights"):
        deploy(wanted(gpu_profile="1xT4-16GB"))


def test_a_smaller_precision_makes_it_fit() -> None:
    assert deploy(wanted(gpu_profile="1xT4-16GB", precision="int4")).budget.fits


def test_unknown_names_are_refused_with_close_ones() -> None:
    with pytest.raises(NotFoundError, match=r"did you mean meta-llama/Llama-2-13b"):
        deploy(wanted(llm="llama-2-13"))
    with pytest.raises(NotFoundError, match="did you mean 1xA100-40GB"):
        deploy(wanted(gpu_profile="1xA100-40"))
    with pytest.raises(InvalidInputError, match=r"must be one of tgis, tgi, vllm-0.2, vllm"):
        deploy(wanted(policy="sglang"))
    with pytest.raises(InvalidInputError, match="fp32, fp16, bf16"):
        deploy(wanted(precision="int3"))


def test_a_config_json_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-llm"
    folder.mkdir()
    (folder / "config.json").write_text(bundled_config("llama-3.1-8b"), "utf-8")
    assert read_llm(str(folder))[0] == "my-llm"
    assert read_llm(str(folder / "config.json"))[1].spec.parameter_count == 8_030_261_248


def test_a_missing_or_unreadable_config_json_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere.json"):
        read_llm(str(tmp_path / "nowhere.json"))
    binary = tmp_path / "config.json"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        read_llm(str(binary))


def test_where_the_step_times_come_from_is_said() -> None:
    assert "step times: calibrated on public load tests of llama-13b" in deploy(wanted()).notes(explain=False)[1]
    assert "roofline" in deploy(wanted(llm="llama-3.1-8b")).step_source
    assert "experts of one token" in deploy(wanted(llm="mixtral-8x7b-v0.1", gpu_profile="4xA100-40GB")).step_source
    assert "a fifth off" in deploy(wanted(llm="mpt-7b-instruct2", gpu_profile="2xH100-80GB")).step_source
