"""A running recommender, over gRPC and with a real nats-server."""

import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from llmpilot.catalog.v1.gpu_pb2 import GpuProfile
from llmpilot.catalog.v1.llm_pb2 import Llm
from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.wire_measurement import write_measurement_recorded
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server

TIMEOUT_SECONDS = 20
SERVICE = "llmpilot.recommendation.v1.RecommendationService"
LIMITS = pb.LatencyLimits(nttft_ms=100, itl_ms=50)
LLAMA = load_measured_llms()["llama-7b"].spec

Eventually = Callable[[Callable[[], bool]], None]
Publish = Callable[[str, Sequence[MeasurementRecorded]], None]
StartRecommender = Callable[..., AbstractContextManager[dict[str, str]]]


def event(llm: str, users_count: int = 4, gpu_profile: str = "1xV100-16GB", itl_ms: float = 9.0) -> MeasurementRecorded:
    measurement = Measurement(
        llm=llm,
        gpu_profile=gpu_profile,
        users_count=users_count,
        origin=Origin.MEASURED,
        nttft=Quantiles(median_ms=7.0),
        itl=Quantiles(median_ms=itl_ms),
    )
    return write_measurement_recorded(
        measurement, LLAMA, event_id=str(uuid.uuid4()), record_time=datetime(2024, 1, 1, tzinfo=UTC)
    )


def recommend(service: RecommendationServiceStub, **question: object) -> pb.RecommendResponse:
    request = pb.RecommendRequest(**({"limits": LIMITS, "users_count": 200} | question))  # type: ignore[arg-type]
    return service.Recommend(request, timeout=TIMEOUT_SECONDS)


