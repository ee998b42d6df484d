import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.app import load_knowledge
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import Basis, LatencyLimits, Limit
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.measured_llms import MeasuredLlm
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.recommendation import Question, Recommendation, RejectionReason, RelaxedLimit, recommend
from llmpilot_recommender.settings import RecommenderSettings
from llmpilot_servicekit.settings import load_settings

BUNDLED = load_knowledge(load_settings(RecommenderSettings, {}))
LLAMA_7B = BUNDLED.llms["llama-7b"].spec
LIMITS = LatencyLimits(nttft_ms=100, itl_ms=50)
USERS = (1, 2, 4)
PROFILES = ("1xT4-16GB", "1xV100-16GB", "1xA100-40GB", "2xA100-40GB", "1xB200-180GB")
FAST = ((10.0, 20.0), (20.0, 30.0), (30.0, 40.0))
SLOW = ((10.0, 60.0), (20.0, 70.0), (30.0, 80.0))

Latencies = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class TablePredictor:
    """Predicts what a table says: (nTTFT, ITL) under 1, 2 and 4 users, whatever the LLM."""

    latencies_ms: Latencies

    @property
    def users_counts(self) -> tuple[int, ...]:
        """The table's loads."""
        return USERS

    def predict(self, spec: LlmSpec, profiles: Sequence[GpuProfile]) -> NDArray[np.float64]:  # noqa: ARG002
        """Look up the table."""
        return np.array([self.latencies_ms[profile.name] for profile in profiles])


def predicting(latencies_ms: Latencies, measurements: Sequence[Measurement] = ()) -> Knowledge:
    characterized = [measured("other", name, 1) for name in PROFILES if name != "1xB200-180GB"]
    return replace(BUNDLED, predictor=TablePredictor(latencies_ms), dataset=Dataset([*characterized, *measurements]))


def measured(
    llm: str, gpu_profile: str, users_count: int, *, origin: Origin = Origin.MEASURED, failed_percent: int | None = 0
) -> Measurement:
    return Measurement(
        llm=llm,
        gpu_profile=gpu_profile,
        users_count=users_count,
        origin=origin,
        nttft=Quantiles(median_ms=5.0),
        itl=Quantiles(median_ms=10.0),
        request_count=None if failed_percent is None else 100,
        error_count=failed_percent,
    )


def ask(
    knowledge: Knowledge,
    candidates: Sequence[str],
    *,
    prices: Mapping[str, float] | None = None,
    users_count: int = 8,
    limits: LatencyLimits = LIMITS,
    spec: LlmSpec = LLAMA_7B,
    name: str = "",
) -> Recommendation:
    question = Question(
        llm_name=name,
        spec=spec,
        limits=limits,
        users_count=users_count,
        candidates=tuple(map(BUNDLED.catalogue.require, candidates)),
        prices_per_hour=dict.fromkeys(candidates, 1.0) if prices is None else prices,
    )
    return recommend(question, knowledge)


def reasons(answer: Recommendation) -> dict[str, RejectionReason]:
    return {rejection.gpu_profile: rejection.reason for rejection in answer.rejections}


def test_cheapest_deployment_comes_first_not_the_cheapest_pod() -> None:
    # For 8 users: T4, 1 per pod: 8 pods x 1.00 = 8; A100, 4 per pod: 2 x 3.50 = 7; V100, 2 per pod: 4 x 2.25 = 9.
    knowledge = predicting(
        {
            "1xT4-16GB": ((10, 20), (10, 51), (10, 52)),
            "1xA100-40GB": FAST,
            "1xV100-16GB": ((10, 20), (10, 30), (101, 40)),
        }
    )
    prices = {"1xT4-16GB": 1.0, "1xA100-40GB": 3.5, "1xV100-16GB": 2.25}
    answer = ask(knowledge, list(prices), prices=prices)
    assert [
        (option.gpu_profile, option.users_per_pod, option.pod_count, option.pod_price_per_hour, option.price_per_hour)
        for option in answer.options
    ] == [
        ("1xA100-40GB", 4, 2, 3.5, 7.0),
        ("1xT4-16GB", 1, 8, 1.0, 8.0),
        ("1xV100-16GB", 2, 4, 2.25, 9.0),
    ]
    assert answer.rejections == ()
    assert answer.nearest is None
    assert answer.summary == "2 pods on 1xA100-40GB for 7.00 per hour serve 8 users within the limits (predicted)."


