import pytest

from llmpilot_contracts.errors import NotFoundError
from llmpilot_perfmodel.bundled_llms import bundled_config, bundled_llms, find_bundled
from llmpilot_perfmodel.llm_config import parse_config


def test_bundled_llms_are_listed_in_alphabetical_order() -> None:
    names = bundled_llms()
    assert list(names) == sorted(names, key=str.lower)
    assert len(names) == 20


@pytest.mark.parametrize(
    ("name", "parameter_count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-14b", 14_768_307_200),
        ("mistral-small-24b-base-2501", 23_572_403_200),
        ("llama-2-13b", 13_015_864_320),
    ],
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
    with pytest.raises(NotFoundError, match=r"20 are bundled|did you mean"):
        bundled_config(name)
