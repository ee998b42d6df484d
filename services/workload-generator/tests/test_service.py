"""Models and requests over real gRPC, kept in a real nats-server that two service processes share."""

import asyncio
import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import nats
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub

TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1000
PACKED = {
    pb.PACKED_TYPE_UINT8: "<u1",
    pb.PACKED_TYPE_UINT16: "<u2",
    pb.PACKED_TYPE_UINT32: "<u4",
    pb.PACKED_TYPE_INT64: "<i8",
    pb.PACKED_TYPE_FLOAT64: "<f8",
}

Replicas = Sequence[Any]
"""Of conftest.RunningService."""


def trace_csv(row_count: int = 500, *, batch_sizes: Sequence[int] = (1, 2)) -> bytes:
    """A trace of whole numbers that repeats: input 10 to 309, output 1 to 20, some batches."""
    rows = [
        f"{10 + index * 7 % 300},{1 + index % 20},{batch_sizes[index % len(batch_sizes)]}" for index in range(row_count)
    ]
    return "\n".join(["input_tokens,output_tokens,batch_size", *rows, ""]).encode()


def messages(spec: pb.WorkloadModelSpec, content: bytes, request_id: str) -> Iterator[pb.CreateWorkloadModelRequest]:
    yield pb.CreateWorkloadModelRequest(spec=spec, request_id=request_id)
    for start in range(0, len(content), CHUNK_BYTES):
        yield pb.CreateWorkloadModelRequest(chunk=content[start : start + CHUNK_BYTES])


def create(
    stub: WorkloadServiceStub, model_id: str, content: bytes = b"", *, request_id: str = "", **spec: Any
) -> pb.WorkloadModel:
    if content:
        spec = {"file_name": "trace.csv", "file_size_bytes": len(content), **spec}
    made = pb.WorkloadModelSpec(model_id=model_id, **spec)
    answer = stub.CreateWorkloadModel(messages(made, content, request_id or uuid.uuid4().hex), timeout=TIMEOUT_SECONDS)
    return answer.workload_model


def names(stub: WorkloadServiceStub) -> list[str]:
    listed = stub.ListWorkloadModels(pb.ListWorkloadModelsRequest(), timeout=TIMEOUT_SECONDS)
    return [model.name for model in listed.workload_models]


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


def sampled(
    stub: WorkloadServiceStub,
    model: str,
    *,
    start_index: int = 0,
    request_count: int = 1000,
    batch_size: int = 0,
    **sampling: Any,
) -> list[pb.SampleRequestsResponse]:
    request = pb.SampleRequestsRequest(
        sampling=pb.Sampling(workload_model=model, **sampling),
        start_index=start_index,
        request_count=request_count,
        batch_size=batch_size,
    )
    return list(stub.SampleRequests(request, timeout=TIMEOUT_SECONDS))


def column(batches: Iterable[pb.SampleRequestsResponse], name: str) -> npt.NDArray[Any]:
    parts = [
        np.frombuffer(each.values, PACKED[each.type])
        for batch in batches
        for each in batch.columns
        if each.parameter == name
    ]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def model(service: Any) -> str:
    """The name of a model of `trace_csv`."""
    return create(service.stub, f"m-{uuid.uuid4().hex[:8]}", trace_csv()).name


def test_a_sent_trace_becomes_a_model_that_every_replica_knows(replicas: Replicas) -> None:
    first, second = (replica.stub for replica in replicas)
    arrivals = pb.Arrivals(kind=pb.ARRIVAL_KIND_POISSON, rate_per_second=12.5)
    made = create(first, "shared", trace_csv(), source="a test's trace", arrivals=arrivals)
    assert (made.name, made.profile, made.request_count, made.source) == (
        "workloadModels/shared",
        False,
        500,
        "a test's trace",
    )
    assert made.arrivals == arrivals
    parameters = {parameter.name: parameter for parameter in made.parameters}
    assert list(parameters) == ["input_tokens", "output_tokens", "batch_size"]
    assert parameters["output_tokens"] == pb.Parameter(
        name="output_tokens", kind=pb.PARAMETER_KIND_INTEGER, bin_count=20, min=1, max=20, mean=10.5
    )
    assert (
        second.GetWorkloadModel(pb.GetWorkloadModelRequest(name=made.name), timeout=TIMEOUT_SECONDS).workload_model
        == made
    )
    assert made.name in names(second)
    assert len(column(sampled(second, made.name), "input_tokens")) == 1000
    second.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=made.name), timeout=TIMEOUT_SECONDS)
    assert made.name not in names(first)
    code, details = refusal(lambda: sampled(first, made.name))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "'workloadModels/shared' not found; ListWorkloadModels names all" in details


