import json

import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_perfmodel.steps.fitted import (
    bundled_constants,
    fitted_constants,
    measured_name,
    read_fitted,
    same_shape,
    write_fitted,
)


def test_every_measured_pair_of_an_llm_and_a_gpu_profile_has_constants() -> None:
    """66 pairs: 526 files of up to eight levels of users each."""
    assert len(bundled_constants()) == 66


def test_llama_13b_on_one_a100_is_as_its_token_times_say() -> None:
    """FACTS of the records: 22.61 ms + .588 a sequence + .0026 a cached token, fitted independently at all levels."""
    fitted = fitted_constants("llama-13b", "1xA100-40GB")
    assert fitted.constants.decode_seconds == pytest.approx(22.61e-3, rel=0.03)
    assert fitted.constants.decode_seconds_per_cached_token == pytest.approx(2.6e-6, rel=0.15)
    assert fitted.constants.prefill_seconds_per_token == pytest.approx(0.114e-3, rel=0.1)
    assert (fitted.origin, fitted.is_padded) == ("calibrated", False)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-13b-hf", "Llama-2-13b", "llama-13b"])
def test_llama_2_13b_is_the_measured_llama_13b(name: str) -> None:
    assert measured_name(name) == "llama-13b"
    assert fitted_constants(name, "4xT4-16GB").llm == "llama-13b"


def test_a_llm_of_a_measured_shape_takes_its_constants(known_specs: dict[str, LlmSpec]) -> None:
    for name, measured in (
        ("meta-llama/Llama-2-7b", "llama-7b"),
        ("meta-llama/Llama-2-13b", "llama-13b"),
        ("EleutherAI/gpt-neox-20b", "EleutherAI/gpt-neox-20b"),
        ("bigcode/starcoder", "bigcode/starcoder"),
    ):
        assert same_shape(known_specs[name]) == measured
        assert fitted_constants("my/fine-tune", "1xH100-80GB", known_specs[name]).llm == measured


def test_llama_3_1_8b_has_the_layers_of_llama_7b_but_not_its_shape(known_specs: dict[str, LlmSpec]) -> None:
    assert known_specs["meta-llama/Llama-3.1-8B"].layer_count == 32
    assert same_shape(known_specs["meta-llama/Llama-3.1-8B"]) is None


def test_the_shape_of_a_published_spec_is_that_of_its_config() -> None:
    spec = parse_config(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 32000,
                "torch_dtype": "float16",
            }
        )
    )
    assert same_shape(spec) == "llama-7b"


def test_a_profile_that_nobody_measured_names_those_that_were() -> None:
    with pytest.raises(NotFoundError, match="measured on 1xA10-24GB, 1xA100-40GB"):
        fitted_constants("llama-7b", "1xL4-24GB")


def test_an_unmeasured_llm_names_those_that_were() -> None:
    with pytest.raises(NotFoundError, match="measured are EleutherAI/gpt-neox-20b"):
        fitted_constants("nobody/knows", "1xA100-40GB")


def test_a_table_that_was_written_reads_the_same() -> None:
    rows = tuple(bundled_constants().values())
    text = write_fitted(rows, {"source": "here", "licence": "none", "command": "this"})
    assert text.startswith("# source: here\n# licence: none\n# command: this\nllm,")
    assert read_fitted(text, label="copy") == rows


def test_every_bad_cell_is_named() -> None:
    text = write_fitted([bundled_constants()["llama-7b", "1xA100-40GB"]], {})
    header, row = text.splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    cells |= {"users": "many", "decode_seconds": "-1", "largest_batch_tokens": "x"}
    with pytest.raises(InvalidInputError) as caught:
        read_fitted(f"{header}\n{','.join(cells.values())}\n", label="t.csv")
    assert [violation.field for violation in caught.value.violations] == [
        "t.csv line 2, users",
        "t.csv line 2, decode_seconds",
        "t.csv line 2, largest_batch_tokens",
    ]
