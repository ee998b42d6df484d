"""Between protobuf and domain. Reading a request collects every violation before it refuses.

Invariant: what leaves a `read_*` function is checked; the domain does not check again.
"""

import math
import re
from collections.abc import Mapping

from llmpilot.catalog.v1 import gpu_pb2, llm_pb2
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.bundled_llms import find_bundled
from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.decision import DEFAULT_ERROR_RATE, Basis, LatencyLimits, Limit
from llmpilot_recommender.knowledge import Curve, Knowledge
from llmpilot_recommender.manifest import Manifest
from llmpilot_recommender.recommendation import Option, Question, Recommendation, RejectionReason
from llmpilot_recommender.wire_llm import read_llm_spec, write_llm_spec

LARGEST_USERS_COUNT = 10_000_000
LARGEST_PAGE_SIZE = 1000
PAGE_TOKEN_PATTERN = re.compile(r"[0-9]{1,9}")
LARGEST_PRICE_PER_HOUR = 1e9
LARGEST_HINTED_COUNT = 10
"""A search for close names takes a millisecond, so that a request full of wrong ones gets no more than these."""

BASES = {
    Basis.MEASURED: pb.BASIS_MEASURED,
    Basis.PREDICTED: pb.BASIS_PREDICTED,
    Basis.EXTRAPOLATED: pb.BASIS_EXTRAPOLATED,
    Basis.SIMULATED: pb.BASIS_SIMULATED,
}
REASONS = {
    RejectionReason.OUT_OF_MEMORY: pb.REJECTION_REASON_OUT_OF_MEMORY,
    RejectionReason.LATENCY: pb.REJECTION_REASON_LATENCY,
    RejectionReason.ERROR_RATE: pb.REJECTION_REASON_ERROR_RATE,
    RejectionReason.NO_PRICE: pb.REJECTION_REASON_NO_PRICE,
}
LIMITS = {Limit.NTTFT: pb.LIMIT_NTTFT, Limit.ITL: pb.LIMIT_ITL, Limit.ERROR_RATE: pb.LIMIT_ERROR_RATE}


def read_recommend_request(request: pb.RecommendRequest, knowledge: Knowledge) -> Question:
    """Return the checked question; raises InvalidInputError with every violation."""
    violations: list[Violation] = []
    name, spec = _read_llm(request.llm, knowledge, violations)
    limits = _read_limits(request, violations)
    if not 1 <= request.users_count <= LARGEST_USERS_COUNT:
        violations.append(
            Violation("users_count", f"must be between 1 and {LARGEST_USERS_COUNT:,}, is {request.users_count}")
        )
    candidates = _read_candidates(request, knowledge, violations)
    prices = _read_prices(request, knowledge, violations)
    if request.WhichOneof("candidates") == "gpu_profiles":
        violations.extend(
            Violation("prices", f"{profile.name} has no default price; give one")
            for profile in candidates
            if profile.name not in prices
        )
    if violations or spec is None:
        raise InvalidInputError(violations)
    return Question(
        llm_name=name,
        spec=spec,
        limits=limits,
        users_count=request.users_count,
        candidates=candidates,
        prices_per_hour=prices,
    )


def read_predict_request(request: pb.PredictRequest, knowledge: Knowledge) -> tuple[str, LlmSpec, GpuProfile]:
    """Return name, architecture and GPU profile; raises InvalidInputError with every violation."""
    violations: list[Violation] = []
    name, spec = _read_llm(request.llm, knowledge, violations)
    profile = _read_profile("gpu_profile", request.gpu_profile, knowledge, violations)
    if violations or spec is None or profile is None:
        raise InvalidInputError(violations)
    return name, spec, profile


