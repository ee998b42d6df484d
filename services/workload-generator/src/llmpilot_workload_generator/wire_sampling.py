"""Between protobuf and domain, of what is drawn. Reading a request collects every violation before it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import ArrivalKind, WorkloadModel
from llmpilot_workload_generator.packing import PackedBatch, PackedType
from llmpilot_workload_generator.sampling.arrivals import LARGEST_RANDOM_START
from llmpilot_workload_generator.sampling.sampler import SampleOptions, ValueChoice
from llmpilot_workload_generator.wire import find_id, read_arrivals

DEFAULT_BATCH_SIZE = 65_536
LARGEST_BATCH_SIZE = 262_144
"""While a message is written nothing else is answered: 6 MB take a few milliseconds."""
LARGEST_INDEX = 2**48
"""As large as an index of a request with a prompt may be."""
LARGEST_CONDITION_COUNT = 64
MODEL_FIELD = "sampling.workload_model"

VALUE_CHOICES = {
    pb.VALUE_CHOICE_UNSPECIFIED: ValueChoice.CENTRE,
    pb.VALUE_CHOICE_CENTRE: ValueChoice.CENTRE,
    pb.VALUE_CHOICE_UNIFORM: ValueChoice.UNIFORM,
    pb.VALUE_CHOICE_QUANTILES: ValueChoice.QUANTILES,
}
PACKED_TYPES = {
    PackedType.UINT8: pb.PACKED_TYPE_UINT8,
    PackedType.UINT16: pb.PACKED_TYPE_UINT16,
    PackedType.UINT32: pb.PACKED_TYPE_UINT32,
    PackedType.INT64: pb.PACKED_TYPE_INT64,
    PackedType.FLOAT64: pb.PACKED_TYPE_FLOAT64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which requests of which model are asked for."""

    model_id: str
    options: SampleOptions
    start_index: int
    request_count: int | None
    """None: until the client has enough."""

    def has_random_arrivals(self, model: WorkloadModel) -> bool:
        """Whether when a request is sent follows from all gaps before it."""
        return (self.options.arrivals or model.arrivals).kind in {ArrivalKind.POISSON, ArrivalKind.GAMMA}

    def stop_index(self, sampler_count: int | None) -> int:
        """Return where the stream ends, which is at the last request of a trace that is replayed."""
        ends = [LARGEST_INDEX]
        if self.request_count is not None:
            ends.append(self.start_index + self.request_count)
        if sampler_count is not None:
            ends.append(sampler_count)
        return min(ends)


def read_draw(request: pb.SampleRequestsRequest | pb.StreamRequestsRequest, violations: list[Violation]) -> Draw:
    """Return what is asked for, with stand-ins for what is wrong, which is appended to the violations."""
    sampling = request.sampling
    model_id = find_id(sampling.workload_model, MODEL_FIELD, violations)
    options = _read_options(sampling, violations)
    if not 0 <= request.start_index < LARGEST_INDEX:
        violations.append(Violation("start_index", f"must be 0 to 2^48, is {request.start_index}"))
    if not 0 <= request.request_count <= LARGEST_INDEX:
        violations.append(Violation("request_count", f"must be 0 to 2^48, is {request.request_count}"))
    return Draw(
        model_id=model_id,
        options=options,
        start_index=request.start_index,
        request_count=request.request_count or None,
    )


def read_batch_size(request: pb.SampleRequestsRequest, violations: list[Violation]) -> int:
    """Return how many requests a batch has."""
    if not 0 <= request.batch_size <= LARGEST_BATCH_SIZE:
        violations.append(
            Violation("batch_size", f"must be between 0 and {LARGEST_BATCH_SIZE:,}, is {request.batch_size}")
        )
    return request.batch_size or DEFAULT_BATCH_SIZE


def _read_options(sampling: pb.Sampling, violations: list[Violation]) -> SampleOptions:
    value_choice = VALUE_CHOICES.get(sampling.value_choice)
    if value_choice is None:
        violations.append(Violation("sampling.value_choice", f"must be a known choice, is {sampling.value_choice}"))
    scales: dict[str, float] = {}
    for scale in sampling.scales:
        if scale.parameter in scales:
            violations.append(Violation("sampling.scales", f"must name {scale.parameter!r} once"))
        scales[scale.parameter] = scale.factor
    if len(sampling.conditions) > LARGEST_CONDITION_COUNT:
        violations.append(Violation("sampling.conditions", f"must be at most {LARGEST_CONDITION_COUNT}"))
    if sampling.context_length < 0:
        violations.append(Violation("sampling.context_length", f"must be >= 0, is {sampling.context_length}"))
    arrivals = None
    if sampling.HasField("arrivals"):
        arrivals = read_arrivals(sampling.arrivals, "sampling.arrivals", violations)
    return SampleOptions(
        seed=sampling.seed,
        conditions=tuple(sampling.conditions[:LARGEST_CONDITION_COUNT]),
        value_choice=value_choice or ValueChoice.CENTRE,
        independent=sampling.independent,
        scales=scales,
        context_length=max(sampling.context_length, 0) or None,
        arrivals=arrivals,
        replay=sampling.replay,
    )


def sampling_violations(error: InvalidInputError) -> list[Violation]:
    """Return what the sampler found wrong, by the fields of the request."""
    return [Violation(f"sampling.{violation.field}", violation.description) for violation in error.violations]


@contextmanager
def named_as_asked() -> Iterator[None]:
    """Name what turns out to be wrong while requests are drawn by the fields of the request."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(sampling_violations(error)) from error


def start_violations(draw: Draw, model: WorkloadModel, request_count: int | None) -> list[Violation]:
    """Return what is wrong with where a stream begins; `request_count` is that of a trace that is replayed."""
    most = LARGEST_INDEX if request_count is None else request_count
    if draw.has_random_arrivals(model):
        most = min(most, LARGEST_RANDOM_START)
    if draw.start_index > most:
        return [Violation("start_index", f"must be at most {most} here, is {draw.start_index}")]
    return []


def write_batch(batch: PackedBatch) -> pb.SampleRequestsResponse:
    """Return a batch as a client sees it."""
    return pb.SampleRequestsResponse(
        start_index=batch.start_index,
        request_count=batch.request_count,
        columns=[
            pb.PackedColumn(parameter=column.name, type=PACKED_TYPES[column.type], values=column.values)
            for column in batch.columns
        ],
        arrival_nanos=batch.arrival_nanos,
    )
