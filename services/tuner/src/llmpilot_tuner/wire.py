"""Between protobuf and domain: requests and tunings. Reading a request collects every violation before it refuses.

Invariant: what leaves `read_create_request` can be run.
"""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, PilotError, Violation
from llmpilot_contracts.job import State
from llmpilot_servicekit.jobs import job_requests
from llmpilot_servicekit.jobs.job_requests import id_of_request, id_violations, read_page, read_watch, write_time
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.domain.tuning import COLLECTION, Tuning
from llmpilot_tuner.wire_spec import read_spec, write_spec

DEFAULT_PAGE_SIZE = 50
_EXAMPLE = "tn-1"
STATES = {
    State.PENDING: pb.STATE_PENDING,
    State.RUNNING: pb.STATE_RUNNING,
    State.SUCCEEDED: pb.STATE_SUCCEEDED,
    State.FAILED: pb.STATE_FAILED,
    State.CANCELLED: pb.STATE_CANCELLED,
}
_STATES_READ = {wire: state for state, wire in STATES.items()}


def read_create_request(request: pb.CreateTuningRequest) -> tuple[Tuning, bytes]:
    """Return the tuning that is asked for, and its specification to keep; raises InvalidInputError.

    PreconditionError: the LLM is larger than its GPUs.
    """
    violations = list(id_violations(request.request_id, request.tuning_id, id_field="tuning_id"))
    spec = read_spec(request.spec, violations)
    if spec is None or violations:
        raise InvalidInputError(violations)
    tuning = Tuning(
        id=request.tuning_id or id_of_request("tn", request.request_id),
        spec=spec,
        request_id=request.request_id,
        create_time=datetime.now(UTC),
        spec_digest=hashlib.sha256(request.spec.SerializeToString(deterministic=True)).hexdigest(),
    )
    return tuning, write_spec(spec).SerializeToString()  # with its defaults, which another version may change


def read_kept_spec(content: bytes) -> TuningSpec:
    """Return a spec as it was accepted; InvalidInputError: another version of the tuner accepted it."""
    violations: list[Violation] = []
    spec = read_spec(pb.TuningSpec.FromString(content), violations)
    if spec is None or violations:
        raise InvalidInputError(violations)
    return spec


def read_name(name: str) -> str:
    """Return the id in a tuning's resource name; raises InvalidInputError."""
    return job_requests.read_name(Tuning, name, example=_EXAMPLE)


def read_list_request(request: pb.ListTuningsRequest) -> tuple[str, int]:
    """Return after which id a page begins and how many tunings it has at most."""
    return read_page(request.page_size, request.page_token, default_size=DEFAULT_PAGE_SIZE)


def read_watch_request(request: pb.WatchTuningRequest) -> tuple[str, int]:
    """Return the id of a tuning and the index of the first event; raises InvalidInputError."""
    return read_watch(Tuning, request.name, request.start_index, example=_EXAMPLE)


def write_tuning(tuning: Tuning) -> pb.Tuning:
    """Return a tuning as a client sees it."""
    return pb.Tuning(
        name=tuning.name,
        spec=write_spec(tuning.spec),
        state=STATES[tuning.state],
        error=tuning.error,
        create_time=write_time(tuning.create_time),
        end_time=write_time(tuning.end_time),
        max_batch_weight=tuning.max_batch_weight,
        report_json=tuning.report_json,
        measured=tuning.measured,
        probe_count=tuning.probe_count,
        request_id=tuning.request_id,
        from_cache=tuning.from_cache,
    )


def read_tuning(wire: pb.Tuning) -> Tuning:
    """Return a tuning as this service, or its client, got it from this service."""
    violations: list[Violation] = []
    spec = read_spec(wire.spec, violations, checked=False)
    if spec is None or wire.state not in _STATES_READ:
        raise PilotError(f"{wire.name} was written by another version of the tuner: {violations}")
    return Tuning(
        id=wire.name.removeprefix(COLLECTION),
        spec=spec,
        request_id=wire.request_id,
        create_time=wire.create_time.ToDatetime(UTC),
        state=_STATES_READ[wire.state],
        error=wire.error,
        end_time=wire.end_time.ToDatetime(UTC) if wire.HasField("end_time") else None,
        max_batch_weight=wire.max_batch_weight if wire.HasField("max_batch_weight") else None,
        report_json=wire.report_json,
        measured=wire.measured,
        probe_count=wire.probe_count,
        from_cache=wire.from_cache,
    )


def in_list(tuning: Tuning) -> Tuning:
    """Leave out what a list of tunings has no room for: the report, and the text of the config.json."""
    return replace(tuning, report_json="", spec=replace(tuning.spec, config_json=""))