def _read_llm(llm: llm_pb2.Llm, knowledge: Knowledge, violations: list[Violation]) -> tuple[str, LlmSpec | None]:
    source = llm.WhichOneof("source")
    if source == "spec":
        spec = read_llm_spec(llm.spec)
        violations.extend(Violation(f"llm.spec.{v.field}", v.description) for v in spec.violations())
        return llm.name, spec
    if source == "config_json":
        try:
            return llm.name, parse_config(llm.config_json)
        except InvalidInputError as error:
            violations.extend(Violation(f"llm.{v.field}", v.description) for v in error.violations)
            return llm.name, None
    if measured := knowledge.measured_llm(llm.name):
        return measured.name, measured.spec
    if bundled := find_bundled(llm.name):
        return bundled.name, parse_config(bundled.config_json)
    if llm.name:
        known = ", ".join(sorted(knowledge.llms))
        description = f"{llm.name!r} is neither bundled nor measured; give spec or config_json (measured: {known})"
    else:
        description = "missing; give a name, a spec or a config_json"
    violations.append(Violation("llm", description))
    return llm.name, None


def _read_limits(request: pb.RecommendRequest, violations: list[Violation]) -> LatencyLimits:
    wire = request.limits
    limits = LatencyLimits(
        nttft_ms=wire.nttft_ms,
        itl_ms=wire.itl_ms,
        error_rate=wire.error_rate if wire.HasField("error_rate") else DEFAULT_ERROR_RATE,
    )
    violations.extend(limits.violations())
    return limits


def _read_profile(field: str, name: str, knowledge: Knowledge, violations: list[Violation]) -> GpuProfile | None:
    profile = knowledge.catalogue.profile(name)
    if profile is None:
        close = ", ".join(knowledge.catalogue.suggest(name)) if len(violations) < LARGEST_HINTED_COUNT else ""
        hint = f"did you mean {close}?" if close else "ListGpuProfiles lists all"
        violations.append(Violation(field, f"{name!r} is not in the catalogue; {hint}"))
    return profile


def _read_candidates(
    request: pb.RecommendRequest, knowledge: Knowledge, violations: list[Violation]
) -> tuple[GpuProfile, ...]:
    if request.all_gpu_profiles:
        return knowledge.catalogue.profiles()
    if request.WhichOneof("candidates") != "gpu_profiles":
        return knowledge.characterized_profiles()
    names = request.gpu_profiles.names
    if not names:
        violations.append(Violation("gpu_profiles.names", "must not be empty; leave it out for the characterized ones"))
    profiles = []
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        field = f"gpu_profiles.names[{index}]"
        if name in seen:
            violations.append(Violation(field, f"{name!r} repeats names[{seen[name]}]"))
        elif profile := _read_profile(field, name, knowledge, violations):
            profiles.append(profile)
        seen.setdefault(name, index)
    return tuple(profiles)


def _read_prices(
    request: pb.RecommendRequest, knowledge: Knowledge, violations: list[Violation]
) -> Mapping[str, float]:
    given: dict[str, float] = {}
    for index, price in enumerate(request.prices):
        field = f"prices[{index}]"
        _read_profile(f"{field}.gpu_profile", price.gpu_profile, knowledge, violations)
        if price.gpu_profile in given:
            violations.append(Violation(f"{field}.gpu_profile", f"{price.gpu_profile!r} has a price already"))
        if not 0 < price.price_per_hour <= LARGEST_PRICE_PER_HOUR:
            problem = f"must be > 0 and at most {LARGEST_PRICE_PER_HOUR:g}, is {price.price_per_hour:g}"
            violations.append(Violation(f"{field}.price_per_hour", problem))
        given[price.gpu_profile] = price.price_per_hour
    return {name: price.price_per_hour for name, price in knowledge.prices.items()} | given


