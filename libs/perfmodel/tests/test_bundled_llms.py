import json
from pathlib import Path

import pytest

from llmpilot_contracts.errors import NotFoundError
from llmpilot_perfmodel.bundled_llms import bundled_config, bundled_llms, find_bundled
from llmpilot_perfmodel.llm_config import parse_config, parse_llm
from llmpilot_perfmodel.sizes import llm_work

KNOWN_LLMS = json.loads((Path(__file__).parent / "data" / "known_llms.json").read_text())


def test_bundled_llms_are_listed_in_alphabetical_order() -> None:
    names = bundled_llms()
    assert list(names) == sorted(names, key=str.lower)
    assert len(names) == 22


@pytest.mark.parametrize(
    ("name", "parameter_count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-14b", 14_768_307_200),
        ("mistral-small-24b-base-2501", 23_572_403_200),
        ("llama-2-13b", 13_015_864_320),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_a_bundled_llm_has_its_published_parameter_count(name: str, parameter_count: int) -> None:
    assert parse_config(bundled_config(name)).parameter_count == parameter_count


@pytest.mark.parametrize("name", bundled_llms())
def test_every_bundled_llm_can_be_sized_on_eight_gpus(name: str) -> None:
    assert llm_work(parse_llm(bundled_config(name)), 8).weight_bytes > 0


@pytest.mark.parametrize("name", sorted(set(bundled_llms()) & set(KNOWN_LLMS)))
def test_a_bundled_llm_has_as_many_parameters_as_its_model_card_says(name: str) -> None:
    assert parse_config(bundled_config(name)).parameter_count == pytest.approx(
        KNOWN_LLMS[name]["parameter_count"], rel=0.01
    )


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b", "Llama-3.1-8B"])
def test_an_llm_is_found_by_its_full_or_short_name_in_any_case(name: str) -> None:
    found = find_bundled(name)
    assert found is not None
    assert found.name == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("name", ["", "Llama", "other/Llama-3.1-8B", "../gpus.csv"])
def test_another_name_is_not_found(name: str) -> None:
    assert find_bundled(name) is None
    with pytest.raises(NotFoundError, match=r"22 are bundled|did you mean"):
        bundled_config(name)