def test_option_carries_the_latencies_at_its_load_and_what_stops_it() -> None:
    knowledge = predicting({"1xA100-40GB": FAST, "1xV100-16GB": ((10, 20), (10, 30), (101, 60))})
    full, capped = ask(knowledge, ["1xA100-40GB", "1xV100-16GB"]).options
    assert (full.point.nttft_ms, full.point.itl_ms, full.point.users_count) == (30, 40, 4)
    assert full.reason == "within the limits up to 4 users, the most on record"
    assert (capped.point.nttft_ms, capped.point.itl_ms, capped.point.users_count) == (10, 30, 2)
    assert capped.reason == "at 4 users nTTFT is 101 ms (limit 100 ms) and ITL is 60 ms (limit 50 ms)"


def test_among_equally_cheap_options_the_measured_one_comes_first() -> None:
    latencies = dict.fromkeys(PROFILES, FAST)
    rows = [
        measured("mine", "2xA100-40GB", 4),
        measured("mine", "1xT4-16GB", 4, origin=Origin.SIMULATED),
    ]
    answer = ask(predicting(latencies, rows), ["1xT4-16GB", "1xB200-180GB", "1xV100-16GB", "2xA100-40GB"], name="mine")
    assert [(option.gpu_profile, option.basis) for option in answer.options] == [
        ("2xA100-40GB", Basis.MEASURED),
        ("1xV100-16GB", Basis.PREDICTED),
        ("1xB200-180GB", Basis.EXTRAPOLATED),
        ("1xT4-16GB", Basis.SIMULATED),
    ]


def test_cheaper_prediction_still_beats_a_measurement() -> None:
    knowledge = predicting(dict.fromkeys(PROFILES, FAST), [measured("mine", "1xA100-40GB", 4)])
    answer = ask(
        knowledge, ["1xA100-40GB", "1xV100-16GB"], name="mine", prices={"1xA100-40GB": 1.01, "1xV100-16GB": 1.0}
    )
    assert [option.gpu_profile for option in answer.options] == ["1xV100-16GB", "1xA100-40GB"]


def test_single_pod_is_said_so() -> None:
    answer = ask(predicting({"1xA100-40GB": FAST}), ["1xA100-40GB"], users_count=1)
    assert answer.summary.startswith("1 pod on 1xA100-40GB for 1.00 per hour serve")


curves = st.tuples(*[st.tuples(st.floats(1, 200), st.floats(1, 100))] * 3)


@given(
    latencies=st.fixed_dictionaries(dict.fromkeys(PROFILES, curves)),
    candidates=st.lists(st.sampled_from(PROFILES), unique=True),
    prices=st.dictionaries(st.sampled_from(PROFILES), st.floats(0.1, 100)),
    users_count=st.integers(1, 10**7),
    llm=st.sampled_from(list(BUNDLED.llms.values())),
    is_named=st.booleans(),
)
def test_every_candidate_comes_back_exactly_once_and_options_ascend_in_price(
    *,
    latencies: Latencies,
    candidates: list[str],
    prices: dict[str, float],
    users_count: int,
    llm: MeasuredLlm,
    is_named: bool,
) -> None:
    name = llm.name if is_named else ""
    knowledge = predicting(latencies, [row for row in BUNDLED.dataset.measurements if row.gpu_profile in PROFILES])
    answer = ask(knowledge, candidates, prices=prices, users_count=users_count, spec=llm.spec, name=name)
    back = [option.gpu_profile for option in answer.options] + [entry.gpu_profile for entry in answer.rejections]
    assert sorted(back) == sorted(candidates)
    totals = [option.price_per_hour for option in answer.options]
    assert totals == sorted(totals)
    for option in answer.options:
        assert option.pod_count * option.users_per_pod >= users_count
        assert option.point.nttft_ms <= 100
        assert option.point.itl_ms <= 50
    assert answer.nearest is None or not answer.options
    assert answer.summary