def test_a_model_that_was_deleted_and_made_anew_is_drawn_from_anew(replicas: Replicas) -> None:
    first, second = (replica.stub for replica in replicas)
    name = create(first, "anew", trace_csv(batch_sizes=[1])).name
    assert set(column(sampled(second, name), "batch_size")) == {1}
    first.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS)
    create(first, "anew", trace_csv(batch_sizes=[3]))
    assert set(column(sampled(second, name), "batch_size")) == {3}


def test_the_same_call_again_returns_the_model_there_is(replicas: Replicas) -> None:
    first, second = (replica.stub for replica in replicas)
    made = create(first, "again", trace_csv(), request_id="call-1")
    assert create(second, "again", trace_csv(), request_id="call-1") == made
    code, details = refusal(lambda: create(second, "again", trace_csv(), request_id="call-2"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details == "workloadModels/again already exists: choose another model_id or delete it"
    code, details = refusal(lambda: create(second, "again", trace_csv(), request_id="call-1", max_bin_count=5))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "with another specification" in details


def test_of_calls_at_once_for_one_name_one_makes_the_model(replicas: Replicas) -> None:
    content = trace_csv(50)
    spec = pb.WorkloadModelSpec(model_id="race", file_name="trace.csv", file_size_bytes=len(content))
    calls = [
        replicas[index % 2].stub.CreateWorkloadModel.future(
            messages(spec, content, f"id-{index}"), timeout=TIMEOUT_SECONDS
        )
        for index in range(6)
    ]
    codes = Counter(call.code() for call in calls)
    assert codes == {grpc.StatusCode.OK: 1, grpc.StatusCode.FAILED_PRECONDITION: 5}


def test_a_mounted_trace_and_a_folder_of_partitions_are_fitted(service: Any, traces: Path) -> None:
    (traces / "days").mkdir()
    (traces / "days" / "1.csv").write_bytes(trace_csv(100))
    (traces / "days" / "2.csv").write_bytes(trace_csv(200))
    assert create(service.stub, "one-day", path="days/1.csv").request_count == 100
    assert create(service.stub, "two-days", path="days").request_count == 300


def test_a_model_file_is_taken_as_it_is(service: Any, tmp_path: Path) -> None:
    from llmpilot_workload_generator.files.model_file import write_model  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_workload_generator.profiles import load_profile  # noqa: PLC0415

    profile = load_profile("code")
    write_model(tmp_path / "code.workload", profile)
    content = (tmp_path / "code.workload").read_bytes()
    made = create(service.stub, "as-it-is", content, file_name="code.workload")
    assert (made.request_count, made.cell_count, made.size_bytes) == (
        profile.request_count,
        len(profile.keys),
        len(content),
    )


def test_the_published_model_is_taken_with_its_46526_cells(service: Any, public_data: Path) -> None:
    content = next(public_data.glob("fmperf/**/*.pkl")).read_bytes()
    made = create(service.stub, "published", content, file_name="published.pkl")
    assert (made.cell_count, made.request_count) == (46_526, 8_497_715)


def test_profiles_are_listed_and_described_and_stay(service: Any) -> None:
    listed = names(service.stub)
    for profile in (
        "production",
        "code",
        "conversation",
        "summarization",
        "question-answering",
        "text-generation",
        "long-context",
    ):
        assert f"workloadModels/{profile}" in listed
    request = pb.GetWorkloadModelRequest(name="workloadModels/production")
    production = service.stub.GetWorkloadModel(request, timeout=TIMEOUT_SECONDS).workload_model
    assert production.profile
    assert production.source
    code, details = refusal(
        lambda: service.stub.DeleteWorkloadModel(
            pb.DeleteWorkloadModelRequest(name=production.name), timeout=TIMEOUT_SECONDS
        )
    )
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details == "workloadModels/production is a named profile, which cannot be deleted"


def test_pages_hold_every_model_once_also_when_some_go_between_them(service: Any, model: str) -> None:
    for index in range(5):
        create(service.stub, f"page-{index}", trace_csv(20))
    everything = names(service.stub)
    paged: list[str] = []
    token = ""
    while True:
        page = service.stub.ListWorkloadModels(
            pb.ListWorkloadModelsRequest(page_size=3, page_token=token), timeout=TIMEOUT_SECONDS
        )
        assert 1 <= len(page.workload_models) <= 3
        paged += [each.name for each in page.workload_models]
        token = page.next_page_token
        if not token:
            break
        if "workloadModels/page-0" in paged:
            code_or_ok(service, "workloadModels/page-0")
    assert paged == everything
    assert model in paged
    assert everything == sorted(everything)


def test_a_page_of_large_models_fits_into_a_message(nats_url: str, start_service: Callable[..., Any]) -> None:
    """80 models with 60 KB of names each; messages of 4 MiB are the most that a client takes."""
    content = b"input_tokens,output_tokens,user\n" + b"".join(b"1,1,%c%s\n" % (97 + n, b"x" * 3000) for n in range(20))
    with start_service(LLMPILOT_NATS_URL=nats_url) as service:
        for index in range(80):
            create(service.stub, f"wide-{index:02}", content, parameters=["input_tokens", "output_tokens", "user"])
        listed: list[str] = []
        token = ""
        while not listed or token:
            request = pb.ListWorkloadModelsRequest(page_token=token)
            page = service.stub.ListWorkloadModels(request, timeout=TIMEOUT_SECONDS)
            listed += [each.name for each in page.workload_models]
            token = page.next_page_token
        assert listed == sorted(set(listed))
        wide = [name for name in listed if "/wide-" in name]
        assert len(wide) == 80
        for name in wide:
            service.stub.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS)


def test_a_file_in_the_store_that_is_no_model_is_passed_over(service: Any, nats_url: str, model: str) -> None:
    async def put() -> None:
        client = await nats.connect(nats_url)
        try:
            bucket = await client.jetstream().object_store("WORKLOAD_MODELS")
            await bucket.put("by-hand", b"content")
        finally:
            await client.close()

    asyncio.run(put())
    listed = names(service.stub)
    assert model in listed
    assert "workloadModels/by-hand" not in listed
    code, _ = refusal(lambda: sampled(service.stub, "workloadModels/by-hand"))
    assert code is grpc.StatusCode.NOT_FOUND


def code_or_ok(service: Any, name: str) -> None:
    """Delete a model that may be gone."""
    try:
        service.stub.DeleteWorkloadModel(pb.DeleteWorkloadModelRequest(name=name), timeout=TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 any other is an error


def test_a_description_has_marginals_and_correlations(service: Any, model: str) -> None:
    described = service.stub.DescribeWorkloadModel(pb.DescribeWorkloadModelRequest(name=model), timeout=TIMEOUT_SECONDS)
    assert described.workload_model.name == model
    marginals = {marginal.parameter: marginal for marginal in described.marginals}
    batch = marginals["batch_size"]
    assert [(each.low, each.high, each.centre, each.count) for each in batch.bins] == [(1, 1, 1, 250), (2, 2, 2, 250)]
    assert batch.entropy_bits == pytest.approx(1)
    assert (marginals["output_tokens"].median, marginals["output_tokens"].p90) == (10, 18)
    assert len(described.correlations) == 3
    assert described.total_correlation_bits == pytest.approx(
        sum(marginal.entropy_bits for marginal in described.marginals) - described.entropy_bits
    )


def test_the_same_seed_gives_the_same_stream_however_it_is_cut_and_wherever_it_goes_on(
    replicas: Replicas, model: str
) -> None:
    first, second = (replica.stub for replica in replicas)
    whole = sampled(first, model, request_count=10_000, seed=7)
    cut = sampled(second, model, request_count=10_000, seed=7, batch_size=999)
    rest = sampled(second, model, start_index=6_500, request_count=3_500, seed=7)
    other = sampled(first, model, request_count=10_000, seed=8)
    assert [batch.start_index for batch in cut[:3]] == [0, 999, 1998]
    assert sum(batch.request_count for batch in cut) == 10_000
    for name in ("input_tokens", "output_tokens", "batch_size"):
        assert np.array_equal(column(whole, name), column(cut, name))
        assert np.array_equal(column(whole, name)[6_500:], column(rest, name))
    assert not np.array_equal(column(whole, "input_tokens"), column(other, "input_tokens"))


def test_columns_have_the_narrowest_type_of_the_whole_range(service: Any, model: str) -> None:
    (batch,) = sampled(service.stub, model, request_count=10)
    assert {each.parameter: each.type for each in batch.columns} == {
        "input_tokens": pb.PACKED_TYPE_UINT16,
        "output_tokens": pb.PACKED_TYPE_UINT8,
        "batch_size": pb.PACKED_TYPE_UINT8,
    }
    scales = [pb.Scale(parameter="input_tokens", factor=1000), pb.Scale(parameter="output_tokens", factor=13)]
    (batch,) = sampled(service.stub, model, request_count=10_000, scales=scales)
    types = {each.parameter: each.type for each in batch.columns}
    assert (types["input_tokens"], types["output_tokens"]) == (pb.PACKED_TYPE_UINT32, pb.PACKED_TYPE_UINT16)
    assert column([batch], "input_tokens").max() > 250_000


def test_samples_have_the_mean_of_the_trace_and_obey_conditions(service: Any, model: str) -> None:
    """Of 40,000 outputs, uniform on 1..20 (sd 5.77): four standard errors are 0.115."""
    outputs = column(sampled(service.stub, model, request_count=40_000), "output_tokens")
    assert outputs.mean() == pytest.approx(10.5, abs=4 * math.sqrt((20**2 - 1) / 12 / 40_000))
    batches = sampled(service.stub, model, conditions=["output_tokens <= 5", "batch_size = 1"])
    assert set(column(batches, "output_tokens")) <= set(range(1, 6))
    assert set(column(batches, "batch_size")) == {1}


def test_arrivals_are_sent_only_where_there_are_any(service: Any, model: str) -> None:
    (closed,) = sampled(service.stub, model, request_count=100)
    assert closed.arrival_nanos == b""
    arrivals = pb.Arrivals(kind=pb.ARRIVAL_KIND_CONSTANT, rate_per_second=1000)
    (constant,) = sampled(service.stub, model, request_count=100, arrivals=arrivals)
    nanos = np.frombuffer(constant.arrival_nanos, "<i8")
    assert set(np.diff(nanos)) == {1_000_000}


def test_a_stream_without_end_goes_on_until_the_client_has_enough(service: Any, model: str) -> None:
    stream = service.stub.SampleRequests(
        pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=model), batch_size=1000), timeout=TIMEOUT_SECONDS
    )
    starts = [batch.start_index for batch in islice(stream, 50)]
    stream.cancel()
    assert starts == list(range(0, 50_000, 1000))


