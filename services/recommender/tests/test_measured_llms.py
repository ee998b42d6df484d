import csv
from pathlib import Path

from llmpilot_recommender.dataset_file import BUNDLED_DATASET, read_dataset
from llmpilot_recommender.measured_llms import load_measured_llms


def test_every_llm_of_the_dataset_is_described_and_no_other() -> None:
    assert set(load_measured_llms()) == {row.llm for row in read_dataset(BUNDLED_DATASET).measurements}


def test_every_spec_is_valid() -> None:
    assert [llm.spec.violations() for llm in load_measured_llms().values()] == [()] * 10


def test_llama_is_llama_2_and_reads_all_its_cells() -> None:
    llama = load_measured_llms()["llama-13b"]
    assert llama.aliases == ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b")
    assert llama.spec.parameter_count == 13 * 10**9
    assert llama.spec.uses_flash_attention
    assert not llama.spec.is_encoder_decoder
    assert llama.spec.relative_attention_bucket_count is None


def test_no_two_llms_share_a_name_or_an_alias() -> None:
    names = [name for llm in load_measured_llms().values() for name in (llm.name, *llm.aliases)]
    assert len(names) == len(set(names)) == 14


def test_features_are_the_published_ones(public_data: Path) -> None:
    with (public_data / "llm-pilot" / "llm_features.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    llms = load_measured_llms()
    assert set(llms) == set(rows)
    for name, row in rows.items():
        spec = llms[name].spec
        assert spec.parameter_count / 10**9 == float(row["model_n_parameters"])
        assert (str(spec.uses_flash_attention).upper(), str(spec.is_encoder_decoder).upper()) == (
            row["model_is_flash_attention"],
            row["model_is_encoder_decoder"],
        )
        assert (spec.model_type, spec.torch_dtype) == (row["model_type"], row["model_torch_dtype"])
        for value, column in (
            (spec.layer_count, "model_n_layers"),
            (spec.head_count, "model_n_heads"),
            (spec.vocabulary_size, "model_vocabulary_size"),
            (spec.max_position_count, "model_n_positions"),
            (spec.relative_attention_max_distance, "model_relative_attention_max_distance"),
            (spec.relative_attention_bucket_count, "model_relative_attention_n_buckets"),
        ):
            assert ("" if value is None else str(value)) == row[column], (name, column)
