"""Whatever a caller sends, the answer is one clear error with every violation, and the service lives."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from llmpilot.workload.v1 import workload_pb2 as pb

TIMEOUT_SECONDS = 60
TRACE = b"input_tokens,output_tokens,user\n" + b"".join(b"%d,%d,u%d\n" % (n, n % 9 + 1, n % 3) for n in range(1, 200))


def violations(error: grpc.RpcError) -> dict[str, str]:
    """The field violations of the status's BadRequest."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            return {each.field: each.description for each in bad_request.field_violations}
    return {}


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def invalid(call: Callable[[], object]) -> dict[str, str]:
    error = refusal(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    return violations(error)


def messages(
    spec: pb.WorkloadModelSpec, chunks: Sequence[bytes], request_id: str = "id"
) -> Iterator[pb.CreateWorkloadModelRequest]:
    yield pb.CreateWorkloadModelRequest(spec=spec, request_id=request_id)
    for chunk in chunks:
        yield pb.CreateWorkloadModelRequest(chunk=chunk)


def create(service: Any, content: bytes, **spec: Any) -> pb.WorkloadModel:
    asked = {
        "model_id": f"bad-{uuid.uuid4().hex[:8]}",
        "file_name": "trace.csv",
        "file_size_bytes": len(content),
        **spec,
    }
    answer = service.stub.CreateWorkloadModel(
        messages(pb.WorkloadModelSpec(**asked), [content], uuid.uuid4().hex), timeout=TIMEOUT_SECONDS
    )
    made: pb.WorkloadModel = answer.workload_model
    return made


def sample(service: Any, request: pb.SampleRequestsRequest) -> list[pb.SampleRequestsResponse]:
    return list(service.stub.SampleRequests(request, timeout=TIMEOUT_SECONDS))


@pytest.fixture(scope="module")
def model(service: Any) -> str:
    """A model of two numbers and a category."""
    return create(service, TRACE, parameters=["input_tokens", "output_tokens"]).name


def test_a_specification_is_refused_with_everything_that_is_wrong(service: Any) -> None:
    spec = pb.WorkloadModelSpec(
        model_id="Not An Id",
        file_name="../trace.csv",
        max_bin_count=1,
        parameters=["x"] * 65,
        source="x" * 1001,
        arrivals=pb.Arrivals(kind=pb.ARRIVAL_KIND_GAMMA, rate_per_second=-1, burstiness=0),
    )
    found = invalid(lambda: service.stub.CreateWorkloadModel(messages(spec, [], ""), timeout=TIMEOUT_SECONDS))
    assert found == {
        "request_id": "must have 1 to 128 characters, has 0",
        "spec.model_id": 'must be 1 to 63 lower-case letters, digits and "-", not "-" at either end, is \'Not An Id\'',
        "spec.file_name": "must be a file's name without its folder, is '../trace.csv'",
        "spec.file_size_bytes": "must be the size of the file, > 0, is 0",
        "spec.max_bin_count": "must be 2 to 256, or 0, is 1",
        "spec.parameters": "must be at most 64",
        "spec.source": "must have at most 1000 characters",
        "spec.arrivals.rate_per_second": "must be > 0, is -1",
        "spec.arrivals.burstiness": "must be > 0, is 0",
    }


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model_id": "production"}, "spec.model_id"),
        ({"file_name": ""}, "spec.path"),
        ({"path": "trace.csv"}, "spec.path"),
        ({"path": "trace.csv", "file_name": ""}, "spec.file_size_bytes"),
        ({"file_name": "a.workload", "keep_replay": True}, "spec.keep_replay"),
        ({"file_name": "a.pkl", "format": "azure", "max_bin_count": 9}, "spec.max_bin_count"),
        ({"arrivals": pb.Arrivals()}, "spec.arrivals.kind"),
        ({"file_size_bytes": 50_000_001}, "spec.file_size_bytes"),
        ({"file_name": "trace.docx"}, ""),
        ({"format": "unheard-of"}, ""),
        ({"parameters": ["input_tokens", "not there"]}, ""),
    ],
)
def test_one_wrong_field_is_named(service: Any, spec: dict[str, Any], field: str) -> None:
    found = invalid(lambda: create(service, TRACE, **spec))
    assert not field or field in found, found