def knows(service: RecommendationServiceStub, llm: str) -> Callable[[], bool]:
    """Whether an LLM of this name is known, which it is once it was measured."""

    def known() -> bool:
        request = pb.PredictRequest(llm=Llm(name=llm), gpu_profile="1xV100-16GB")
        try:
            service.Predict(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            return False
        return True

    return known


def test_health_and_reflection_name_the_service(addresses: dict[str, str]) -> None:
    with grpc.insecure_channel(addresses["grpc"]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        answer = check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (listed,) = reflect(  # type: ignore[operator]
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=TIMEOUT_SECONDS
        )
        assert SERVICE in {each.name for each in listed.list_services_response.service}


def test_measured_llm_is_answered_from_its_measurements(service: RecommendationServiceStub) -> None:
    # characterization.csv: llama-7b on 1xA100-40GB has an ITL of 38 ms at 32 users and 59 ms at 64; 4.09625 a pod.
    answer = recommend(service, llm=Llm(name="llama-7b"), gpu_profiles=pb.GpuProfileNames(names=["1xA100-40GB"]))
    (option,) = answer.options
    assert (option.users_per_pod, option.pod_count, option.itl_ms, option.basis) == (32, 7, 38, pb.BASIS_MEASURED)
    assert option.price_per_hour == pytest.approx(28.67375)
    assert answer.summary.startswith("7 pods on 1xA100-40GB for 28.67 per hour")


def test_every_candidate_comes_back_and_the_cheapest_first(service: RecommendationServiceStub) -> None:
    answer = recommend(service, llm=Llm(name="llama-3.1-8b"), all_gpu_profiles=True)
    names = [option.gpu_profile for option in answer.options] + [entry.gpu_profile for entry in answer.rejections]
    assert len(names) == len(set(names)) == 56
    totals = [option.price_per_hour for option in answer.options]
    assert totals == sorted(totals)
    unpriced = {entry.gpu_profile for entry in answer.rejections if entry.reason == pb.REJECTION_REASON_NO_PRICE}
    assert unpriced == {f"{count}xUNPRICED-80GB" for count in (1, 2, 4, 8)}


def test_llm_that_fits_nowhere_is_told_so_without_an_error(service: RecommendationServiceStub) -> None:
    answer = recommend(service, llm=Llm(name="Qwen3-14B"), gpu_profiles=pb.GpuProfileNames(names=["1xT4-16GB"]))
    assert not answer.options
    assert not answer.HasField("nearest")
    (rejection,) = answer.rejections
    assert rejection.reason == pb.REJECTION_REASON_OUT_OF_MEMORY
    assert "does not fit" in rejection.detail


def test_limits_nobody_meets_come_with_the_nearest_option(service: RecommendationServiceStub) -> None:
    answer = recommend(
        service,
        llm=Llm(name="llama-7b"),
        limits=pb.LatencyLimits(nttft_ms=100, itl_ms=12),
        gpu_profiles=pb.GpuProfileNames(names=["1xA100-40GB"]),
    )
    assert not answer.options
    assert answer.nearest.option.gpu_profile == "1xA100-40GB"
    assert [(each.limit, each.requested, each.needed) for each in answer.nearest.relaxed_limits] == [
        (pb.LIMIT_ITL, 12, 13)
    ]


def test_predict_gives_a_point_per_measured_load(service: RecommendationServiceStub) -> None:
    answer = service.Predict(
        pb.PredictRequest(llm=Llm(name="llama-7b"), gpu_profile="1xA100-40GB"), timeout=TIMEOUT_SECONDS
    )
    assert [(point.users_count, point.itl_ms) for point in answer.points] == [
        *((1, 13), (2, 14), (4, 16), (8, 20), (16, 25), (32, 38), (64, 59), (128, 89))
    ]
    assert answer.fits_in_memory
    assert {point.basis for point in answer.points} == {pb.BASIS_MEASURED}


def test_gpu_profiles_come_in_pages_that_together_are_the_catalogue(service: RecommendationServiceStub) -> None:
    everything = service.ListGpuProfiles(pb.ListGpuProfilesRequest(), timeout=TIMEOUT_SECONDS)
    assert len(everything.gpu_profiles) == 56
    assert everything.next_page_token == ""
    paged: list[GpuProfile] = []
    sizes: list[int] = []
    token = ""
    while True:
        page = service.ListGpuProfiles(
            pb.ListGpuProfilesRequest(page_size=25, page_token=token), timeout=TIMEOUT_SECONDS
        )
        paged += page.gpu_profiles
        sizes.append(len(page.gpu_profiles))
        token = page.next_page_token
        if not token:
            break
    assert sizes == [25, 25, 6]
    assert paged == list(everything.gpu_profiles)


def test_gpu_profile_shows_its_price_and_its_absence(service: RecommendationServiceStub) -> None:
    listed = service.ListGpuProfiles(pb.ListGpuProfilesRequest(), timeout=TIMEOUT_SECONDS)
    profiles = {profile.name: profile for profile in listed.gpu_profiles}
    assert profiles["8xMI300X-192GB"].price_per_hour == 1234.5
    assert profiles["1xT4-16GB"].price_per_hour == 2.176
    assert not profiles["1xUNPRICED-80GB"].HasField("price_per_hour")
    assert profiles["1xT4-16GB"].characterized
    assert not profiles["1xUNPRICED-80GB"].characterized


def test_the_loaded_model_is_listed(service: RecommendationServiceStub) -> None:
    listed = service.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_SECONDS)
    (model,) = listed.models
    assert model.name == recommend(service, llm=Llm(name="llama-7b")).model
    assert len(model.training_llms) == 10
    assert (model.limits.nttft_ms, model.limits.itl_ms, model.seed) == (100, 50, 42)
    assert listed.next_page_token == ""


def test_measurement_on_nats_turns_a_prediction_into_a_measurement(
    service: RecommendationServiceStub, nats_url: str, publish: Publish, eventually: Eventually
) -> None:
    def predict() -> pb.PredictResponse:
        request = pb.PredictRequest(llm=Llm(name="meta-llama/Llama-3.1-8B"), gpu_profile="1xV100-16GB")
        return service.Predict(request, timeout=TIMEOUT_SECONDS)

    before = predict()
    assert {point.basis for point in before.points} == {pb.BASIS_PREDICTED}
    publish(nats_url, [event("meta-llama/Llama-3.1-8B", users_count=4)])
    eventually(lambda: predict().points[0].basis == pb.BASIS_MEASURED)
    after = predict()
    (point,) = after.points
    assert (point.users_count, point.nttft_ms, point.itl_ms) == (4, 7.0, 9.0)
    assert after.dataset_version != before.dataset_version


def test_new_llm_is_known_by_its_name_once_it_was_measured(
    service: RecommendationServiceStub, nats_url: str, publish: Publish, eventually: Eventually
) -> None:
    assert not knows(service, "team/new-llm")()
    publish(nats_url, [event("team/new-llm")])
    eventually(knows(service, "team/new-llm"))
    answer = recommend(service, llm=Llm(name="team/new-llm"), gpu_profiles=pb.GpuProfileNames(names=["1xV100-16GB"]))
    assert (answer.options[0].users_per_pod, answer.options[0].basis) == (4, pb.BASIS_MEASURED)


def test_bad_measurements_are_skipped_and_counted_and_the_next_good_one_is_learnt(
    service: RecommendationServiceStub,
    addresses: dict[str, str],
    nats_url: str,
    publish: Publish,
    eventually: Eventually,
) -> None:
    def failed_count() -> float:
        with urllib.request.urlopen(f"http://{addresses['metrics']}/metrics", timeout=TIMEOUT_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("llmpilot_nats_messages_failed_total"))

    before = failed_count()
    of_no_origin = event("bad/origin")
    of_no_origin.measurement.origin = 0  # type: ignore[assignment]
    of_no_layers = event("bad/spec")
    of_no_layers.llm_spec.layer_count = 0
    publish(
        nats_url,
        [
            event("bad/profile", gpu_profile="1xUnknown-1GB"),
            event("bad/users", users_count=0),
            event("bad/latency", itl_ms=float("nan")),
            of_no_origin,
            of_no_layers,
            event(""),
            event("good/after-the-bad"),
        ],
    )
    eventually(knows(service, "good/after-the-bad"))
    assert failed_count() - before == 6
    for name in ("bad/profile", "bad/users", "bad/latency", "bad/origin", "bad/spec"):
        assert not knows(service, name)()


def test_replica_that_starts_later_learns_what_was_published_before(
    nats_url: str, publish: Publish, start_recommender: StartRecommender, eventually: Eventually
) -> None:
    publish(nats_url, [event("team/early-llm")])
    with (
        start_recommender(LLMPILOT_NATS_URL=nats_url) as addresses,
        grpc.insecure_channel(addresses["grpc"]) as channel,
    ):
        eventually(knows(RecommendationServiceStub(channel), "team/early-llm"))


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[Callable[[int | None], NatsServer]]:
    """Starts nats-servers on one store."""
    started: list[NatsServer] = []

    def start(port: int | None) -> NatsServer:
        started.append(start_nats_server(tmp_path / "nats", port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def test_recommendations_go_on_whatever_happens_to_nats(
    start_nats: Callable[[int | None], NatsServer],
    publish: Publish,
    start_recommender: StartRecommender,
    eventually: Eventually,
) -> None:
    """Dead at the start, up, killed, up again on the same store."""
    first = start_nats(None)
    port = int(first.url.rpartition(":")[2])
    first.kill()
    with (
        start_recommender(LLMPILOT_NATS_URL=first.url) as addresses,
        grpc.insecure_channel(addresses["grpc"]) as channel,
    ):
        service = RecommendationServiceStub(channel)
        assert recommend(service, llm=Llm(name="llama-7b")).options
        second = start_nats(port)
        publish(second.url, [event("team/first")])
        eventually(knows(service, "team/first"))
        second.kill()
        assert recommend(service, llm=Llm(name="llama-7b")).options
        assert knows(service, "team/first")()
        third = start_nats(port)
        publish(third.url, [event("team/second")])
        eventually(knows(service, "team/second"))
