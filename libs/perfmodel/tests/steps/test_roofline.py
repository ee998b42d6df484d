import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import Gpu, GpuProfile, load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import precision_named
from llmpilot_perfmodel.sizes import LlmWork, llm_work
from llmpilot_perfmodel.steps.roofline import (
    MeasuredConstants,
    RooflineFactors,
    ServerKind,
    bundled_factors,
    fit_factors,
    kind_of,
    link_bytes_per_second,
    peak_flops_per_second,
    priors_from_others,
    read_factors,
    roofline_constants,
    with_uncertainty,
    write_factors,
)
from llmpilot_perfmodel.steps.step_time import StepConstants

KNOWN_LLMS = json.loads((Path(__file__).parents[1] / "data" / "known_llms.json").read_text())
GPUS = load_catalogue()


def _work(llm: str, gpu_count: int = 1) -> LlmWork:
    return llm_work(parse_llm(json.dumps(KNOWN_LLMS[llm]["config"])), gpu_count, precision_named("fp16"))


def _constants(llm: str, profile_name: str) -> StepConstants:
    profile = GPUS.require(profile_name)
    return roofline_constants(_work(llm, profile.gpu_count), profile)


def test_a_decode_of_llama_2_13b_on_one_a100_waits_for_its_weights() -> None:
    """By hand: 40 layers x .12 ms + 2 bytes x 12.9e9 parameters / 1555 GB/s x 1.03 = 21.9 ms; measured 22.4."""
    assert _constants("meta-llama/Llama-2-13b", "1xA100-40GB").decode_seconds == pytest.approx(21.9e-3, rel=0.03)


def test_a_prefill_reaches_between_45_and_75_percent_of_peak() -> None:
    """By hand: 2 FLOPs x 12.7e9 parameters / 312 TFLOPS = 81 us a token at full speed."""
    per_token = _constants("meta-llama/Llama-2-13b", "1xA100-40GB").prefill_seconds_per_token
    assert 0.45 < 81e-6 / per_token < 0.75


@pytest.mark.parametrize("profile_name", [profile.name for profile in GPUS.profiles()])
def test_every_gpu_of_the_catalogue_has_constants(profile_name: str) -> None:
    constants = _constants("meta-llama/Llama-2-7b", profile_name)
    constants.tables()
    assert constants.decode_seconds > 0


@pytest.mark.parametrize("llm", [name for name in KNOWN_LLMS if "t5" in name or "mt0" in name or "ul2" in name])
def test_an_encoder_decoder_has_constants(llm: str) -> None:
    assert _constants(llm, "1xH100-80GB").prefill_seconds > _constants(llm, "1xH100-80GB").decode_seconds


def test_a_larger_llm_is_never_faster() -> None:
    for profile in GPUS.profiles():
        small, large = (_constants(f"meta-llama/Llama-2-{size}", profile.name) for size in ("7b", "13b"))
        for field in fields(StepConstants):
            assert getattr(small, field.name) <= getattr(large, field.name)


def test_a_prefill_reads_every_expert() -> None:
    """By hand: as Mixtral's experts are all that differs, .975 x their bytes / 1555 GB/s; one token reads 2 of 8."""
    gpu = GPUS.require("8xA100-40GB")
    mixtral = _work("mistralai/Mixtral-8x7B-v0.1", 8)
    assert mixtral.experts is not None
    dense = replace(mixtral, experts=None, weight_bytes=mixtral.weight_bytes - mixtral.experts.weight_bytes)
    more = roofline_constants(mixtral, gpu).prefill_seconds - roofline_constants(dense, gpu).prefill_seconds
    assert more == pytest.approx(0.9754 * 2 * 45.1e9 / 8 / 1555e9, rel=0.01)


def test_more_bandwidth_never_makes_a_step_slower() -> None:
    slow, fast = (_constants("meta-llama/Llama-2-13b", name) for name in ("1xA100-40GB", "1xA100-80GB"))
    for field in fields(StepConstants):
        assert getattr(fast, field.name) <= getattr(slow, field.name)


def test_a_v100_has_its_tensor_cores_and_a_t4_its_mixed_rate() -> None:
    assert peak_flops_per_second(GPUS.require("1xV100-16GB").gpu) == 112e12
    assert peak_flops_per_second(GPUS.require("1xT4-16GB").gpu) == 65e12


def test_nvlink_is_faster_than_pcie() -> None:
    """H100: 900 GB/s both ways; A100 in the measured servers: 32 GB/s each way over PCIe 4."""
    assert link_bytes_per_second(GPUS.require("1xH100-80GB").gpu) == pytest.approx(450e9)
    assert link_bytes_per_second(GPUS.require("1xA100-40GB").gpu) == pytest.approx(32e9)


def test_a_gpu_without_an_interconnect_figure_talks_over_pcie() -> None:
    gpu = Gpu(name="X", architecture="X", memory_gb=8, memory_bandwidth_gb_per_second=100, pcie_generation=5)
    assert link_bytes_per_second(gpu) == 64e9
    assert link_bytes_per_second(replace(gpu, pcie_generation=None)) == 16e9


def test_a_gpu_without_any_flops_is_refused() -> None:
    gpu = Gpu(name="X", architecture="X", memory_gb=8, memory_bandwidth_gb_per_second=100)
    with pytest.raises(InvalidInputError, match="gpu X: states no TFLOPS; add"):
        roofline_constants(_work("meta-llama/Llama-2-7b"), GpuProfile(gpu=gpu, gpu_count=1))


