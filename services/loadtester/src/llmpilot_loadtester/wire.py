"""Between protobuf and domain: requests and load tests. Reading a request collects every violation before it refuses.

Invariant: what leaves `read_create_request` can be run; what `write_load_test` gives has no secret.
"""

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, PilotError, Violation
from llmpilot_loadtester import wire_results
from llmpilot_loadtester.domain.load_test import COLLECTION, LoadTest, State
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import LoadTestSpec
from llmpilot_loadtester.wire_llm import write_measurement
from llmpilot_loadtester.wire_spec import read_spec, write_spec

LARGEST_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
LARGEST_REQUEST_ID = 128
LARGEST_SHOWN_SPEC_BYTES = 32 * 1024
"""It is in every snapshot, which is one message on NATS, and in lists."""
WriteMeasurement = Callable[[StageResult, str, bool], Message]
"""Makes the event of a result, an event id and whether the server is a simulator."""
LOAD_TEST_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SHOWN = 80
"""Characters of a wrong text in a message."""

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
    violations: list[Violation] = []
    if not 1 <= len(request.request_id) <= LARGEST_REQUEST_ID:
        violations.append(
            Violation("request_id", f"must have 1 to {LARGEST_REQUEST_ID} characters, has {len(request.request_id)}")
        )
    load_test_id = request.load_test_id
    if load_test_id and not LOAD_TEST_ID.fullmatch(load_test_id):
        description = 'must be 1 to 63 lower-case letters, digits and "-", not "-" at either end, is '
        violations.append(Violation("load_test_id", f"{description}{_shown(load_test_id)}"))
    spec = read_spec(request.spec, violations)
    if spec is not None and (size_bytes := write_spec(spec).ByteSize()) > LARGEST_SHOWN_SPEC_BYTES:
        allowed = f"may have {LARGEST_SHOWN_SPEC_BYTES:,} bytes beside prompts, tokenizers, certificates and keys"
        violations.append(Violation("spec", f"{allowed}, has {size_bytes:,}: give fewer steps, conditions or headers"))
    if spec is None or violations:
        raise InvalidInputError(violations)
    load_test = LoadTest(
        id=load_test_id or f"lt-{hashlib.sha256(request.request_id.encode()).hexdigest()[:16]}",
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
    load_test_id = name.removeprefix(COLLECTION)
    if not name.startswith(COLLECTION) or not LOAD_TEST_ID.fullmatch(load_test_id):
        raise InvalidInputError([Violation("name", f'must be like "{COLLECTION}lt-1", is {_shown(name)}')])
    return load_test_id


def read_list_request(request: pb.ListLoadTestsRequest) -> tuple[str, int]:
    """Return after which id a page begins and how many load tests it has at most; the token is the last id before."""
    violations = []
    if not 0 <= request.page_size <= LARGEST_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be between 0 and {LARGEST_PAGE_SIZE}, is {request.page_size}"))
    if request.page_token and not LOAD_TEST_ID.fullmatch(request.page_token):
        violations.append(Violation("page_token", f"{_shown(request.page_token)} is not the next_page_token of a page"))
    if violations:
        raise InvalidInputError(violations)
    return request.page_token, request.page_size or DEFAULT_PAGE_SIZE


def read_watch_request(request: pb.WatchLoadTestRequest) -> tuple[str, int]:
    """Return the id of a load test and the index of the first event; raises InvalidInputError."""
    violations = []
    if request.start_index < 0:
        violations.append(Violation("start_index", f"must be >= 0, is {request.start_index}"))
    try:
        load_test_id = read_name(request.name)
    except InvalidInputError as error:
        violations += error.violations
    if violations:
        raise InvalidInputError(violations)
    return load_test_id, request.start_index


def write_load_test(load_test: LoadTest, *, with_results: bool = True) -> pb.LoadTest:
    """Return a load test as a client sees it."""
    return pb.LoadTest(
        name=load_test.name,
        spec=write_spec(load_test.spec),
        state=STATES[load_test.state],
        error=load_test.error,
        create_time=_write_time(load_test.create_time),
        end_time=_write_time(load_test.end_time),
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


def _write_time(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    written = Timestamp()
    written.FromDatetime(time)
    return written


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
