"""Between protobuf and domain, of models. Reading a request collects every violation before it refuses.

Invariant: what leaves a `read_*` function is checked; the domain does not check again.
"""

import hashlib
import re
from datetime import datetime
from pathlib import Path

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.files.model_header import MOST_BINS
from llmpilot_workload_generator.model import MAX_BINS, ArrivalKind, Arrivals, Kind
from llmpilot_workload_generator.model_creation import MODEL_SUFFIXES, Recipe
from llmpilot_workload_generator.model_store import Origin, StoredModel
from llmpilot_workload_generator.model_summary import ParameterSummary
from llmpilot_workload_generator.profiles import PROFILE_NAMES
from llmpilot_workload_generator.sampling.arrivals import arrival_violations

COLLECTION = "workloadModels/"
LARGEST_PAGE_SIZE = 1000
LARGEST_REQUEST_ID = 128
LARGEST_TEXT = 1000
LARGEST_PARAMETER_COUNT = 64
MODEL_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]{0,127}")
_SHOWN = 80
"""Characters of a wrong text in a message."""

KINDS = {
    Kind.INTEGER: pb.PARAMETER_KIND_INTEGER,
    Kind.NUMBER: pb.PARAMETER_KIND_NUMBER,
    Kind.CATEGORY: pb.PARAMETER_KIND_CATEGORY,
}
ARRIVAL_KINDS = {
    ArrivalKind.CLOSED: pb.ARRIVAL_KIND_CLOSED,
    ArrivalKind.CONSTANT: pb.ARRIVAL_KIND_CONSTANT,
    ArrivalKind.POISSON: pb.ARRIVAL_KIND_POISSON,
    ArrivalKind.GAMMA: pb.ARRIVAL_KIND_GAMMA,
    ArrivalKind.TRACE: pb.ARRIVAL_KIND_TRACE,
    ArrivalKind.ALL_AT_ONCE: pb.ARRIVAL_KIND_ALL_AT_ONCE,
}
_ARRIVAL_KINDS_READ = {wire: kind for kind, wire in ARRIVAL_KINDS.items()}
_KINDS_WITH_A_RATE = (ArrivalKind.CONSTANT, ArrivalKind.POISSON, ArrivalKind.GAMMA)


def read_create_request(request: pb.CreateWorkloadModelRequest | None) -> tuple[Recipe, Origin]:
    """Return what the first message of a creation asks for; raises InvalidInputError."""
    if request is None or request.WhichOneof("payload") != "spec":
        raise InvalidInputError([Violation("spec", "must be in the first message")])
    violations: list[Violation] = []
    spec = request.spec
    if not 1 <= len(request.request_id) <= LARGEST_REQUEST_ID:
        violations.append(
            Violation("request_id", f"must have 1 to {LARGEST_REQUEST_ID} characters, has {len(request.request_id)}")
        )
    if not MODEL_ID.fullmatch(spec.model_id):
        violations.append(
            Violation(
                "spec.model_id",
                f'must be 1 to 63 lower-case letters, digits and "-", not "-" at either end, is {shown(spec.model_id)}',
            )
        )
    elif spec.model_id in PROFILE_NAMES:
        violations.append(Violation("spec.model_id", f"{spec.model_id!r} is the name of a profile"))
    _check_file(spec, violations)
    _check_fit(spec, violations)
    arrivals = _read_own_arrivals(spec, violations)
    if violations:
        raise InvalidInputError(violations)
    recipe = Recipe(
        model_id=spec.model_id,
        mounted_path=spec.path,
        file_name=spec.file_name,
        file_size_bytes=spec.file_size_bytes,
        format_name=spec.format or None,
        parameters=tuple(spec.parameters),
        max_bins=spec.max_bin_count or MAX_BINS,
        source=spec.source,
        keep_replay=spec.keep_replay,
        arrivals=arrivals,
    )
    digest = hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()
    return recipe, Origin(request_id=request.request_id, spec_digest=digest)


def read_chunk(request: pb.CreateWorkloadModelRequest) -> bytes:
    """Return the bytes in a later message of a creation; raises InvalidInputError."""
    if request.WhichOneof("payload") != "chunk":
        raise InvalidInputError([Violation("chunk", "must be in every message after the first")])
    return request.chunk


def _check_file(spec: pb.WorkloadModelSpec, violations: list[Violation]) -> None:
    if bool(spec.path) == bool(spec.file_name):
        violations.append(Violation("spec.path", "or spec.file_name must be set, and not both"))
        return
    if spec.path and spec.file_size_bytes:
        violations.append(Violation("spec.file_size_bytes", "goes with spec.file_name"))
    if spec.file_name:
        if not FILE_NAME.fullmatch(spec.file_name):
            violations.append(
                Violation("spec.file_name", f"must be a file's name without its folder, is {shown(spec.file_name)}")
            )
        if spec.file_size_bytes <= 0:
            violations.append(
                Violation("spec.file_size_bytes", f"must be the size of the file, > 0, is {spec.file_size_bytes}")
            )