def test_a_gpu_without_bandwidth_is_refused() -> None:
    gpu = replace(GPUS.require("1xT4-16GB").gpu, memory_bandwidth_gb_per_second=0)
    with pytest.raises(InvalidInputError, match="must be > 0, is 0"):
        roofline_constants(_work("meta-llama/Llama-2-7b"), GpuProfile(gpu=gpu, gpu_count=1))


def test_a_fit_finds_the_factors_that_constants_were_made_with() -> None:
    true = bundled_factors()[ServerKind.FLASH]
    samples = []
    for llm in ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-13b", "bigcode/starcoder", "EleutherAI/gpt-neox-20b"):
        for name in ("1xA100-40GB", "2xA100-40GB", "4xA100-40GB", "1xH100-80GB", "4xH100-80GB", "4xT4-16GB"):
            profile = GPUS.require(name)
            work = _work(llm, profile.gpu_count)
            constants = roofline_constants(work, profile, true)
            samples.append(MeasuredConstants(llm=llm, work=work, profile=profile, constants=constants))
    fitted = fit_factors(samples).factors
    for sample in samples:
        again = roofline_constants(sample.work, sample.profile, RooflineFactors(factors=fitted))
        for field in fields(StepConstants):
            assert getattr(again, field.name) == pytest.approx(getattr(sample.constants, field.name), rel=1e-6)
    assert max(with_uncertainty(samples).uncertainty.values()) < 1e-6


def test_what_no_server_shows_is_taken_from_others() -> None:
    """On one GPU nothing is exchanged."""
    alone = [
        MeasuredConstants(llm=llm, work=_work(llm), profile=GPUS.require(name), constants=_constants(llm, name))
        for llm in ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-13b")
        for name in ("1xA100-40GB", "1xH100-80GB", "1xA100-80GB")
    ]
    flash = bundled_factors()[ServerKind.FLASH]
    for otherwise, expected in ((None, 0.0), (flash, flash.factors["decode_seconds_per_sequence"]["exchange"])):
        fitted = fit_factors(alone, otherwise=otherwise).factors["decode_seconds_per_sequence"]
        assert fitted["exchange"] == expected
        assert fitted["request"] > 0


def test_a_padding_server_is_slower_and_one_with_an_encoder_has_factors_of_its_own() -> None:
    kinds = bundled_factors()
    assert {kind_of(_work(llm)) for llm in ("meta-llama/Llama-2-7b", "google/flan-t5-xl")} == {
        ServerKind.FLASH,
        ServerKind.ENCODER_DECODER,
    }
    flash, padded = (
        roofline_constants(_work("meta-llama/Llama-2-7b"), GPUS.require("1xA100-40GB"), kinds[kind])
        for kind in (ServerKind.FLASH, ServerKind.PADDED)
    )
    assert padded.decode_seconds_per_cached_token > flash.decode_seconds_per_cached_token


def _samples(**slower: float) -> list[MeasuredConstants]:
    """Return servers as fast as the roofline says, but for the LLMs that take this many times as long."""
    samples = []
    for llm in ("Llama-2-7b", "Llama-2-13b", "Llama-3.1-70B"):
        for profile_name in ("4xH100-80GB", "4xA100-80GB"):
            constants = _constants(f"meta-llama/{llm}", profile_name)
            times = {
                f.name: slower.get(llm.split("-")[-1], 1.0) * getattr(constants, f.name) for f in fields(constants)
            }
            samples.append(
                MeasuredConstants(
                    llm=llm,
                    work=_work(f"meta-llama/{llm}", 4),
                    profile=GPUS.require(profile_name),
                    constants=StepConstants(**times),
                )
            )
    return samples


def test_a_prior_knows_nothing_of_the_llm_that_it_is_for() -> None:
    priors, slower = priors_from_others(_samples()), priors_from_others(_samples(**{"7b": 3.0}))
    assert slower["Llama-2-7b", "4xH100-80GB"] == priors["Llama-2-7b", "4xH100-80GB"]
    assert slower["Llama-2-13b", "4xH100-80GB"] != priors["Llama-2-13b", "4xH100-80GB"]


def test_a_prior_is_less_certain_where_the_other_llms_differ() -> None:
    key = ("Llama-2-13b", "4xH100-80GB")
    differ = priors_from_others(_samples(**{"7b": 3.0}))[key].uncertainty["decode_seconds"]
    assert differ > priors_from_others(_samples())[key].uncertainty["decode_seconds"]


def test_one_other_llm_is_too_few_for_a_prior() -> None:
    with pytest.raises(InvalidInputError, match="at least one server"):
        priors_from_others(sample for sample in _samples() if sample.llm != "Llama-3.1-70B")


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="must have at least one server"):
        fit_factors([])


def test_a_table_that_was_written_reads_the_same() -> None:
    text = write_factors(bundled_factors(), {"source": "here"})
    assert read_factors(text, label="copy") == bundled_factors()


def test_a_factor_that_is_no_number_is_named() -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_factors(
            "kind,constant,part,factor,uncertainty_percent\nflash,decode_seconds,layer,x,1\nold,decode_seconds,layer,1,1\n",
            label="t",
        )
    assert [str(violation) for violation in caught.value.violations] == [
        "t line 2, factor: must be a number >= 0, is 'x'",
        "t line 3, kind: must be one of flash, padded, encoder-decoder, is 'old'",
    ]


@pytest.mark.parametrize("kind", ServerKind)
def test_a_kind_without_factors_is_named(kind: ServerKind) -> None:
    lines = write_factors(bundled_factors(), {}).splitlines(keepends=True)
    with pytest.raises(InvalidInputError) as caught:
        read_factors("".join(line for line in lines if not line.startswith(f"{kind},")), label="t")
    assert [str(violation) for violation in caught.value.violations] == [f"t: has no factors of kind {kind}"]
