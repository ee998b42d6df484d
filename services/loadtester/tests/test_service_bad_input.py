"""Requests that are wrong: refused with everything that is wrong with them, before anything is sent."""

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 30


def refused(call: Callable[[], object]) -> dict[str, str]:
    """Give what is wrong, by field."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidInputError), error
    return {violation.field: violation.description for violation in error.violations}


def create(service: Any, spec: pb.LoadTestSpec, **fields: str) -> Callable[[], object]:
    request = pb.CreateLoadTestRequest(spec=spec, **({"request_id": uuid.uuid4().hex} | fields))
    return lambda: service.stub.CreateLoadTest(request, timeout=TIMEOUT_SECONDS)


def test_everything_that_is_wrong_is_said_at_once(service: Any, make_spec: Any) -> None:
    spec = make_spec(0, url="ftp://host")
    spec.stages[0].measure_seconds = -1
    spec.gpu_profile = "1xA100-40GB"
    found = refused(create(service, spec, request_id="", load_test_id="Not An Id"))
    assert {"request_id", "load_test_id", "spec.target.url", "spec.stages[0].measure_seconds", "spec.llm"} <= set(found)
    assert any(field.startswith("spec.stages[0].load.user_steps") for field in found)


def test_an_empty_request_says_what_must_be_set(service: Any) -> None:
    found = refused(create(service, pb.LoadTestSpec()))
    assert {"spec.target.protocol", "spec.requests"} <= set(found)
    assert "known protocol" in found["spec.target.protocol"]


def _names_a_gpu_alone(spec: pb.LoadTestSpec) -> None:
    spec.gpu_profile = "1xH100-80GB"
    spec.llm.config_json = "{}"


def _negative_rate(spec: pb.LoadTestSpec) -> None:
    spec.stages[0].load.CopyFrom(pb.Load(kind=pb.LOAD_KIND_POISSON, rate_per_second=-1))


def _too_many_stages(spec: pb.LoadTestSpec) -> None:
    spec.stages.extend([spec.stages[0]] * 100)


def _too_many_steps(spec: pb.LoadTestSpec) -> None:
    """Each is 11 bytes or so."""
    spec.stages[0].load.user_steps.extend(
        pb.UserStep(at_seconds=step / 1e5, users_count=1) for step in range(1, 10_000)
    )


def _model_without_collection(spec: pb.LoadTestSpec) -> None:
    spec.workload.sampling.workload_model = "conversation"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("spec.target.protocol", lambda spec: setattr(spec.target, "protocol", 77)),
        ("spec.stages[0].load.kind", lambda spec: setattr(spec.stages[0].load, "kind", 0)),
        ("spec.stages[0].load.rate_per_second", _negative_rate),
        ("spec.target.ca_certificates_pem", lambda spec: setattr(spec.target, "ca_certificates_pem", b"\xff")),
        ("spec.workload.sampling.workload_model", _model_without_collection),
        ("spec.llm.name", _names_a_gpu_alone),
        ("spec.gpu_profile", lambda spec: setattr(spec.llm, "name", "llama-3.1-8b")),
        ("spec.stages", _too_many_stages),
        ("spec", _too_many_steps),
    ],
)
def test_a_wrong_field_is_named(service: Any, make_spec: Any, field: str, change: Any) -> None:
    spec = make_spec(1)
    change(spec)
    assert field in refused(create(service, spec))


def test_a_wrong_kind_hides_what_cannot_be_judged_without_it(service: Any, make_spec: Any) -> None:
    spec = make_spec(1)
    spec.stages[0].load.Clear()
    assert list(refused(create(service, spec))) == ["spec.stages[0].load.kind"]


NO_NAMES = ["", "lt-1", "loadTests/", "loadTests/UPPER", "loadTests/a.b", "loadTests/*", "loadTests/a b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_none_is_refused(service: Any, name: str) -> None:
    get = pb.GetLoadTestRequest(name=name)
    assert "name" in refused(lambda: service.stub.GetLoadTest(get, timeout=TIMEOUT_SECONDS))
    assert "name" in refused(
        lambda: service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)
    )
    watch = pb.WatchLoadTestRequest(name=name, start_index=-1)
    found = refused(lambda: list(service.stub.WatchLoadTest(watch, timeout=TIMEOUT_SECONDS)))
    assert set(found) == {"name", "start_index"}


@pytest.mark.parametrize("call", ["get", "cancel", "watch"])
def test_a_load_test_that_nobody_made_is_not_found(service: Any, call: str) -> None:
    name = "loadTests/nobody-made-it"
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: service.stub.GetLoadTest(pb.GetLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS),
        "cancel": lambda: service.stub.CancelLoadTest(pb.CancelLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS),
        "watch": lambda: list(service.stub.WatchLoadTest(pb.WatchLoadTestRequest(name=name), timeout=TIMEOUT_SECONDS)),
    }
    with pytest.raises(grpc.RpcError) as caught:
        calls[call]()
    error = error_from_rpc(caught.value)
    assert isinstance(error, NotFoundError)
    assert error.name == name


WRONG_PAGES = [(-1, "", "page_size"), (1001, "", "page_size"), (0, "A", "page_token")]


@pytest.mark.parametrize(("size", "token", "field"), WRONG_PAGES)
def test_a_wrong_page_is_refused(service: Any, size: int, token: str, field: str) -> None:
    request = pb.ListLoadTestsRequest(page_size=size, page_token=token)
    assert list(refused(lambda: service.stub.ListLoadTests(request, timeout=TIMEOUT_SECONDS))) == [field]