@pytest.mark.parametrize(
    "content",
    [
        b"input_tokens,output_tokens\n",
        b"input_tokens,output_tokens\n5,nan\n",
        b"input_tokens,output_tokens\n-5,1\n",
        b"input_tokens,output_tokens\n5,six\n",
        b"\x00\xff" * 100,
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_its_name_and_leaves_nothing(service: Any, content: bytes) -> None:
    error = refusal(lambda: create(service, content))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "llmpilot-upload" not in (error.details() or "")
    assert list(service.uploads.iterdir()) == []


def test_a_damaged_model_file_and_a_forbidden_pickle_are_refused(service: Any) -> None:
    assert invalid(lambda: create(service, b"llm-pilot workload 1 nonsense", file_name="a.workload"))
    assert invalid(lambda: create(service, b"\x80\x04cos\nsystem\n(S'true'\ntR.", file_name="a.pkl"))


def test_a_file_of_another_size_than_said_is_refused(service: Any) -> None:
    cut = invalid(lambda: create(service, TRACE, file_size_bytes=len(TRACE) + 1))
    assert cut == {"spec.file_size_bytes": f"is {len(TRACE) + 1}, but only {len(TRACE)} bytes came"}
    long = invalid(lambda: create(service, TRACE, file_size_bytes=10))
    assert long == {"spec.file_size_bytes": "is 10, but more bytes came"}
    assert list(service.uploads.iterdir()) == []


def test_messages_in_another_order_are_refused(service: Any) -> None:
    chunk = pb.CreateWorkloadModelRequest(chunk=b"x")
    spec = pb.CreateWorkloadModelRequest(
        spec=pb.WorkloadModelSpec(model_id="order", file_name="a.csv", file_size_bytes=5), request_id="x"
    )
    for stream, field in (([chunk], "spec"), ([], "spec"), ([spec, spec], "chunk")):
        call = partial(service.stub.CreateWorkloadModel, iter(stream), timeout=TIMEOUT_SECONDS)
        assert list(invalid(call)) == [field]


@pytest.mark.parametrize(
    "path", ["../secret.csv", "/etc/hostname", "link.csv", "folder", "nothing.csv", "a\0b", "loop", "folder/../.."]
)
def test_no_path_leads_out_of_the_folder_of_traces(service: Any, traces: Path, path: str) -> None:
    (traces.parent / "secret.csv").write_bytes(TRACE)
    (traces / "folder").mkdir(exist_ok=True)
    for link, target in (("link.csv", "../secret.csv"), ("loop", "loop"), ("folder/part.csv", "../../secret.csv")):
        if not (traces / link).is_symlink():
            (traces / link).symlink_to(target)
    assert list(invalid(lambda: create(service, b"", file_name="", path=path))) == ["spec.path"]


def test_sampling_is_refused_with_everything_that_is_wrong(service: Any, model: str) -> None:
    request = pb.SampleRequestsRequest(
        sampling=pb.Sampling(
            workload_model=model,
            conditions=["nonsense", "unknown > 3"],
            value_choice=99,  # type: ignore[arg-type]
            scales=[pb.Scale(parameter="input_tokens", factor=-1), pb.Scale(parameter="unknown", factor=2)],
            context_length=-1,
            arrivals=pb.Arrivals(kind=pb.ARRIVAL_KIND_POISSON),
        ),
        start_index=-1,
        request_count=-1,
        batch_size=2_000_000,
    )
    found = invalid(lambda: sample(service, request))
    expected = ("value_choice", "context_length", "arrivals.rate_per_second", "conditions", "scales")
    for field in ("start_index", "request_count", "batch_size", *(f"sampling.{name}" for name in expected)):
        assert any(name.startswith(field) for name in found), (field, found)


def test_a_condition_that_no_cell_satisfies_is_refused(service: Any, model: str) -> None:
    request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=model, conditions=["input_tokens > 100000"]))
    (field,) = invalid(lambda: sample(service, request))
    assert field.startswith("sampling.conditions")


def test_a_stream_that_would_begin_where_none_can_is_refused(service: Any, model: str) -> None:
    poisson = pb.Arrivals(kind=pb.ARRIVAL_KIND_POISSON, rate_per_second=1e6)
    for sampling, start in ((pb.Sampling(arrivals=poisson), 10**9 + 1), (pb.Sampling(), 2**48)):
        sampling.workload_model = model
        request = pb.SampleRequestsRequest(sampling=sampling, start_index=start)
        assert list(invalid(partial(sample, service, request))) == ["start_index"]


def test_a_request_of_more_tokens_than_are_made_is_refused(service: Any, model: str) -> None:
    """Prompts of 200 million tokens and more would take gigabytes."""
    scales = [pb.Scale(parameter="input_tokens", factor=1e6), pb.Scale(parameter="output_tokens", factor=1)]
    sampling = pb.Sampling(workload_model=model, conditions=["input_tokens >= 9"], scales=scales)
    request = pb.StreamRequestsRequest(sampling=sampling, request_count=1)
    found = invalid(lambda: list(service.stub.StreamRequests(request, timeout=TIMEOUT_SECONDS)))
    assert list(found) == ["sampling.context_length"]
    assert "tokens in its prompts, and at most 8,388,608 are made" in found["sampling.context_length"]