def test_a_replayed_trace_is_given_in_its_order_with_its_times_and_ends(service: Any) -> None:
    rows = [
        f"2023-11-16 18:15:{index // 10:02}.{index % 10}000000,{10 + index * 7 % 300},{index % 9 + 1}"
        for index in range(300)
    ]
    content = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]).encode()
    arrivals = pb.Arrivals(kind=pb.ARRIVAL_KIND_TRACE, speed=2)
    made = create(service.stub, "replayed", content, keep_replay=True, arrivals=arrivals)
    assert (made.replay_request_count, made.first_request_time.seconds) == (300, 1_700_158_500)
    batches = sampled(service.stub, made.name, request_count=0, replay=True, batch_size=77)
    assert sum(batch.request_count for batch in batches) == 300
    assert column(batches, "input_tokens").tolist() == [int(row.split(",")[1]) for row in rows]
    nanos = np.concatenate([np.frombuffer(batch.arrival_nanos, "<i8") for batch in batches])
    assert nanos.tolist() == [index * 50_000_000 for index in range(300)]
    assert sampled(service.stub, made.name, start_index=300, request_count=0, replay=True) == []


def rendered(
    stub: WorkloadServiceStub, model: str, count: int = 600, **request: Any
) -> list[pb.StreamRequestsResponse]:
    asked = pb.StreamRequestsRequest(sampling=pb.Sampling(workload_model=model, seed=3), request_count=count, **request)
    return list(stub.StreamRequests(asked, timeout=TIMEOUT_SECONDS))


