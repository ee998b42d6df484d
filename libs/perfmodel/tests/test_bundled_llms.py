import pytest

from llmpilot_contracts.errors import NotFoundError
from llmpilot_perfmodel.bundled_llms import bundled_config, bundled_llms, find_bundled
from llmpilot_perfmodel.llm_config import parse_config


def test_three_llms_are_bundled() -> None:
    assert bundled_llms() == (
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-Small-24B-Base-2501",
        "Qwen/Qwen3-14B",
    )


@pytest.mark.parametrize(
    ("name", "parameter_count"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen3-14b", 14_768_307_200), ("mistral-small-24b-base-2501", 23_572_403_200)],
)
def test_a_bundled_llm_has_its_published_parameter_count(name: str, parameter_count: int) -> None:
    assert parse_config(bundled_config(name)).parameter_count == parameter_count


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b", "Llama-3.1-8B"])
def test_an_llm_is_found_by_its_full_or_short_name_in_any_case(name: str) -> None:
    found = find_bundled(name)
    assert found is not None
    assert found.name == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("name", ["", "Llama", "other/Llama-3.1-8B", "../gpus.csv"])
def test_another_name_is_not_found(name: str) -> None:
    assert find_bundled(name) is None
    with pytest.raises(NotFoundError, match="bundled are meta-llama/Llama-3"):
        bundled_config(name)
