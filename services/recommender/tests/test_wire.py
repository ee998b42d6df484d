import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot.catalog.v1.llm_pb2 import Llm
from llmpilot.measurement.v1 import measurement_pb2
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import GpuCatalogue
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender import wire
from llmpilot_recommender.decision import Basis, CurvePoint, LatencyLimits
from llmpilot_recommender.knowledge import Curve, Knowledge
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.recommendation import recommend
from llmpilot_recommender.wire_llm import read_llm_spec, write_llm_spec
from llmpilot_recommender.wire_measurement import read_measurement_recorded, write_measurement_recorded

LIMITS = pb.LatencyLimits(nttft_ms=100, itl_ms=50)
LLAMA = Llm(name="llama-7b")


def test_every_word_of_the_domain_has_its_own_on_the_wire() -> None:
    for mapping, kind in ((wire.BASES, pb.Basis), (wire.REASONS, pb.RejectionReason), (wire.LIMITS, pb.Limit)):
        assert sorted(mapping.values()) == sorted(set(kind.values()) - {0})
        for word, number in mapping.items():
            assert kind.DESCRIPTOR.values_by_number[number].name.endswith(word.name)


def test_question_is_read_with_the_defaults(bundled_knowledge: Knowledge) -> None:
    request = pb.RecommendRequest(llm=LLAMA, limits=LIMITS, users_count=200)
    question = wire.read_recommend_request(request, bundled_knowledge)
    assert question.llm_name == "llama-7b"
    assert question.spec == bundled_knowledge.llms["llama-7b"].spec
    assert question.limits == LatencyLimits(nttft_ms=100, itl_ms=50, error_rate=0.01)
    assert question.users_count == 200
    assert question.candidates == bundled_knowledge.characterized_profiles()
    assert question.prices_per_hour["1xA100-40GB"] == 4.09625


def test_error_rate_of_zero_is_not_the_default(bundled_knowledge: Knowledge) -> None:
    limits = pb.LatencyLimits(nttft_ms=100, itl_ms=50, error_rate=0)
    request = pb.RecommendRequest(llm=LLAMA, limits=limits, users_count=1)
    assert wire.read_recommend_request(request, bundled_knowledge).limits.error_rate == 0


def test_candidates_are_those_asked_for_in_that_order(bundled_knowledge: Knowledge) -> None:
    names = ["1xH100-80GB", "1xT4-16GB"]
    request = pb.RecommendRequest(llm=LLAMA, limits=LIMITS, users_count=1, gpu_profiles=pb.GpuProfileNames(names=names))
    question = wire.read_recommend_request(request, bundled_knowledge)
    assert [profile.name for profile in question.candidates] == names


@pytest.mark.parametrize(("everything", "count"), [(True, 52), (False, 14)])
def test_all_gpu_profiles_means_the_whole_catalogue(bundled_knowledge: Knowledge, everything: bool, count: int) -> None:
    request = pb.RecommendRequest(llm=LLAMA, limits=LIMITS, users_count=1, all_gpu_profiles=everything)
    assert len(wire.read_recommend_request(request, bundled_knowledge).candidates) == count


def test_given_prices_replace_the_default_ones(bundled_knowledge: Knowledge) -> None:
    price = pb.Price(gpu_profile="1xT4-16GB", price_per_hour=0.5)
    request = pb.RecommendRequest(llm=LLAMA, limits=LIMITS, users_count=1, prices=[price])
    prices = wire.read_recommend_request(request, bundled_knowledge).prices_per_hour
    assert prices["1xT4-16GB"] == 0.5
    assert prices["2xT4-16GB"] == 2.754666667


def test_alias_is_read_as_the_measured_llm(bundled_knowledge: Knowledge) -> None:
    request = pb.PredictRequest(llm=Llm(name="meta-llama/Llama-2-7b-hf"), gpu_profile="1xT4-16GB")
    name, spec, profile = wire.read_predict_request(request, bundled_knowledge)
    assert (name, spec, profile.name) == ("llama-7b", bundled_knowledge.llms["llama-7b"].spec, "1xT4-16GB")


