"""Whatever a caller sends, the answer is one clear error with every violation, and the service lives."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from llmpilot.catalog.v1.llm_pb2 import Llm, LlmSpec
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub

TIMEOUT_SECONDS = 20
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}

Change = Callable[[pb.RecommendRequest], object]


def good_request() -> pb.RecommendRequest:
    return pb.RecommendRequest(
        llm=Llm(config_json=json.dumps(CONFIG)), limits=pb.LatencyLimits(nttft_ms=100, itl_ms=50), users_count=200
    )


def violations(error: grpc.RpcError) -> list[tuple[str, str]]:
    """The field violations of the status's BadRequest."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            return [(each.field, each.description) for each in bad_request.field_violations]
    return []


def refusal(call: Callable[..., Any], request: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT_SECONDS)
    return caught.value


def assert_lives(service: RecommendationServiceStub) -> None:
    answer = service.Recommend(good_request(), timeout=TIMEOUT_SECONDS)
    assert len(answer.options) + len(answer.rejections) == 14


def config(**changes: object) -> Change:
    return lambda request: setattr(request.llm, "config_json", json.dumps(CONFIG | changes))


def text(config_json: str) -> Change:
    return lambda request: setattr(request.llm, "config_json", config_json)


def limits(**values: float) -> Change:
    def change(request: pb.RecommendRequest) -> None:
        for name, value in values.items():
            setattr(request.limits, name, value)

    return change


def users(users_count: int) -> Change:
    return lambda request: setattr(request, "users_count", users_count)


def candidates(*names: str) -> Change:
    return lambda request: request.gpu_profiles.CopyFrom(pb.GpuProfileNames(names=names))


def price(gpu_profile: str, price_per_hour: float) -> Change:
    return lambda request: request.prices.append(pb.Price(gpu_profile=gpu_profile, price_per_hour=price_per_hour))


def llm(**values: Any) -> Change:
    return lambda request: request.llm.CopyFrom(Llm(**values))


NAN, INF = math.nan, math.inf
ABSURD = {"num_hidden_layers": 10**9, "hidden_size": 10**12, "vocab_size": -5}

BAD_INPUTS: dict[str, tuple[Sequence[Change], Sequence[str]]] = {
    "config.json that is not JSON": ([text("{hello")], ["llm.config_json"]),
    "empty config.json": ([text("")], ["llm.config_json"]),
    "config.json that is a list": ([text("[1]")], ["llm.config_json"]),
    "config.json nested a hundred thousand deep": ([text("[" * 100_000)], ["llm.config_json"]),
    "config.json with a number of five thousand digits": ([text('{"a": ' + "9" * 5000 + "}")], ["llm.config_json"]),
    "config.json of two megabytes": ([text('"' + "x" * 2_000_000 + '"')], ["llm.config_json"]),
    "config.json that lacks every field": (
        [text("{}")],
        [
            "llm.config_json.hidden_size",
            "llm.config_json.intermediate_size",
            "llm.config_json.model_type",
            "llm.config_json.num_attention_heads",
            "llm.config_json.num_hidden_layers",
            "llm.config_json.vocab_size",
        ],
    ),
    "zero layers": ([config(num_hidden_layers=0)], ["llm.config_json.num_hidden_layers"]),
    "fractional layers": ([config(num_hidden_layers=1.5)], ["llm.config_json.num_hidden_layers"]),
    "layers in words": ([config(num_hidden_layers="many")], ["llm.config_json.num_hidden_layers"]),
    "absurd sizes": ([config(**ABSURD)], [f"llm.config_json.{name}" for name in sorted(ABSURD)]),
    "spec of zeros": (
        [llm(spec=LlmSpec())],
        [
            f"llm.spec.{n}"
            for n in ("head_count", "layer_count", "model_type", "parameter_count", "torch_dtype", "vocabulary_size")
        ],
    ),
    "unknown LLM": ([llm(name="nobody/knows-it")], ["llm"]),
    "no LLM at all": ([llm()], ["llm"]),
    "limits of zero": ([limits(nttft_ms=0, itl_ms=0)], ["limits.itl_ms", "limits.nttft_ms"]),
    "negative limits": ([limits(nttft_ms=-1, itl_ms=-0.5)], ["limits.itl_ms", "limits.nttft_ms"]),
    "limits that are no numbers": (
        [limits(nttft_ms=NAN, itl_ms=NAN, error_rate=NAN)],
        ["limits.error_rate", "limits.itl_ms", "limits.nttft_ms"],
    ),
    "infinite limits": ([limits(nttft_ms=INF, itl_ms=INF)], ["limits.itl_ms", "limits.nttft_ms"]),
    "missing limits": (
        [lambda request: request.ClearField("limits")],
        ["limits.itl_ms", "limits.nttft_ms"],
    ),
    "error rate above one": ([limits(error_rate=1.5)], ["limits.error_rate"]),
    "no users": ([users(0)], ["users_count"]),
    "fewer than no users": ([users(-1)], ["users_count"]),
    "a billion users": ([users(10**9)], ["users_count"]),
    "most users a message holds": ([users(2**63 - 1)], ["users_count"]),
    "unknown GPU": ([candidates("1xA100-41GB")], ["gpu_profiles.names[0]"]),
    "empty GPU name": ([candidates("")], ["gpu_profiles.names[0]"]),
    "GPU count nobody sells": ([candidates("3xA100-40GB")], ["gpu_profiles.names[0]"]),
    "duplicate candidates": ([candidates("1xT4-16GB", "2xT4-16GB", "1xT4-16GB")], ["gpu_profiles.names[2]"]),
    "empty candidates": ([candidates()], ["gpu_profiles.names"]),
    "missing price": ([candidates("1xUNPRICED-80GB")], ["prices"]),
    "negative price": ([price("1xT4-16GB", -1)], ["prices[0].price_per_hour"]),
    "price of zero": ([price("1xT4-16GB", 0)], ["prices[0].price_per_hour"]),
    "price that is no number": ([price("1xT4-16GB", NAN)], ["prices[0].price_per_hour"]),
    "infinite price": ([price("1xT4-16GB", INF)], ["prices[0].price_per_hour"]),
    "two prices of one profile": ([price("1xT4-16GB", 1), price("1xT4-16GB", 2)], ["prices[1].gpu_profile"]),
    "price of an unknown GPU": ([price("1xT5-16GB", 1)], ["prices[0].gpu_profile"]),
    "five mistakes": (
        [
            config(num_hidden_layers=0),
            limits(nttft_ms=NAN),
            users(0),
            candidates("1xT4-16GB", "1xA100-41GB"),
            price("1xT4-16GB", -1),
        ],
        [
            "gpu_profiles.names[1]",
            "limits.nttft_ms",
            "llm.config_json.num_hidden_layers",
            "prices[0].price_per_hour",
            "users_count",
        ],
    ),
}