def test_prompts_have_the_drawn_tokens_and_messages_are_bounded(
    service: Any, model: str, public_tokenizer: Tokenizer
) -> None:
    answers = rendered(service.stub, model)
    requests = [request for answer in answers for request in answer.requests]
    assert [request.index for request in requests] == list(range(600))
    drawn = sampled(service.stub, model, request_count=600, seed=3)
    assert [request.input_tokens for request in requests] == column(drawn, "input_tokens").tolist()
    assert [request.output_tokens for request in requests] == column(drawn, "output_tokens").tolist()
    assert [len(request.prompts) for request in requests] == column(drawn, "batch_size").tolist()
    assert all(not request.bodies and not request.HasField("arrival_offset") for request in requests)
    for request in requests[:100]:
        for prompt in request.prompts:
            assert len(public_tokenizer.encode(prompt).ids) == request.input_tokens
    assert all(len(answer.requests) <= 256 for answer in answers)
    assert all(sum(each.input_tokens * len(each.prompts) for each in answer.requests) <= 65_536 for answer in answers)


def test_a_prompt_stream_goes_on_where_it_broke_off(service: Any, model: str) -> None:
    whole = [each for answer in rendered(service.stub, model, 300) for each in answer.requests]
    rest = [each for answer in rendered(service.stub, model, 100, start_index=200) for each in answer.requests]
    assert rest == whole[200:]