def test_bundled_llm_is_read_by_its_name_alone(bundled_knowledge: Knowledge) -> None:
    request = pb.PredictRequest(llm=Llm(name="llama-3.1-8b"), gpu_profile="1xT4-16GB")
    name, spec, _ = wire.read_predict_request(request, bundled_knowledge)
    assert (name, spec.layer_count, spec.vocabulary_size) == ("meta-llama/Llama-3.1-8B", 32, 128_256)


def test_thousands_of_unknown_names_are_refused_without_a_search_for_each(bundled_knowledge: Knowledge) -> None:
    names = [f"{index}xA100-41GB" for index in range(9, 100_000)]
    request = pb.RecommendRequest(llm=LLAMA, limits=LIMITS, users_count=1, gpu_profiles=pb.GpuProfileNames(names=names))
    searches = 0

    class Counted(GpuCatalogue):
        def suggest(self, name: str) -> tuple[str, ...]:
            nonlocal searches
            searches += 1
            return super().suggest(name)

    knowledge = replace(bundled_knowledge, catalogue=Counted(bundled_knowledge.catalogue.gpus()))
    with pytest.raises(InvalidInputError) as caught:
        wire.read_recommend_request(request, knowledge)
    assert len(caught.value.violations) == len(names)
    assert "did you mean 8xA100-40GB" in caught.value.violations[0].description
    assert searches < 100  # each takes a millisecond


def test_unknown_latency_is_absent_from_a_curve_and_not_infinite(bundled_knowledge: Knowledge) -> None:
    point = CurvePoint(users_count=8, nttft_ms=1.5, itl_ms=math.inf, error_rate=None)
    curve = Curve(points=(point,), basis=Basis.MEASURED, fits_in_memory=True, memory_explanation="")
    (written,) = wire.write_predict_response(curve, bundled_knowledge).points
    assert (written.users_count, written.nttft_ms, written.basis) == (8, 1.5, pb.BASIS_MEASURED)
    assert not written.HasField("itl_ms")
    assert not written.HasField("error_rate")


def test_answer_with_a_nearest_option_is_written_whole(bundled_knowledge: Knowledge) -> None:
    request = pb.RecommendRequest(
        llm=LLAMA,
        limits=pb.LatencyLimits(nttft_ms=100, itl_ms=12),
        users_count=10,
        gpu_profiles=pb.GpuProfileNames(names=["1xA100-40GB"]),
    )
    question = wire.read_recommend_request(request, bundled_knowledge)
    response = wire.write_recommend_response(recommend(question, bundled_knowledge), question, bundled_knowledge)
    # characterization.csv: llama-7b on 1xA100-40GB has an ITL of 13 ms with one user, 14 with two.
    assert not response.options
    (rejection,) = response.rejections
    assert (rejection.gpu_profile, rejection.reason) == ("1xA100-40GB", pb.REJECTION_REASON_LATENCY)
    (relaxed,) = response.nearest.relaxed_limits
    assert (relaxed.limit, relaxed.requested, relaxed.needed) == (pb.LIMIT_ITL, 12, 13)
    option = response.nearest.option
    assert (option.pod_count, option.users_per_pod, option.basis) == (10, 1, pb.BASIS_MEASURED)
    assert option.price_per_hour == pytest.approx(40.9625)
    assert option.error_rate == 0
    assert response.dataset_version == bundled_knowledge.dataset.version
    assert response.model == bundled_knowledge.manifest.name
    assert response.llm_spec.layer_count == 32


def test_gpu_profile_is_written_with_its_price_and_whether_it_was_measured(bundled_knowledge: Knowledge) -> None:
    measured, other = (
        wire.write_gpu_profile(bundled_knowledge.catalogue.require(name), bundled_knowledge)
        for name in ("2xA100-40GB", "8xA100-40GB")
    )
    assert (measured.gpu, measured.gpu_count, measured.memory_bytes) == ("A100-40GB", 2, 80 * 10**9)
    assert measured.memory_bandwidth_bytes_per_second == 1555e9
    assert (measured.price_per_hour, measured.characterized, other.characterized) == (8.1925, True, False)
    assert "AWS" in measured.price_source


