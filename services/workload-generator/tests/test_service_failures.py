"""Clients that vanish or stop reading, NATS that comes and goes, a service that stops: nothing is lost or leaks."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub
from llmpilot_servicekit.nats_server import NatsServer, start_nats_server

TIMEOUT_SECONDS = 60
MEGABYTE = 1024 * 1024
TRACE = b"input_tokens,output_tokens\n" + b"".join(b"%d,%d\n" % (n % 500 + 1, n % 9 + 1) for n in range(1000))
PRODUCTION = "workloadModels/production"

Eventually = Callable[[Callable[[], bool]], None]
StartService = Callable[..., Any]

READER = """
import sys, time
import grpc
from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot.workload.v1.workload_pb2_grpc import WorkloadServiceStub
stub = WorkloadServiceStub(grpc.insecure_channel(sys.argv[1]))
sampling = pb.Sampling(workload_model="workloadModels/production")
stream = getattr(stub, sys.argv[2])(getattr(pb, sys.argv[2] + "Request")(sampling=sampling))
print(len(next(stream).SerializeToString()), flush=True)
if sys.argv[3] == "reads":
    for message in stream:
        pass
time.sleep(600)
"""
"""A client that reads one message of an endless stream, then all or none of the others."""


def model_messages(model_id: str, content: bytes) -> Iterator[pb.CreateWorkloadModelRequest]:
    spec = pb.WorkloadModelSpec(model_id=model_id, file_name="trace.csv", file_size_bytes=len(content))
    yield pb.CreateWorkloadModelRequest(spec=spec, request_id=model_id)
    yield pb.CreateWorkloadModelRequest(chunk=content)


def create(stub: WorkloadServiceStub, model_id: str) -> pb.WorkloadModel:
    answer = stub.CreateWorkloadModel(model_messages(model_id, TRACE), timeout=TIMEOUT_SECONDS)
    return answer.workload_model


def open_calls(service: Any) -> float:
    return float(service.metric("llmpilot_workload_open_calls"))


def sample_production(stub: WorkloadServiceStub, count: int = 1000) -> int:
    request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=PRODUCTION), request_count=count)
    return sum(batch.request_count for batch in stub.SampleRequests(request, timeout=TIMEOUT_SECONDS))


@pytest.fixture
def start_reader() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts clients in processes of their own; returns when the first message has come."""
    started: list[subprocess.Popen[bytes]] = []

    def start(address: str, method: str, manner: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", READER, address, method, manner]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("method", ["SampleRequests", "StreamRequests"])
def test_a_client_that_stops_reading_costs_little_and_nothing_once_it_is_gone(
    service: Any, start_reader: Callable[..., subprocess.Popen[bytes]], eventually: Eventually, method: str
) -> None:
    start_reader(service.grpc_address, method, "stops").kill()
    eventually(lambda: open_calls(service) == 0)

    def sent() -> float:
        return float(service.metric("llmpilot_workload_requests_sent_total", method=method))

    memory = psutil.Process(service.process.pid).memory_info
    before_bytes = memory().rss
    readers = [start_reader(service.grpc_address, method, "stops") for _ in range(4)]
    assert open_calls(service) == 4
    stalled_since, last = time.monotonic(), sent()
    while time.monotonic() - stalled_since < 0.5:  # no message was taken for so long
        if (now := sent()) != last:
            stalled_since, last = time.monotonic(), now
    assert memory().rss - before_bytes < 4 * 12 * MEGABYTE
    assert sample_production(service.stub) == 1000
    for reader in readers:
        reader.kill()
    eventually(lambda: open_calls(service) == 0)


def test_clients_that_come_and_vanish_leave_nothing(
    service: Any, start_reader: Callable[..., subprocess.Popen[bytes]], eventually: Eventually
) -> None:
    memory = psutil.Process(service.process.pid).memory_info
    sample_production(service.stub, 1_000_000)
    before_bytes = memory().rss
    for _ in range(3):
        readers = [start_reader(service.grpc_address, "SampleRequests", "reads") for _ in range(2)]
        assert open_calls(service) == 2
        for reader in readers:
            reader.kill()
        eventually(lambda: open_calls(service) == 0)
    for _ in range(50):
        request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=PRODUCTION))
        stream = service.stub.SampleRequests(request, timeout=TIMEOUT_SECONDS)
        next(stream)
        stream.cancel()
    eventually(lambda: open_calls(service) == 0)
    assert memory().rss - before_bytes < 32 * MEGABYTE