def _check_fit(spec: pb.WorkloadModelSpec, violations: list[Violation]) -> None:
    if spec.max_bin_count and not 2 <= spec.max_bin_count <= MOST_BINS:  # noqa: PLR2004 fewer say nothing
        violations.append(Violation("spec.max_bin_count", f"must be 2 to {MOST_BINS}, or 0, is {spec.max_bin_count}"))
    if len(spec.parameters) > LARGEST_PARAMETER_COUNT:
        violations.append(Violation("spec.parameters", f"must be at most {LARGEST_PARAMETER_COUNT}"))
    if len(spec.source) > LARGEST_TEXT:
        violations.append(Violation("spec.source", f"must have at most {LARGEST_TEXT} characters"))
    if _is_model_file(spec):
        chosen = {
            "format": spec.format,
            "parameters": spec.parameters,
            "max_bin_count": spec.max_bin_count,
            "keep_replay": spec.keep_replay,
        }
        violations.extend(
            Violation(f"spec.{name}", "goes with a trace, and the file is a model")
            for name, value in chosen.items()
            if value
        )


def _read_own_arrivals(spec: pb.WorkloadModelSpec, violations: list[Violation]) -> Arrivals | None:
    if not spec.HasField("arrivals"):
        return None
    arrivals = read_arrivals(spec.arrivals, "spec.arrivals", violations)
    keeps_trace = spec.keep_replay or _is_model_file(spec)  # what a model file keeps, is seen when it is read
    found = arrival_violations(arrivals, np.zeros(1, np.int64) if keeps_trace else None)
    violations.extend(Violation(f"spec.{each.field}", each.description) for each in found)
    return arrivals


def _is_model_file(spec: pb.WorkloadModelSpec) -> bool:
    return Path(spec.path or spec.file_name).suffix in MODEL_SUFFIXES


def read_arrivals(arrivals: pb.Arrivals, field: str, violations: list[Violation]) -> Arrivals:
    """Return an arrival process, whose numbers are not checked; append a violation where it is none."""
    if arrivals.kind not in _ARRIVAL_KINDS_READ:
        violations.append(Violation(f"{field}.kind", f"must be a known kind, is {arrivals.kind}"))
    return Arrivals(
        kind=_ARRIVAL_KINDS_READ.get(arrivals.kind, ArrivalKind.CLOSED),
        rate_per_second=arrivals.rate_per_second,
        burstiness=arrivals.burstiness if arrivals.HasField("burstiness") else 1.0,
        speed=arrivals.speed if arrivals.HasField("speed") else 1.0,
    )


def read_name(name: str, field: str = "name") -> str:
    """Return the id in a model's resource name; raises InvalidInputError."""
    violations: list[Violation] = []
    model_id = find_id(name, field, violations)
    if violations:
        raise InvalidInputError(violations)
    return model_id


def find_id(name: str, field: str, violations: list[Violation]) -> str:
    """Return the id in a model's resource name; anything, and a violation, where it is no such name."""
    model_id = name.removeprefix(COLLECTION)
    if not name.startswith(COLLECTION) or not MODEL_ID.fullmatch(model_id):
        violations.append(Violation(field, f'must be like "{COLLECTION}production", is {shown(name)}'))
    return model_id


def read_list_request(request: pb.ListWorkloadModelsRequest) -> tuple[str, int]:
    """Return after which name a page begins and how many models it has at most; the token is the last name before."""
    violations = []
    if not 0 <= request.page_size <= LARGEST_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be between 0 and {LARGEST_PAGE_SIZE}, is {request.page_size}"))
    if request.page_token and not MODEL_ID.fullmatch(request.page_token):
        violations.append(Violation("page_token", f"{shown(request.page_token)} is not the next_page_token of a page"))
    if violations:
        raise InvalidInputError(violations)
    return request.page_token, request.page_size or LARGEST_PAGE_SIZE


def write_model(model: StoredModel) -> pb.WorkloadModel:
    """Return a model as a client sees it."""
    summary, provenance = model.summary, model.summary.provenance
    return pb.WorkloadModel(
        name=f"{COLLECTION}{model.model_id}",
        profile=model.is_profile,
        request_count=summary.request_count,
        cell_count=summary.cell_count,
        parameters=[_write_parameter(parameter) for parameter in summary.parameters],
        arrivals=write_arrivals(summary.arrivals),
        source=provenance.source,
        licence=provenance.licence,
        command=provenance.command,
        first_request_time=_write_time(provenance.first_time),
        last_request_time=_write_time(provenance.last_time),
        skipped_row_count=provenance.skipped_row_count,
        replay_request_count=summary.replay_request_count,
        size_bytes=summary.size_bytes,
    )


def write_arrivals(arrivals: Arrivals) -> pb.Arrivals:
    """Return an arrival process as a client sees it."""
    written = pb.Arrivals(kind=ARRIVAL_KINDS[arrivals.kind])
    if arrivals.kind in _KINDS_WITH_A_RATE:
        written.rate_per_second = arrivals.rate_per_second
    if arrivals.kind is ArrivalKind.GAMMA:
        written.burstiness = arrivals.burstiness
    if arrivals.kind is ArrivalKind.TRACE:
        written.speed = arrivals.speed
    return written


def _write_parameter(parameter: ParameterSummary) -> pb.Parameter:
    return pb.Parameter(
        name=parameter.name,
        kind=KINDS[parameter.kind],
        bin_count=parameter.bin_count,
        min=parameter.low,
        max=parameter.high,
        mean=parameter.mean,
        categories=parameter.categories,
    )


def _write_time(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    written = Timestamp()
    written.FromDatetime(time)
    return written


def shown(text: str) -> str:
    """Return a wrong text as a message shows it."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
