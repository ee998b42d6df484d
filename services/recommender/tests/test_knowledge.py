from dataclasses import replace

import pytest

from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_recommender.decision import Basis
from llmpilot_recommender.knowledge import Curve, Knowledge
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles


def measurement(llm: str, gpu_profile: str, users_count: int, origin: Origin = Origin.MEASURED) -> Measurement:
    return Measurement(
        llm=llm,
        gpu_profile=gpu_profile,
        users_count=users_count,
        origin=origin,
        nttft=Quantiles(median_ms=7.0),
        itl=Quantiles(median_ms=9.0),
        request_count=100,
        error_count=0,
    )


def curve(knowledge: Knowledge, name: str, gpu_profile: str) -> Curve:
    profile: GpuProfile = knowledge.catalogue.require(gpu_profile)
    (found,) = knowledge.curves(name, knowledge.llms["llama-7b"].spec, [profile])
    return found


def test_measurements_win_over_predictions_profile_by_profile(bundled_knowledge: Knowledge) -> None:
    assert curve(bundled_knowledge, "llama-7b", "1xA100-40GB").basis is Basis.MEASURED
    assert curve(bundled_knowledge, "llama-7b", "1xV100-16GB").basis is Basis.PREDICTED
    assert curve(bundled_knowledge, "llama-7b", "8xA100-40GB").basis is Basis.PREDICTED  # its GPU was characterized
    assert curve(bundled_knowledge, "llama-7b", "1xB200-180GB").basis is Basis.EXTRAPOLATED


def test_llm_without_a_name_is_predicted(bundled_knowledge: Knowledge) -> None:
    assert curve(bundled_knowledge, "", "1xA100-40GB").basis is Basis.PREDICTED


def test_alias_stands_for_the_measured_llm(bundled_knowledge: Knowledge) -> None:
    alias = curve(bundled_knowledge, "meta-llama/Llama-2-13b-hf", "1xA100-40GB")
    assert alias == curve(bundled_knowledge, "llama-13b", "1xA100-40GB")
    assert alias.basis is Basis.MEASURED


def test_new_measurement_makes_a_new_knowledge(bundled_knowledge: Knowledge) -> None:
    spec = bundled_knowledge.llms["llama-7b"].spec
    after = bundled_knowledge.with_measurement(measurement("new/llm", "1xV100-16GB", 4), spec)
    assert curve(after, "new/llm", "1xV100-16GB").basis is Basis.MEASURED
    assert curve(bundled_knowledge, "new/llm", "1xV100-16GB").basis is Basis.PREDICTED
    found = after.measured_llm("new/llm")
    assert found is not None
    assert found.spec == spec
    assert after.dataset.version != bundled_knowledge.dataset.version


def test_measurement_of_an_llm_nobody_described_counts_under_its_name(bundled_knowledge: Knowledge) -> None:
    after = bundled_knowledge.with_measurement(measurement("new/llm", "1xV100-16GB", 4), None)
    assert after.measured_llm("new/llm") is None
    assert curve(after, "new/llm", "1xV100-16GB").basis is Basis.MEASURED


def test_measurement_under_an_alias_joins_those_of_the_llm(bundled_knowledge: Knowledge) -> None:
    spec = bundled_knowledge.llms["llama-13b"].spec
    alias = "meta-llama/Llama-2-13b-hf"
    after = bundled_knowledge.with_measurement(measurement(alias, "1xA100-40GB", 256), spec)
    for name in (alias, "llama-13b"):
        users_counts = [point.users_count for point in curve(after, name, "1xA100-40GB").points]
        assert users_counts == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert curve(after, name, "2xA100-40GB").basis is Basis.MEASURED


def test_first_description_of_an_llm_stays(bundled_knowledge: Knowledge) -> None:
    other = replace(bundled_knowledge.llms["llama-13b"].spec, layer_count=1)
    after = bundled_knowledge.with_measurement(measurement("llama-13b", "1xA100-40GB", 1), other)
    assert after.llms["llama-13b"] == bundled_knowledge.llms["llama-13b"]


def test_simulated_curve_is_never_called_measured(bundled_knowledge: Knowledge) -> None:
    simulated = measurement("llama-7b", "1xV100-16GB", 4, Origin.SIMULATED)
    after = bundled_knowledge.with_measurement(simulated, None)
    assert curve(after, "llama-7b", "1xV100-16GB").basis is Basis.SIMULATED


def test_simulated_load_does_not_enter_a_measured_curve(bundled_knowledge: Knowledge) -> None:
    simulated = measurement("llama-7b", "1xA100-40GB", 256, Origin.SIMULATED)
    after = bundled_knowledge.with_measurement(simulated, None)
    assert curve(after, "llama-7b", "1xA100-40GB") == curve(bundled_knowledge, "llama-7b", "1xA100-40GB")


@pytest.mark.parametrize("users_count", [1, 128])
def test_simulation_does_not_replace_a_measurement(bundled_knowledge: Knowledge, users_count: int) -> None:
    simulated = measurement("llama-7b", "1xA100-40GB", users_count, Origin.SIMULATED)
    after = bundled_knowledge.with_measurement(simulated, None)
    assert after.dataset == bundled_knowledge.dataset


def test_measurement_replaces_a_simulation(bundled_knowledge: Knowledge) -> None:
    knowledge = bundled_knowledge.with_measurement(measurement("new", "1xT4-16GB", 1, Origin.SIMULATED), None)
    knowledge = knowledge.with_measurement(measurement("new", "1xT4-16GB", 1), None)
    assert curve(knowledge, "new", "1xT4-16GB").basis is Basis.MEASURED


def test_latency_that_no_request_reached_is_infinite(bundled_knowledge: Knowledge) -> None:
    silent = replace(measurement("llama-7b", "1xV100-16GB", 1), itl=Quantiles())
    (point,) = curve(bundled_knowledge.with_measurement(silent, None), "llama-7b", "1xV100-16GB").points
    assert (point.nttft_ms, point.itl_ms) == (7.0, float("inf"))


def test_characterized_profiles_are_the_fourteen_published_ones(bundled_knowledge: Knowledge) -> None:
    names = {profile.name for profile in bundled_knowledge.characterized_profiles()}
    assert len(names) == 14
    assert {"1xT4-16GB", "4xH100-80GB", "2xA10-24GB"} < names


def test_profile_measured_but_not_in_the_catalogue_is_no_candidate(bundled_knowledge: Knowledge) -> None:
    after = bundled_knowledge.with_measurement(measurement("llama-7b", "1xUnknown-1GB", 1), None)
    assert after.characterized_profiles() == bundled_knowledge.characterized_profiles()