def test_a_stream_that_begins_late_among_random_arrivals_ends_with_its_client(
    service: Any, eventually: Eventually
) -> None:
    """All gaps before it have to be added up, which takes ten seconds, and no call waits for that meanwhile."""
    arrivals = pb.Arrivals(kind=pb.ARRIVAL_KIND_POISSON, rate_per_second=1e6)
    sampling = pb.Sampling(workload_model=PRODUCTION, arrivals=arrivals)
    late = service.stub.SampleRequests(
        pb.SampleRequestsRequest(sampling=sampling, start_index=10**9), timeout=TIMEOUT_SECONDS
    )
    eventually(lambda: open_calls(service) == 1)
    assert sample_production(service.stub) == 1000
    late.cancel()
    eventually(lambda: open_calls(service) == 0)


def test_a_client_that_vanishes_while_it_sends_leaves_nothing(service: Any, eventually: Eventually) -> None:
    sent, model_id = threading.Event(), f"vanished-{uuid.uuid4().hex[:8]}"

    def half() -> Iterator[pb.CreateWorkloadModelRequest]:
        first, chunk = model_messages(model_id, TRACE)
        first.spec.file_size_bytes *= 2
        yield first
        yield chunk
        sent.set()
        threading.Event().wait(TIMEOUT_SECONDS)

    channel = grpc.insecure_channel(service.grpc_address)
    with closing(channel):
        call = WorkloadServiceStub(channel).CreateWorkloadModel.future(half(), timeout=TIMEOUT_SECONDS)
        assert sent.wait(TIMEOUT_SECONDS)
        eventually(lambda: any(path.stat().st_size for path in service.uploads.rglob("*.csv")))
        assert open_calls(service) == 1
    assert call.cancelled() or call.code() is not grpc.StatusCode.OK
    eventually(lambda: open_calls(service) == 0)
    eventually(lambda: list(service.uploads.iterdir()) == [])
    request = pb.GetWorkloadModelRequest(name=f"workloadModels/{model_id}")
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.GetWorkloadModel(request, timeout=TIMEOUT_SECONDS)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_client_that_sends_nothing_is_told_so(nats_url: str, start_service: StartService) -> None:
    with start_service(LLMPILOT_NATS_URL=nats_url, LLMPILOT_UPLOAD_IDLE_SECONDS="0.2") as service:
        hold = threading.Event()

        def silent() -> Iterator[pb.CreateWorkloadModelRequest]:
            yield next(model_messages("silent", TRACE))
            hold.wait(TIMEOUT_SECONDS)

        with pytest.raises(grpc.RpcError) as caught:
            service.stub.CreateWorkloadModel(silent(), timeout=TIMEOUT_SECONDS)
        hold.set()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "nothing came for 0.2 s: send the file again"
        assert list(service.uploads.iterdir()) == []


def test_a_creation_too_many_is_told_to_come_again(
    nats_url: str, start_service: StartService, eventually: Eventually
) -> None:
    with start_service(LLMPILOT_NATS_URL=nats_url, LLMPILOT_MAX_CREATIONS="1") as service:
        hold = threading.Event()

        def slow() -> Iterator[pb.CreateWorkloadModelRequest]:
            first, chunk = model_messages("slow", TRACE)
            yield first
            hold.wait(TIMEOUT_SECONDS)
            yield chunk

        call = service.stub.CreateWorkloadModel.future(slow(), timeout=TIMEOUT_SECONDS)
        eventually(lambda: len(list(service.uploads.iterdir())) == 1)
        with pytest.raises(grpc.RpcError) as caught:
            create(service.stub, "too-many")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "1 models are being made, which is the most at once: try again"
        hold.set()
        assert call.result().workload_model.request_count == 1000
        assert create(service.stub, "not-too-many").request_count == 1000


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


