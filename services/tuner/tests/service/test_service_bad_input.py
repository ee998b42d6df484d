"""Requests that are wrong: refused with everything that is wrong with them, before anything is probed."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError
from llmpilot_servicekit.status import error_from_rpc

TIMEOUT_SECONDS = 30


def refused(call: Callable[[], object]) -> dict[str, str]:
    """Give what is wrong, by field."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidInputError), error
    return {violation.field: violation.description for violation in error.violations}


def test_everything_that_is_wrong_is_said_at_once(service: Any, make_spec: Any) -> None:
    spec = make_spec(longest_sequence=1, most_requests=-1, gpu_profile="9xB200")
    request = pb.CreateTuningRequest(spec=spec, tuning_id="Not An Id")
    found = refused(lambda: service.stub.CreateTuning(request, timeout=TIMEOUT_SECONDS))
    assert {
        "request_id",
        "tuning_id",
        "spec.gpu_profile",
        "spec.longest_sequence",
        "spec.most_requests",
    } <= set(found)


def test_an_empty_request_says_what_must_be_set(service: Any) -> None:
    found = refused(lambda: service.stub.CreateTuning(pb.CreateTuningRequest(), timeout=TIMEOUT_SECONDS))
    assert set(found) == {"request_id", "spec.llm", "spec.probe", "spec.server", "spec.gpu_profile"}


def test_an_architecture_alone_is_not_enough(service: Any, make_spec: Any) -> None:
    spec = make_spec(llm=llm_pb2.Llm(name="x", spec=llm_pb2.LlmSpec(layer_count=2)))
    found = refused(lambda: service.create(spec))
    assert "config.json" in found["spec.llm.spec"]


def test_a_config_json_without_heads_is_refused(service: Any, make_spec: Any) -> None:
    text = '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 10}'
    found = refused(lambda: service.create(make_spec(llm=llm_pb2.Llm(config_json=text))))
    assert any("heads" in field and field.startswith("spec.llm.config_json") for field in found)


def test_an_llm_that_does_not_fit_is_refused_with_what_would_hold_it(service: Any, make_spec: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        service.create(make_spec(llm=llm_pb2.Llm(name="llama-3.1-70b")))
    error = error_from_rpc(caught.value)
    assert isinstance(error, PreconditionError)
    assert "the smallest tensor parallelism that fits is 4 such GPUs" in str(error)


NO_NAMES = ["", "tn-1", "tunings/", "tunings/UPPER", "tunings/a.b", "tunings/*", "tunings/a b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_none_is_refused(service: Any, name: str) -> None:
    assert "name" in refused(lambda: service.get(name))
    assert "name" in refused(lambda: service.cancel(name))
    assert set(refused(lambda: service.watch(name, -1))) == {"name", "start_index"}


@pytest.mark.parametrize("call", ["get", "cancel", "watch"])
def test_a_tuning_that_nobody_made_is_not_found(service: Any, call: str) -> None:
    name = "tunings/nobody-made-it"
    with pytest.raises(grpc.RpcError) as caught:
        getattr(service, call)(name)
    error = error_from_rpc(caught.value)
    assert isinstance(error, NotFoundError)
    assert error.name == name


WRONG_PAGES = [(-1, "", "page_size"), (1001, "", "page_size"), (0, "A", "page_token")]


@pytest.mark.parametrize(("size", "token", "field"), WRONG_PAGES)
def test_a_wrong_page_is_refused(service: Any, size: int, token: str, field: str) -> None:
    request = pb.ListTuningsRequest(page_size=size, page_token=token)
    assert list(refused(lambda: service.stub.ListTunings(request, timeout=TIMEOUT_SECONDS))) == [field]