@pytest.mark.parametrize(("changes", "fields"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_refused_with_every_violation(
    service: RecommendationServiceStub, changes: Sequence[Change], fields: Sequence[str]
) -> None:
    request = good_request()
    for change in changes:
        change(request)
    error = refusal(service.Recommend, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = violations(error)
    assert sorted(field for field, _ in found) == list(fields)
    message = error.details() or ""
    for field, description in found:
        assert description
        assert field in message or message.endswith("...")
    assert_lives(service)


def test_refusal_shows_what_was_sent_and_what_would_do(service: RecommendationServiceStub) -> None:
    request = good_request()
    for change in (users(0), limits(nttft_ms=-3), candidates("1xA100-41GB")):
        change(request)
    described = dict(violations(refusal(service.Recommend, request)))
    assert described["users_count"] == "must be between 1 and 10,000,000, is 0"
    assert described["limits.nttft_ms"] == "must be > 0 and at most 1e+07, is -3"
    assert "did you mean 1xA100-40GB" in described["gpu_profiles.names[0]"]


def test_predict_names_a_bad_llm_and_a_bad_profile_at_once(service: RecommendationServiceStub) -> None:
    error = refusal(service.Predict, pb.PredictRequest(llm=Llm(config_json="[]"), gpu_profile="1xT5-16GB"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sorted(field for field, _ in violations(error)) == ["gpu_profile", "llm.config_json"]
    assert_lives(service)


@pytest.mark.parametrize("page_token", ["x", "0", "9" * 5000])
def test_bad_page_is_refused(service: RecommendationServiceStub, page_token: str) -> None:
    for error in (
        refusal(service.ListGpuProfiles, pb.ListGpuProfilesRequest(page_size=-1, page_token=page_token)),
        refusal(service.ListModels, pb.ListModelsRequest(page_size=-1, page_token=page_token)),
    ):
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert sorted(field for field, _ in violations(error)) == ["page_size", "page_token"]


def test_request_of_50_megabytes_is_refused_for_its_size(service: RecommendationServiceStub) -> None:
    request = good_request()
    text("x" * 50_000_000)(request)
    assert refusal(service.Recommend, request).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_lives(service)


def test_largest_request_full_of_wrong_names_does_not_hold_the_service_up(service: RecommendationServiceStub) -> None:
    request = good_request()
    candidates(*(f"1xA{index}" for index in range(300_000)))(request)
    assert 3_000_000 < request.ByteSize() < 4 * 1024 * 1024
    error = refusal(service.Recommend, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(error)[-1] == ("...", f"and {300_000 - len(violations(error)) + 1} more")
    assert_lives(service)


def test_bytes_that_are_no_message_are_refused(service: RecommendationServiceStub, addresses: dict[str, str]) -> None:
    with grpc.insecure_channel(addresses["grpc"]) as channel:
        call: Callable[..., Any] = channel.unary_unary("/llmpilot.recommendation.v1.RecommendationService/Recommend")
        assert "Error parsing message" in (refusal(call, b"\xff\xff\xff").details() or "")
    assert_lives(service)