def test_arrivals_beyond_all_time_are_refused_by_their_field(service: Any, model: str) -> None:
    arrivals = pb.Arrivals(kind=pb.ARRIVAL_KIND_CONSTANT, rate_per_second=1e-18)
    sampling = pb.Sampling(workload_model=model, arrivals=arrivals)
    assert list(invalid(lambda: sample(service, pb.SampleRequestsRequest(sampling=sampling, request_count=9)))) == [
        "sampling.arrivals"
    ]
    prompts = pb.StreamRequestsRequest(sampling=sampling, request_count=9)
    assert list(invalid(lambda: list(service.stub.StreamRequests(prompts, timeout=TIMEOUT_SECONDS)))) == [
        "sampling.arrivals"
    ]


def test_a_model_that_a_list_cannot_show_is_refused(service: Any) -> None:
    """20 names of 5,000 letters."""
    content = b"input_tokens,output_tokens,user\n" + b"".join(b"1,1,%c%s\n" % (97 + n, b"x" * 5000) for n in range(20))
    parameters = ["input_tokens", "output_tokens", "user"]
    found = invalid(lambda: create(service, content, parameters=parameters))
    assert list(found) == ["spec.parameters"]
    assert found["spec.parameters"].startswith("have names and categories of 10")
    assert found["spec.parameters"].endswith("leave out those with long names or categories")


def test_a_replay_of_a_model_that_keeps_no_trace_is_refused(service: Any, model: str) -> None:
    request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=model, replay=True))
    assert list(invalid(lambda: sample(service, request))) == ["sampling.replay"]


def test_prompts_are_refused_with_everything_that_is_wrong(service: Any, model: str) -> None:
    request = pb.StreamRequestsRequest(
        sampling=pb.Sampling(workload_model=model, conditions=["nonsense"]),
        start_index=-1,
        shared_prefix_ratio=2,
        prefix_group_count=-1,
        server=77,  # type: ignore[arg-type]
    )
    found = invalid(lambda: list(service.stub.StreamRequests(request, timeout=TIMEOUT_SECONDS)))
    for field in ("sampling.conditions", "start_index", "shared_prefix_ratio", "prefix_group_count", "server"):
        assert any(name.startswith(field) for name in found), (field, found)


def test_a_tokenizer_and_a_corpus_that_are_none_are_refused(service: Any, model: str) -> None:
    sampling = pb.Sampling(workload_model=model)
    no_tokenizer = pb.StreamRequestsRequest(sampling=sampling, tokenizer_json=b"{}")
    assert "tokenizer_json" in invalid(lambda: list(service.stub.StreamRequests(no_tokenizer, timeout=TIMEOUT_SECONDS)))
    no_corpus = pb.StreamRequestsRequest(sampling=sampling, corpus="too short")
    assert "corpus" in invalid(lambda: list(service.stub.StreamRequests(no_corpus, timeout=TIMEOUT_SECONDS)))
    no_model_name = pb.StreamRequestsRequest(sampling=sampling, server=pb.SERVER_OPENAI_CHAT)
    assert "served_model" in invalid(lambda: list(service.stub.StreamRequests(no_model_name, timeout=TIMEOUT_SECONDS)))


@pytest.mark.parametrize(
    "name", ["", "production", "workloadModels/", "workloadModels/UP", "models/x", "workloadModels/a/b", "x" * 5000]
)
def test_a_name_of_no_model_is_refused(service: Any, name: str) -> None:
    stub = service.stub
    calls: list[Callable[[], object]] = [
        lambda: stub.GetWorkloadModel(pb.GetWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
        lambda: stub.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
        lambda: stub.DescribeWorkloadModel(pb.DescribeWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
    ]
    for call in calls:
        assert list(invalid(call)) == ["name"]
    request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=name))
    assert list(invalid(lambda: list(stub.SampleRequests(request, timeout=TIMEOUT_SECONDS)))) == [
        "sampling.workload_model"
    ]


def test_an_unknown_model_is_not_found(service: Any) -> None:
    stub, name = service.stub, "workloadModels/unknown"
    calls: list[Callable[[], object]] = [
        lambda: stub.GetWorkloadModel(pb.GetWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
        lambda: stub.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
        lambda: stub.DescribeWorkloadModel(pb.DescribeWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS),
        lambda: list(
            stub.SampleRequests(
                pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=name)), timeout=TIMEOUT_SECONDS
            )
        ),
    ]
    for call in calls:
        assert refusal(call).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListWorkloadModelsRequest(page_size=-1), "page_size"),
        (pb.ListWorkloadModelsRequest(page_size=1001), "page_size"),
        (pb.ListWorkloadModelsRequest(page_token="??"), "page_token"),  # noqa: S106 of a page
    ],
)
def test_a_page_that_is_none_is_refused(service: Any, request_: pb.ListWorkloadModelsRequest, field: str) -> None:
    assert list(invalid(lambda: service.stub.ListWorkloadModels(request_, timeout=TIMEOUT_SECONDS))) == [field]