def test_measured_llm_gets_its_published_measurements() -> None:
    # characterization.csv, llama-7b on 1xA100-40GB: ITL 38 ms at 32 users, 59 ms at 64 -> 32 users, 7 pods.
    answer = ask(BUNDLED, ["1xA100-40GB"], name="llama-7b", users_count=200, prices={"1xA100-40GB": 4.09625})
    (option,) = answer.options
    assert (option.users_per_pod, option.pod_count, option.basis) == (32, 7, Basis.MEASURED)
    assert option.point.itl_ms == 38
    assert option.point.nttft_ms == pytest.approx(4.4944444444444445)
    assert option.price_per_hour == pytest.approx(28.67375)
    assert answer.notes == ()


def test_failed_requests_cap_llama_13b_at_8_users_of_an_a100() -> None:
    # characterization.csv: 46 of 1275 requests failed at 16 users; the medians alone would allow 64 users.
    answer = ask(BUNDLED, ["1xA100-40GB"], name="llama-13b", users_count=200)
    (option,) = answer.options
    assert (option.users_per_pod, option.pod_count, option.point.error_rate) == (8, 25, 0)
    assert option.reason == "at 16 users error rate is 3.6% (limit 1.0%)"


def test_who_allows_failed_requests_gets_the_published_64_users() -> None:
    limits = replace(LIMITS, error_rate=1)
    (option,) = ask(BUNDLED, ["1xA100-40GB"], name="llama-13b", users_count=200, limits=limits).options
    assert (option.users_per_pod, option.pod_count) == (64, 4)
    assert option.point.error_rate == pytest.approx(3824 / 4796)


def test_simulated_options_are_called_simulated_and_noted() -> None:
    rows = [measured("mine", "1xA100-40GB", 4, origin=Origin.SIMULATED)]
    answer = ask(predicting({}, rows), ["1xA100-40GB"], name="mine")
    (option,) = answer.options
    assert option.basis is Basis.SIMULATED
    assert "(simulated)" in answer.summary
    assert any("simulator" in note for note in answer.notes)
    assert "(measured)" not in answer.summary


def test_every_reason_for_a_rejection() -> None:
    rows = [
        measured("mine", "1xA100-40GB", 1, failed_percent=2),
        replace(measured("mine", "2xA100-40GB", 2), itl=Quantiles(median_ms=51)),
    ]
    huge = replace(LLAMA_7B, parameter_count=15 * 10**9)  # 30 GB in 16 bits
    knowledge = predicting({"1xT4-16GB": FAST, "1xV100-16GB": FAST, "1xB200-180GB": SLOW}, rows)
    prices = {name: 1.0 for name in PROFILES if name != "1xT4-16GB"}
    answer = ask(knowledge, PROFILES, prices=prices, spec=huge, name="mine")
    assert reasons(answer) == {
        "1xT4-16GB": RejectionReason.NO_PRICE,
        "1xV100-16GB": RejectionReason.OUT_OF_MEMORY,
        "1xA100-40GB": RejectionReason.ERROR_RATE,
        "2xA100-40GB": RejectionReason.LATENCY,
        "1xB200-180GB": RejectionReason.LATENCY,
    }
    details = {rejection.gpu_profile: rejection.detail for rejection in answer.rejections}
    assert "30.0 GB" in details["1xV100-16GB"]
    assert details["1xA100-40GB"] == "with a single user error rate is 2.0% (limit 1.0%) (measured)"
    assert details["2xA100-40GB"] == "with 2 users, the fewest on record, ITL is 51 ms (limit 50 ms) (measured)"
    assert details["1xB200-180GB"] == "with a single user ITL is 60 ms (limit 50 ms) (extrapolated)"


def test_profile_where_every_request_failed_is_rejected_for_its_errors() -> None:
    dead = replace(
        measured("mine", "1xA100-40GB", 1, failed_percent=100), nttft=Quantiles(), itl=Quantiles(), ttft=Quantiles()
    )
    answer = ask(predicting({}, [dead]), ["1xA100-40GB"], name="mine")
    assert reasons(answer) == {"1xA100-40GB": RejectionReason.ERROR_RATE}
    assert "error rate is 100.0%" in answer.rejections[0].detail
    assert answer.nearest is None


