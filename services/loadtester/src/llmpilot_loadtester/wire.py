"""Between protobuf and domain: requests and load tests. Reading a request collects every violation before it refuses.

Invariant: what leaves `read_create_request` can be run; what `write_load_test` gives has no secret.
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from google.protobuf.message import Message

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, PilotError, Violation
from llmpilot_contracts.job import State
from llmpilot_loadtester import wire_results
from llmpilot_loadtester.domain.load_test import COLLECTION, LoadTest
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import LoadTestSpec
from llmpilot_loadtester.wire_llm import write_measurement
from llmpilot_loadtester.wire_spec import read_spec, write_spec
from llmpilot_servicekit.jobs import job_requests
from llmpilot_servicekit.jobs.job_requests import id_of_request, id_violations, read_page, read_watch, write_time

DEFAULT_PAGE_SIZE = 100
_EXAMPLE = "lt-1"
LARGEST_SHOWN_SPEC_BYTES = 32 * 1024
"""It is in every snapshot, which is one message on NATS, and in lists."""
WriteMeasurement = Callable[[StageResult, str, bool], Message]
"""Makes the event of a result, an event id and whether the server is a simulator."""

STATES = {
    State.PENDING: pb.STATE_PENDING,
    State.RUNNING: pb.STATE_RUNNING,
    State.SUCCEEDED: pb.STATE_SUCCEEDED,
    State.FAILED: pb.STATE_FAILED,
    State.CANCELLED: pb.STATE_CANCELLED,
}
_STATES_READ = {wire: state for state, wire in STATES.items()}


def read_create_request(request: pb.CreateLoadTestRequest) -> tuple[LoadTest, bytes]:
    """Return the load test that is asked for, and its whole specification to keep; raises InvalidInputError."""
    ids = id_violations(request.request_id, request.load_test_id, id_field="load_test_id")
    violations: list[Violation] = list(ids)
    spec = read_spec(request.spec, violations)
    if spec is not None and (size_bytes := write_spec(spec).ByteSize()) > LARGEST_SHOWN_SPEC_BYTES:
        allowed = f"may have {LARGEST_SHOWN_SPEC_BYTES:,} bytes beside prompts, tokenizers, certificates and keys"
        violations.append(Violation("spec", f"{allowed}, has {size_bytes:,}: give fewer steps, conditions or headers"))
    if spec is None or violations:
        raise InvalidInputError(violations)
    load_test = LoadTest(
        id=request.load_test_id or id_of_request("lt", request.request_id),
        spec=spec,
        request_id=request.request_id,
        create_time=datetime.now(UTC),
        spec_digest=_digest(request.spec),
    )
    return load_test, request.spec.SerializeToString()


def read_kept_spec(content: bytes) -> tuple[LoadTestSpec, WriteMeasurement | None]:
    """Return a spec as it was accepted, and what makes measurements of it if it names what was measured.

    Raises InvalidInputError where another version of the load tester has accepted it.
    """
    kept = pb.LoadTestSpec.FromString(content)
    violations: list[Violation] = []
    spec = read_spec(kept, violations)
    if spec is None or violations:
        raise InvalidInputError(violations)
    return spec, partial(write_measurement, kept) if kept.llm.name else None


def _digest(spec: pb.LoadTestSpec) -> str:
    """Return what tells specifications apart, and does not tell the keys."""
    public = pb.LoadTestSpec()
    public.CopyFrom(spec)
    public.target.api_key = ""
    for header in public.target.headers:
        header.value = ""
    return hashlib.sha256(public.SerializeToString(deterministic=True)).hexdigest()


def read_name(name: str) -> str:
    """Return the id in a load test's resource name; raises InvalidInputError."""
    return job_requests.read_name(LoadTest, name, example=_EXAMPLE)


def read_list_request(request: pb.ListLoadTestsRequest) -> tuple[str, int]:
    """Return after which id a page begins and how many load tests it has at most."""
    return read_page(request.page_size, request.page_token, default_size=DEFAULT_PAGE_SIZE)


def read_watch_request(request: pb.WatchLoadTestRequest) -> tuple[str, int]:
    """Return the id of a load test and the index of the first event; raises InvalidInputError."""
    return read_watch(LoadTest, request.name, request.start_index, example=_EXAMPLE)


def write_load_test(load_test: LoadTest, *, with_results: bool = True) -> pb.LoadTest:
    """Return a load test as a client sees it."""
    return pb.LoadTest(
        name=load_test.name,
        spec=write_spec(load_test.spec),
        state=STATES[load_test.state],
        error=load_test.error,
        create_time=write_time(load_test.create_time),
        end_time=write_time(load_test.end_time),
        results=[wire_results.write_result(result) for result in load_test.results] if with_results else (),
        found_load=load_test.found_load,
        simulated=load_test.simulated,
        served_model=load_test.served_model,
        request_id=load_test.request_id,
    )


def read_load_test(wire: pb.LoadTest) -> LoadTest:
    """Return a load test as this service, or its client, got it from this service."""
    violations: list[Violation] = []
    spec = read_spec(wire.spec, violations, checked=False)
    if spec is None or wire.state not in _STATES_READ:
        raise PilotError(f"{wire.name} was written by another version of the load tester: {violations}")
    return LoadTest(
        id=wire.name.removeprefix(COLLECTION),
        spec=spec,
        request_id=wire.request_id,
        create_time=wire.create_time.ToDatetime(UTC),
        state=_STATES_READ[wire.state],
        error=wire.error,
        end_time=wire.end_time.ToDatetime(UTC) if wire.HasField("end_time") else None,
        results=tuple(wire_results.read_result(result) for result in wire.results),
        found_load=wire.found_load if wire.HasField("found_load") else None,
        simulated=wire.simulated,
        served_model=wire.served_model,
    )