def test_profiles_answer_without_nats_and_models_outlive_it(
    start_nats: Callable[[int | None], NatsServer], start_service: StartService, eventually: Eventually
) -> None:
    """Away at the start, up, killed, up again on the same store."""
    first = start_nats(None)
    port = int(first.url.rpartition(":")[2])
    first.kill()
    with start_service(LLMPILOT_NATS_URL=first.url) as service:

        def is_away() -> bool:
            try:
                service.stub.ListWorkloadModels(pb.ListWorkloadModelsRequest(), timeout=TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE and "NATS at nats://" in str(error.details())
            return False

        assert is_away()
        assert sample_production(service.stub) == 1000
        with pytest.raises(grpc.RpcError) as caught:
            create(service.stub, "kept")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        second = start_nats(port)
        eventually(lambda: not is_away())
        made = create(service.stub, "kept")
        second.kill()
        eventually(is_away)
        assert sample_production(service.stub) == 1000
        start_nats(port)
        eventually(lambda: not is_away())
        request = pb.GetWorkloadModelRequest(name=made.name)
        assert service.stub.GetWorkloadModel(request, timeout=TIMEOUT_SECONDS).workload_model == made


@pytest.mark.parametrize("manner", ["reads", "stops"])
def test_streams_without_end_do_not_hold_the_service_up_when_it_stops(
    nats_url: str, start_service: StartService, start_reader: Callable[..., subprocess.Popen[bytes]], manner: str
) -> None:
    """The grace period is longer than the test may take.

    Who reads on learns that the service stops, who is too slow for that is cut off; UNAVAILABLE to both.
    """
    with start_service(LLMPILOT_NATS_URL=nats_url, LLMPILOT_SHUTDOWN_GRACE_SECONDS="100") as service:
        start_reader(service.grpc_address, "SampleRequests", manner)
        request = pb.SampleRequestsRequest(sampling=pb.Sampling(workload_model=PRODUCTION))
        stream = service.stub.SampleRequests(request, timeout=TIMEOUT_SECONDS)
        next(stream)
        service.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert service.process.wait(30) == 0


def test_a_creation_does_not_hold_the_service_up_when_it_stops(
    nats_url: str, start_service: StartService, eventually: Eventually
) -> None:
    with start_service(LLMPILOT_NATS_URL=nats_url, LLMPILOT_SHUTDOWN_GRACE_SECONDS="100") as service:
        hold = threading.Event()

        def slow() -> Iterator[pb.CreateWorkloadModelRequest]:
            yield next(model_messages("stopped", TRACE))
            hold.wait(TIMEOUT_SECONDS)

        call = service.stub.CreateWorkloadModel.future(slow(), timeout=TIMEOUT_SECONDS)
        eventually(lambda: len(list(service.uploads.iterdir())) == 1)
        service.process.terminate()
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        hold.set()
        assert service.process.wait(30) == 0
        assert list(service.uploads.iterdir()) == []


def test_the_service_serves_within_two_seconds(start_service: StartService) -> None:
    """Of its own processor time: how busy the machine is, is no fault of the service."""
    with start_service(LLMPILOT_NATS_URL="nats://127.0.0.1:1") as service:
        spent = psutil.Process(service.process.pid).cpu_times()
        assert spent.user + spent.system < 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLMPILOT_TRACES", "/no/such/folder"), ("LLMPILOT_MAX_UPLOAD_BYTES", "0"), ("LLMPILOT_MAX_CREATIONS", "many")],
)
def test_a_wrong_setting_is_named(variable: str, value: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "llmpilot_workload_generator"],
        env={**os.environ, "LLMPILOT_LISTEN": "127.0.0.1:0", variable: value},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {variable}: must ")
