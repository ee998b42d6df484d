"""A tuning's report as JSON: what was found, for what, and the evidence.

Invariant: a report that is read again is the report that was written; names and units stay within a version.
"""

from dataclasses import dataclass, field
from importlib.metadata import version

import msgspec

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.plan import Plan, plan_of
from llmpilot_tuner.domain.probing import Probe
from llmpilot_tuner.domain.result import CaseHeadroom, CurvePoint, Soak, TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.outputs.words import EVIDENCE, WEIGHT_UNITS, batch_words

FORMAT = "llm-pilot-tuning-report"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedLimits:
    """What requests and batches were taken to be."""

    longest_sequence_tokens: int
    most_new_tokens: int
    most_requests_count: int
    prefill_limit: int | None
    """None: a prefill may be as large as the batch."""
    prompt_logprobs: bool
    layout: str
    attention: str
    activation_bits: int
    cache_block_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedMemory:
    """Of one GPU: where it goes in the case that comes nearest to the capacity, by prediction."""

    gpu_memory_bytes: int
    set_aside_bytes: int
    """What is not for tensors: CUDA context, kernels, buffers of collectives."""
    capacity_bytes: int
    llm_weights_bytes: int
    case: str
    cache_bytes: float
    working_bytes: float
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCase:
    """One corner case at the weight that was found; None: not measured."""

    case: str
    batch: str
    """In words."""
    request_count: int
    token_count: int
    predicted_bytes: float
    peak_bytes: int | None
    reserved_bytes: int | None
    headroom_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRun:
    """A corner case as a probe ran it."""

    case: str
    batch: str
    outcome: str
    peak_bytes: int | None
    reserved_bytes: int | None
    live_before_bytes: int | None
    elapsed_seconds: float
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedProbe:
    """A weight that was probed, its corner cases in the order they were run."""

    weight: int
    passed: bool
    elapsed_seconds: float
    runs: tuple[ReportedRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedSoak:
    """The final verdict, in a fresh process."""

    step_count: int
    largest_peak_bytes: int | None
    largest_reserved_bytes: int | None
    growth_bytes: int
    drift_bytes: int
    lowered_from_weights: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedPoint:
    """Predicted memory of one case at one weight."""

    case: str
    weight: int
    predicted_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a tuning found, and the evidence for it. Bytes are of one GPU."""

    format: str = FORMAT
    version: int = VERSION
    made_by: str
    llm_name: str
    gpu_name: str
    gpu_count: int
    server: str
    probe: str
    is_measured: bool
    evidence: str
    """What kind of evidence that is, in words."""
    max_batch_weight: int
    weight_unit: str
    largest_batch_tokens: int
    """Tokens that the largest batch of that weight has."""
    longest_request_count: int
    """Requests of the longest sequence that fit at once."""
    limit: str
    """Why the weight is no larger."""
    predicted_weight: int | None
    half_sequence_weight: int | None
    granule_weight: int
    precision_share: float
    margin_weight: int
    limits: ReportedLimits
    memory: ReportedMemory
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    headroom: tuple[ReportedCase, ...] = ()
    probes: tuple[ReportedProbe, ...] = ()
    plain_probe_count: int
    soak: ReportedSoak | None = None
    curve: tuple[ReportedPoint, ...] = ()
    seed: int = 0
    elapsed_seconds: float
    notes: tuple[str, ...] = ()


def report_json(result: TuningResult, spec: TuningSpec) -> str:
    """Return the text of a tuning's report."""
    return report_text(report_of(result, spec, plan_of(spec)))


def report_text(report: Report) -> str:
    """Return a report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def read_report(text: str | bytes) -> Report:
    """Return the report of a text; raises InvalidInputError where it is none, or one of another version."""
    try:
        report = msgspec.json.decode(text, type=Report)
    except msgspec.DecodeError as error:
        raise InvalidInputError([Violation("report", f"is not a tuning's report: {error}")]) from error
    if (report.format, report.version) != (FORMAT, VERSION):
        problem = f"must be of format {FORMAT} and version {VERSION}, is of {report.format[:40]!r} and {report.version}"
        raise InvalidInputError([Violation("report", problem)])
    return report


def report_of(result: TuningResult, spec: TuningSpec, plan: Plan) -> Report:
    """Return the report of a tuning."""
    limits, weight, kind = plan.limits, result.max_batch_weight, result.facts.kind
    definition = limits.rules.weight_definition
    return Report(
        made_by=f"llm-pilot-tuner {version('llm-pilot-tuner')}",
        llm_name=spec.llm_name,
        gpu_name=spec.gpu_name,
        gpu_count=spec.gpu_count,
        server=spec.server.value,
        probe=kind.value,
        is_measured=kind.is_measured,
        evidence=EVIDENCE[kind],
        max_batch_weight=weight,
        weight_unit=WEIGHT_UNITS[definition],
        largest_batch_tokens=largest_batch_tokens(limits, weight),
        longest_request_count=min(limits.most_requests, weight // limits.lowest_weight),
        limit=result.limit,
        predicted_weight=result.predicted_weight,
        half_sequence_weight=result.half_sequence_weight,
        granule_weight=spec.granule,
        precision_share=spec.precision,
        margin_weight=result.margin_weight,
        limits=ReportedLimits(
            longest_sequence_tokens=limits.longest_sequence,
            most_new_tokens=limits.most_new_tokens,
            most_requests_count=limits.most_requests,
            prefill_limit=limits.prefill_limit,
            prompt_logprobs=limits.prompt_logprobs,
            layout=plan.execution.layout.value,
            attention=plan.execution.attention.value,
            activation_bits=plan.execution.activation_bits,
            cache_block_tokens=limits.rules.block_size,
        ),
        memory=_memory(result, spec, plan),
        device=result.facts.device,
        versions=dict(result.facts.versions),
        headroom=tuple(map(_case, result.headroom)),
        probes=tuple(map(_probe, result.probes)),
        plain_probe_count=result.plain_probe_count,
        soak=None if result.soak is None else _soak(result.soak),
        curve=tuple(map(_point, result.curve)),
        seed=spec.seed,
        elapsed_seconds=result.elapsed_seconds,
        notes=tuple(dict.fromkeys((*result.facts.notes, *result.notes))),
    )


def largest_batch_tokens(limits: Limits, weight: int) -> int:
    """Return the most tokens that a batch of a weight has."""
    longest, requests = limits.longest_sequence, limits.most_requests
    if limits.rules.weight_definition is WeightDefinition.TOKENS:
        return min(weight, requests * longest)
    each = limits.rules.weight_definition.longest
    return max(count * min(longest, each(count, weight)) for count in range(1, requests + 1))


def _memory(result: TuningResult, spec: TuningSpec, plan: Plan) -> ReportedMemory:
    tightest = min(result.headroom, key=lambda headroom: headroom.headroom_bytes, default=None)
    step = None if tightest is None else plan.predict.model.of(tightest.batch)
    return ReportedMemory(
        gpu_memory_bytes=spec.gpu_memory_bytes,
        set_aside_bytes=spec.reserved_bytes,
        capacity_bytes=result.facts.capacity_bytes,
        llm_weights_bytes=result.facts.weight_bytes,
        case=tightest.batch.case if tightest else "",
        cache_bytes=step.cache_bytes if step else 0.0,
        working_bytes=step.working_bytes if step else 0.0,
        phase=step.phase if step else "",
    )


def _case(headroom: CaseHeadroom) -> ReportedCase:
    return ReportedCase(
        case=headroom.batch.case,
        batch=batch_words(headroom.batch),
        request_count=headroom.batch.request_count,
        token_count=headroom.batch.token_count,
        predicted_bytes=headroom.predicted_bytes,
        peak_bytes=headroom.peak_bytes,
        reserved_bytes=headroom.reserved_bytes,
        headroom_bytes=headroom.headroom_bytes,
    )


def _probe(probe: Probe) -> ReportedProbe:
    return ReportedProbe(
        weight=probe.weight,
        passed=probe.passed,
        elapsed_seconds=sum(run.seconds for run in probe.runs),
        runs=tuple(
            ReportedRun(
                case=run.batch.case,
                batch=batch_words(run.batch),
                outcome=run.outcome.value,
                peak_bytes=run.peak_bytes,
                reserved_bytes=run.reserved_bytes,
                live_before_bytes=run.live_before_bytes,
                elapsed_seconds=run.seconds,
                message=run.message,
            )
            for run in probe.runs
        ),
    )


def _soak(soak: Soak) -> ReportedSoak:
    return ReportedSoak(
        step_count=soak.step_count,
        largest_peak_bytes=soak.largest_peak_bytes,
        largest_reserved_bytes=soak.largest_reserved_bytes,
        growth_bytes=soak.growth_bytes,
        drift_bytes=soak.drift_bytes,
        lowered_from_weights=soak.lowered_from,
    )


def _point(point: CurvePoint) -> ReportedPoint:
    return ReportedPoint(case=point.case, weight=point.weight, predicted_bytes=point.predicted_bytes)