def test_a_request_larger_than_a_message_is_sent_alone(service: Any) -> None:
    content = b"input_tokens,output_tokens\n" + b"90000,5\n" * 3
    name = create(service.stub, "large", content).name
    answers = rendered(service.stub, name, 3)
    assert [[each.input_tokens for each in answer.requests] for answer in answers] == [[90_000]] * 3


def test_bodies_are_written_for_the_named_server(service: Any, model: str) -> None:
    (answer,) = rendered(
        service.stub, model, 5, server=pb.SERVER_OPENAI_COMPLETIONS, served_model="llm", fixed_output_length=True
    )
    for request in answer.requests:
        (body,) = map(json.loads, request.bodies)
        assert body["model"] == "llm"
        assert body["max_tokens"] == request.output_tokens
        assert body["prompt"] == (list(request.prompts) if len(request.prompts) > 1 else request.prompts[0])
    (answer,) = rendered(service.stub, model, 5, server=pb.SERVER_TGI)
    assert [len(request.bodies) for request in answer.requests] == [len(request.prompts) for request in answer.requests]


def test_bodies_for_tgis_are_its_messages(service: Any, model: str) -> None:
    from fmaas.generation_pb2 import BatchedGenerationRequest  # noqa: PLC0415

    (answer,) = rendered(service.stub, model, 5, server=pb.SERVER_TGIS, fixed_output_length=True)
    for request in answer.requests:
        (body,) = map(BatchedGenerationRequest.FromString, request.bodies)
        assert [each.text for each in body.requests] == list(request.prompts)
        assert body.params.stopping.max_new_tokens == request.output_tokens


@pytest.fixture(scope="module")
def public_tokenizer() -> Tokenizer:
    """The service's default tokenizer, read by the library alone."""
    from llmpilot_workload_generator.prompts import tokenizer  # noqa: PLC0415

    return Tokenizer.from_file(str(Path(tokenizer.__file__).parents[1] / "data" / "tokenizer.json"))


def test_metrics_count_what_was_sent(
    service: Any, model: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    def sent() -> float:
        return float(service.metric("llmpilot_workload_requests_sent_total", method="SampleRequests"))

    before = sent()
    sampled(service.stub, model, request_count=1234)
    eventually(lambda: sent() - before == 1234)
    assert service.metric("llmpilot_workload_models_created_total") >= 1