def test_measured_pair_ran_whatever_the_memory_model_says() -> None:
    huge = replace(LLAMA_7B, parameter_count=10**12)
    answer = ask(predicting({}, [measured("mine", "1xT4-16GB", 4)]), ["1xT4-16GB"], spec=huge, name="mine")
    assert [option.gpu_profile for option in answer.options] == ["1xT4-16GB"]


def test_nearest_option_is_the_one_with_the_smallest_relative_relaxation() -> None:
    # V100: ITL 60 of 50 -> 1.2 times. A100: nTTFT 110 of 100 and ITL 65 of 50 -> 1.3. T4: nTTFT 300 of 100 -> 3.
    knowledge = predicting(
        {
            "1xT4-16GB": ((300, 20),) * 3,
            "1xV100-16GB": ((10, 60), (20, 60), (30, 70)),
            "1xA100-40GB": ((110, 65),) * 3,
        }
    )
    prices = {"1xT4-16GB": 1.0, "1xV100-16GB": 2.0, "1xA100-40GB": 3.0}
    answer = ask(knowledge, list(prices), prices=prices)
    assert answer.options == ()
    assert len(answer.rejections) == 3
    nearest = answer.nearest
    assert nearest is not None
    assert nearest.relaxed_limits == (RelaxedLimit(limit=Limit.ITL, requested=50, needed=60),)
    # Within nTTFT 100 and ITL 60 a pod serves 2 users: 4 pods x 2.00.
    assert (nearest.option.gpu_profile, nearest.option.users_per_pod, nearest.option.pod_count) == ("1xV100-16GB", 2, 4)
    assert nearest.option.price_per_hour == 8
    assert answer.summary == (
        "No candidate meets the limits. Nearest: relax ITL from 50 ms to 60 ms;"
        " then 4 pods on 1xV100-16GB for 8.00 per hour would do (predicted)."
    )


def test_limits_are_relaxed_far_enough_as_they_are_printed() -> None:
    answer = ask(predicting({"1xA100-40GB": ((100.01, 65.0041),) * 3}), ["1xA100-40GB"])
    assert "relax nTTFT from 100 ms to 100.1 ms and ITL from 50 ms to 65.01 ms;" in answer.summary
    rows = [replace(measured("mine", "1xA100-40GB", 1), request_count=2000, error_count=21)]
    assert "from 1.0% to 1.1%;" in ask(predicting({}, rows), ["1xA100-40GB"], name="mine").summary


def test_nearest_of_equally_slow_options_is_the_cheapest() -> None:
    knowledge = predicting({"2xA100-40GB": SLOW, "1xA100-40GB": SLOW, "1xV100-16GB": SLOW})
    prices = {"2xA100-40GB": 8.0, "1xA100-40GB": 4.0, "1xV100-16GB": 6.0}
    answer = ask(knowledge, list(prices), prices=prices)
    assert answer.nearest is not None
    assert answer.nearest.option.gpu_profile == "1xA100-40GB"


def test_all_limits_to_relax_are_named() -> None:
    answer = ask(predicting({"1xA100-40GB": ((110, 65),) * 3}), ["1xA100-40GB"])
    assert answer.nearest is not None
    assert answer.nearest.relaxed_limits == (
        RelaxedLimit(limit=Limit.NTTFT, requested=100, needed=110),
        RelaxedLimit(limit=Limit.ITL, requested=50, needed=65),
    )
    assert answer.nearest.option.users_per_pod == 4


def test_error_rate_may_be_the_limit_to_relax() -> None:
    knowledge = predicting({}, [measured("mine", "1xA100-40GB", 1, failed_percent=2)])
    answer = ask(knowledge, ["1xA100-40GB"], name="mine")
    assert answer.nearest is not None
    assert answer.nearest.relaxed_limits == (RelaxedLimit(limit=Limit.ERROR_RATE, requested=0.01, needed=0.02),)
    assert "error rate from 1.0% to 2.0%" in answer.summary


def test_nearest_option_with_a_zero_error_rate_limit_is_found() -> None:
    knowledge = predicting({}, [measured("mine", "1xA100-40GB", 1, failed_percent=2)])
    answer = ask(knowledge, ["1xA100-40GB"], name="mine", limits=replace(LIMITS, error_rate=0))
    assert answer.nearest is not None
    assert answer.nearest.relaxed_limits[0].needed == 0.02