def write_recommend_response(answer: Recommendation, question: Question, knowledge: Knowledge) -> pb.RecommendResponse:
    """Return the answer for the wire."""
    response = pb.RecommendResponse(
        options=map(_write_option, answer.options),
        rejections=[
            pb.Rejection(gpu_profile=entry.gpu_profile, reason=REASONS[entry.reason], detail=entry.detail)
            for entry in answer.rejections
        ],
        summary=answer.summary,
        model=knowledge.manifest.name,
        dataset_version=knowledge.dataset.version,
        llm_spec=write_llm_spec(question.spec),
        notes=answer.notes,
    )
    if answer.nearest:
        response.nearest.option.CopyFrom(_write_option(answer.nearest.option))
        response.nearest.relaxed_limits.extend(
            pb.RelaxedLimit(limit=LIMITS[entry.limit], requested=entry.requested, needed=entry.needed)
            for entry in answer.nearest.relaxed_limits
        )
    return response


def _write_option(option: Option) -> pb.Option:
    return pb.Option(
        gpu_profile=option.gpu_profile,
        pod_count=option.pod_count,
        pod_price_per_hour=option.pod_price_per_hour,
        price_per_hour=option.price_per_hour,
        users_per_pod=option.users_per_pod,
        nttft_ms=option.point.nttft_ms,
        itl_ms=option.point.itl_ms,
        error_rate=option.point.error_rate,
        basis=BASES[option.basis],
        reason=option.reason,
    )


def write_predict_response(curve: Curve, knowledge: Knowledge) -> pb.PredictResponse:
    """Return a curve for the wire."""
    return pb.PredictResponse(
        points=[
            pb.CurvePoint(
                users_count=point.users_count,
                nttft_ms=point.nttft_ms if math.isfinite(point.nttft_ms) else None,
                itl_ms=point.itl_ms if math.isfinite(point.itl_ms) else None,
                error_rate=point.error_rate,
                basis=BASES[curve.basis],
            )
            for point in curve.points
        ],
        fits_in_memory=curve.fits_in_memory,
        model=knowledge.manifest.name,
        dataset_version=knowledge.dataset.version,
    )


def write_gpu_profile(profile: GpuProfile, knowledge: Knowledge) -> gpu_pb2.GpuProfile:
    """Return a GPU profile with its default price for the wire."""
    price = knowledge.prices.get(profile.name)
    return gpu_pb2.GpuProfile(
        name=profile.name,
        gpu=profile.gpu.name,
        gpu_count=profile.gpu_count,
        memory_bytes=profile.memory_bytes,
        memory_bandwidth_bytes_per_second=profile.gpu.memory_bandwidth_bytes_per_second,
        price_per_hour=price.price_per_hour if price else None,
        price_source=price.source if price else "",
        characterized=profile.name in knowledge.dataset.gpu_profiles,
        sources=profile.gpu.sources,
    )


def write_model(manifest: Manifest) -> pb.PerformanceModel:
    """Return a model's manifest for the wire."""
    model = pb.PerformanceModel(
        name=manifest.name,
        kind=manifest.kind,
        dataset_version=manifest.dataset_version,
        limits=pb.LatencyLimits(nttft_ms=manifest.limits.nttft_ms, itl_ms=manifest.limits.itl_ms),
        seed=manifest.seed,
        features=manifest.features,
        training_llms=manifest.training_llms,
        metrics=manifest.metrics,
        software_version=manifest.software_version,
    )
    model.create_time.FromDatetime(manifest.create_time)
    return model


def read_page(page_size: int, page_token: str, items_count: int) -> tuple[slice, str]:
    """Return which items a page holds and the token of the next one; the token is the index of its first item."""
    violations = []
    if not 0 <= page_size <= LARGEST_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be between 0 and {LARGEST_PAGE_SIZE}, is {page_size}"))
    start = int(page_token) if PAGE_TOKEN_PATTERN.fullmatch(page_token) else 0
    if page_token and not 0 < start < items_count:
        violations.append(Violation("page_token", f"{page_token[:40]!r} is not the next_page_token of a page"))
    if violations:
        raise InvalidInputError(violations)
    stop = min(start + (page_size or LARGEST_PAGE_SIZE), items_count)
    return slice(start, stop), str(stop) if stop < items_count else ""