# Ten items, by hand.
@pytest.mark.parametrize(
    ("page_size", "page_token", "first", "last", "next_page_token"),
    [
        (0, "", 0, 10, ""),
        (4, "", 0, 4, "4"),
        (4, "4", 4, 8, "8"),
        (4, "8", 8, 10, ""),
        (10, "", 0, 10, ""),
        (1000, "9", 9, 10, ""),
    ],
)
def test_pages(page_size: int, page_token: str, first: int, last: int, next_page_token: str) -> None:
    assert wire.read_page(page_size, page_token, 10) == (slice(first, last), next_page_token)


def test_page_without_a_size_holds_at_most_a_thousand() -> None:
    assert wire.read_page(0, "", 1500) == (slice(0, 1000), "1000")


@given(st.integers(0, 40), st.integers(1, 12))
def test_pages_together_are_the_whole(items_count: int, page_size: int) -> None:
    items, seen, token = list(range(items_count)), [], ""
    while True:
        page, token = wire.read_page(page_size, token, items_count)
        seen += items[page]
        if not token:
            break
    assert seen == items


@pytest.mark.parametrize("page_token", ["0", "10", "-1", "1.5", "x", "٣", "4 ", "9" * 5000])
def test_token_of_no_page_is_refused(page_token: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        wire.read_page(1, page_token, 10)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@pytest.mark.parametrize("page_size", [-1, 1001])
def test_wrong_size_and_wrong_token_are_named_at_once(page_size: int) -> None:
    with pytest.raises(InvalidInputError) as caught:
        wire.read_page(page_size, "x", 10)
    assert [violation.field for violation in caught.value.violations] == ["page_size", "page_token"]


optional_counts = st.none() | st.integers(0, 10**6)
specs = st.builds(
    LlmSpec,
    model_type=st.text(max_size=5),
    is_encoder_decoder=st.booleans(),
    parameter_count=st.integers(-(2**63), 2**63 - 1),
    layer_count=st.integers(0, 2**31 - 1),
    head_count=st.integers(0, 2**31 - 1),
    vocabulary_size=st.integers(0, 2**31 - 1),
    max_position_count=optional_counts,
    uses_flash_attention=st.booleans(),
    relative_attention_max_distance=optional_counts,
    relative_attention_bucket_count=optional_counts,
    torch_dtype=st.text(max_size=5),
)
numbers = st.none() | st.floats(0, 1e9)
quantiles = st.builds(Quantiles, median_ms=numbers, p90_ms=numbers, p95_ms=numbers, p99_ms=numbers)
measurements = st.builds(
    Measurement,
    llm=st.text(max_size=5),
    gpu_profile=st.text(max_size=5),
    users_count=st.integers(0, 10**6),
    origin=st.sampled_from(Origin),
    test_seconds=numbers,
    ttft=quantiles,
    nttft=quantiles,
    itl=quantiles,
    throughput_tokens_per_second=numbers,
    request_count=optional_counts,
    error_count=optional_counts,
    oom_count=optional_counts,
)


@given(specs)
def test_architecture_survives_the_wire(spec: LlmSpec) -> None:
    assert read_llm_spec(write_llm_spec(spec)) == spec


@given(measurements, st.none() | specs)
def test_measurement_survives_the_wire(measurement: Measurement, spec: LlmSpec | None) -> None:
    now = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    event = write_measurement_recorded(measurement, spec, event_id="id", record_time=now)
    arrived = measurement_pb2.MeasurementRecorded.FromString(event.SerializeToString())
    assert read_measurement_recorded(arrived) == (measurement, spec)
    assert (arrived.event_id, arrived.record_time.ToDatetime(tzinfo=UTC)) == ("id", now)


@pytest.mark.parametrize("origin", [0, 99])
def test_measurement_without_an_origin_is_refused(origin: int) -> None:
    event = measurement_pb2.MeasurementRecorded()
    event.measurement.ParseFromString(bytes([0x20, origin]))  # field 4, a varint
    with pytest.raises(InvalidInputError, match=r"measurement\.origin"):
        read_measurement_recorded(event)


def test_bundled_architectures_are_written_field_for_field() -> None:
    spec = load_measured_llms()["google/flan-t5-xl"].spec
    written = write_llm_spec(spec)
    for name in LlmSpec.__dataclass_fields__:
        assert getattr(written, name) == getattr(spec, name)