def test_asking_again_with_the_relaxed_limits_gives_the_nearest_option() -> None:
    knowledge = predicting({"1xV100-16GB": SLOW, "1xA100-40GB": ((110, 65),) * 3})
    nearest = ask(knowledge, ["1xV100-16GB", "1xA100-40GB"]).nearest
    assert nearest is not None
    limits = replace(LIMITS, itl_ms=nearest.relaxed_limits[0].needed)
    again = ask(knowledge, ["1xV100-16GB", "1xA100-40GB"], limits=limits)
    assert again.options == (nearest.option,)


def test_profile_without_a_price_or_the_memory_is_never_nearest() -> None:
    huge = replace(LLAMA_7B, parameter_count=10**11)
    knowledge = predicting({"1xA100-40GB": SLOW, "1xT4-16GB": SLOW, "1xB200-180GB": SLOW})
    answer = ask(knowledge, ["1xA100-40GB", "1xT4-16GB"], prices={"1xA100-40GB": 1}, spec=huge)
    assert answer.nearest is None
    assert "whatever the limits" in answer.summary


def test_llm_too_large_for_every_candidate_needs_larger_gpu_profiles() -> None:
    huge = replace(LLAMA_7B, parameter_count=10**12)
    answer = ask(predicting({"1xA100-40GB": FAST}), ["1xA100-40GB"], spec=huge)
    assert answer.summary == (
        "No candidate can serve this LLM, whatever the limits: does not fit in memory. Add larger GPU profiles."
    )


def test_who_lacks_only_prices_is_told_to_give_prices() -> None:
    answer = ask(predicting({"1xA100-40GB": FAST}), ["1xA100-40GB"], prices={})
    assert answer.nearest is None
    assert "Give a price" in answer.summary
    assert "larger" not in answer.summary


def test_latency_that_no_request_reached_is_not_something_to_relax_to() -> None:
    knowledge = predicting({}, [replace(measured("mine", "1xA100-40GB", 1), itl=Quantiles())])
    answer = ask(knowledge, ["1xA100-40GB"], name="mine")
    assert reasons(answer) == {"1xA100-40GB": RejectionReason.LATENCY}
    assert answer.nearest is None
    assert not math.isinf(LIMITS.itl_ms)
    assert "inf" not in answer.summary + answer.rejections[0].detail


def notes(answer: Recommendation) -> str:
    return "\n".join(answer.notes)


def test_unknown_family_is_noted() -> None:
    unknown = replace(LLAMA_7B, model_type="mamba")
    knowledge = predicting({"1xA100-40GB": FAST})
    assert "No LLM of the family 'mamba' was measured" in notes(ask(knowledge, ["1xA100-40GB"], spec=unknown))
    assert "family" not in notes(ask(knowledge, ["1xA100-40GB"]))


def test_prediction_is_noted_with_the_number_of_llms_behind_it() -> None:
    assert "learnt from 10 LLMs" in notes(ask(predicting({"1xA100-40GB": FAST}), ["1xA100-40GB"]))


def test_limits_far_from_those_of_the_model_are_noted() -> None:
    knowledge = predicting({"1xA100-40GB": FAST})
    other = replace(LIMITS, itl_ms=45)
    assert "nTTFT 100 ms and ITL 50 ms" in notes(ask(knowledge, ["1xA100-40GB"], limits=other))
    assert "most accurate" not in notes(ask(knowledge, ["1xA100-40GB"]))


def test_extrapolation_is_noted() -> None:
    knowledge = predicting({"1xB200-180GB": FAST, "1xA100-40GB": FAST})
    assert "extrapolated" in notes(ask(knowledge, ["1xB200-180GB"]))
    assert "extrapolated" not in notes(ask(knowledge, ["1xA100-40GB"]))


def test_nearest_option_that_is_predicted_is_noted_too() -> None:
    answer = ask(predicting({"1xB200-180GB": SLOW}), ["1xB200-180GB"], spec=replace(LLAMA_7B, model_type="mamba"))
    assert answer.nearest is not None
    assert "learnt from 10 LLMs" in notes(answer)
    assert "extrapolated" in notes(answer)
    assert "mamba" in notes(answer)
