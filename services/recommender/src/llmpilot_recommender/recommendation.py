"""The recommendation: rank what meets the limits, say why the rest does not, and what would have to give.

Invariant: every candidate comes back exactly once, as an option or as a rejection.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmpilot_perfmodel.gpu_catalogue import GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.decision import Basis, CurvePoint, LatencyLimits, Limit, pod_count, users_per_pod
from llmpilot_recommender.knowledge import Curve, Knowledge

TRUST = (Basis.MEASURED, Basis.PREDICTED, Basis.EXTRAPOLATED, Basis.SIMULATED)
"""Among equally cheap options the better founded one comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which deployment? All fields are checked already."""

    llm_name: str
    """Empty: an LLM without a name."""
    spec: LlmSpec
    limits: LatencyLimits
    users_count: int
    candidates: tuple[GpuProfile, ...]
    prices_per_hour: Mapping[str, float]
    """By GPU profile; a candidate without a price is rejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A deployment that meets the limits."""

    gpu_profile: str
    pod_count: int
    pod_price_per_hour: float
    users_per_pod: int
    point: CurvePoint
    """The latencies at `users_per_pod`."""
    basis: Basis
    reason: str

    @property
    def price_per_hour(self) -> float:
        """Price of all pods."""
        return self.pod_count * self.pod_price_per_hour


class RejectionReason(StrEnum):
    """Why a profile is not an option."""

    OUT_OF_MEMORY = "does not fit in memory"
    LATENCY = "too slow"
    ERROR_RATE = "too many failed requests"
    NO_PRICE = "no price"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A profile that is not an option."""

    gpu_profile: str
    reason: RejectionReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxedLimit:
    """A limit that must give."""

    limit: Limit
    requested: float
    needed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestOption:
    """The deployment whose limits need the smallest relative relaxation, the cheapest of several."""

    option: Option
    relaxed_limits: tuple[RelaxedLimit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The answer; the first option is the recommendation."""

    options: tuple[Option, ...]
    rejections: tuple[Rejection, ...]
    nearest: NearestOption | None
    summary: str
    notes: tuple[str, ...]


def recommend(question: Question, knowledge: Knowledge) -> Recommendation:
    """Answer by Eqs. (1)-(3), from measurements where there are some, from predictions elsewhere."""
    curves = knowledge.curves(question.llm_name, question.spec, question.candidates)
    options: list[Option] = []
    rejections: list[Rejection] = []
    too_slow: list[tuple[GpuProfile, Curve]] = []
    for profile, curve in zip(question.candidates, curves, strict=True):
        price = question.prices_per_hour.get(profile.name)
        if price is None:
            detail = "no price is known; give one to consider this profile"
            rejections.append(_rejection(profile, RejectionReason.NO_PRICE, detail))
        elif not curve.fits_in_memory:
            rejections.append(_rejection(profile, RejectionReason.OUT_OF_MEMORY, curve.memory_explanation))
        elif users_per_pod(curve.points, question.limits):
            options.append(_option(question, profile, curve, question.limits))
        else:
            too_slow.append((profile, curve))
            rejections.append(_latency_rejection(profile, curve, question.limits))
    options.sort(key=lambda option: (option.price_per_hour, TRUST.index(option.basis), option.pod_count))
    nearest = None if options else _nearest(question, too_slow)
    return Recommendation(
        options=tuple(options),
        rejections=tuple(rejections),
        nearest=nearest,
        summary=_summary(question, options, rejections, nearest),
        notes=_notes(question, knowledge, [nearest.option] if nearest else options),
    )


def _rejection(profile: GpuProfile, reason: RejectionReason, detail: str) -> Rejection:
    return Rejection(gpu_profile=profile.name, reason=reason, detail=detail)


def _option(question: Question, profile: GpuProfile, curve: Curve, limits: LatencyLimits) -> Option:
    served = users_per_pod(curve.points, limits)
    index = next(i for i, point in enumerate(curve.points) if point.users_count == served)
    return Option(
        gpu_profile=profile.name,
        pod_count=pod_count(question.users_count, served),
        pod_price_per_hour=question.prices_per_hour[profile.name],
        users_per_pod=served,
        point=curve.points[index],
        basis=curve.basis,
        reason=_reason(curve, index, limits),
    )


def _reason(curve: Curve, index: int, limits: LatencyLimits) -> str:
    if index + 1 == len(curve.points):
        return f"within the limits up to {curve.points[index].users_count} users, the most on record"
    above = curve.points[index + 1]
    return f"at {above.users_count} users {_excess(above, limits)}"


def _latency_rejection(profile: GpuProfile, curve: Curve, limits: LatencyLimits) -> Rejection:
    first = curve.points[0]
    exceeded = limits.exceeded_by(first)
    slow = any(math.isfinite(value) for limit, value in exceeded.items() if limit is not Limit.ERROR_RATE)
    reason = RejectionReason.ERROR_RATE if Limit.ERROR_RATE in exceeded and not slow else RejectionReason.LATENCY
    users = "a single user" if first.users_count == 1 else f"{first.users_count} users, the fewest on record,"
    return _rejection(profile, reason, f"with {users} {_excess(first, limits)} ({curve.basis})")


def _excess(point: CurvePoint, limits: LatencyLimits) -> str:
    return " and ".join(
        f"{limit} is {_quantity(limit, value)} (limit {_quantity(limit, _requested(limits, limit))})"
        for limit, value in limits.exceeded_by(point).items()
    )


def _quantity(limit: Limit, value: float) -> str:
    if math.isinf(value):
        return "unknown, as no request got that far"
    return f"{value:.1%}" if limit is Limit.ERROR_RATE else f"{value:.4g} ms"


def _enough(limit: Limit, needed: float) -> str:
    """Return a needed limit rounded up to the digits shown, so that asking with the printed number is enough."""
    step = 1e-3 if limit is Limit.ERROR_RATE else 10.0 ** (math.floor(math.log10(needed)) - 3)
    return _quantity(limit, math.ceil(round(needed / step, 6)) * step)


def _requested(limits: LatencyLimits, limit: Limit) -> float:
    return {Limit.NTTFT: limits.nttft_ms, Limit.ITL: limits.itl_ms, Limit.ERROR_RATE: limits.error_rate}[limit]


def _nearest(question: Question, too_slow: Sequence[tuple[GpuProfile, Curve]]) -> NearestOption | None:
    limits = question.limits
    reachable = [
        (profile, curve)
        for profile, curve in too_slow
        if math.isfinite(curve.points[0].nttft_ms) and math.isfinite(curve.points[0].itl_ms)
    ]
    if not reachable:
        return None

    def relaxation(option: Option, first: CurvePoint) -> tuple[float, float]:
        exceeded = limits.exceeded_by(first)
        ratio = max(value / max(_requested(limits, limit), 1e-3) for limit, value in exceeded.items())
        return ratio, option.price_per_hour

    options = [(_relaxed_option(question, profile, curve), curve.points[0]) for profile, curve in reachable]
    option, first = min(options, key=lambda entry: relaxation(*entry))
    exceeded = limits.exceeded_by(first)
    return NearestOption(
        option=option,
        relaxed_limits=tuple(
            RelaxedLimit(limit=limit, requested=_requested(limits, limit), needed=value)
            for limit, value in exceeded.items()
        ),
    )


def _relaxed_option(question: Question, profile: GpuProfile, curve: Curve) -> Option:
    limits, first = question.limits, curve.points[0]
    relaxed = LatencyLimits(
        nttft_ms=max(limits.nttft_ms, first.nttft_ms),
        itl_ms=max(limits.itl_ms, first.itl_ms),
        error_rate=max(limits.error_rate, first.error_rate or 0),
    )
    return _option(question, profile, curve, relaxed)


def _summary(
    question: Question, options: Sequence[Option], rejections: Sequence[Rejection], nearest: NearestOption | None
) -> str:
    if options:
        best = options[0]
        return (
            f"{_pods(best)} on {best.gpu_profile} for {best.price_per_hour:.2f} per hour"
            f" serve {question.users_count} users within the limits ({best.basis})."
        )
    if nearest is None:
        reasons = sorted({rejection.reason for rejection in rejections})
        advice = "Give a price" if RejectionReason.NO_PRICE in reasons else "Add larger GPU profiles"
        return f"No candidate can serve this LLM, whatever the limits: {', '.join(reasons)}. {advice}."
    option = nearest.option
    relaxed = " and ".join(
        f"{entry.limit} from {_quantity(entry.limit, entry.requested)} to {_enough(entry.limit, entry.needed)}"
        for entry in nearest.relaxed_limits
    )
    return (
        f"No candidate meets the limits. Nearest: relax {relaxed}; then {_pods(option)} on"
        f" {option.gpu_profile} for {option.price_per_hour:.2f} per hour would do ({option.basis})."
    )


def _pods(option: Option) -> str:
    return "1 pod" if option.pod_count == 1 else f"{option.pod_count} pods"


def _notes(question: Question, knowledge: Knowledge, options: Sequence[Option]) -> tuple[str, ...]:
    notes = []
    manifest = knowledge.manifest
    bases = {option.basis for option in options}
    if bases & {Basis.PREDICTED, Basis.EXTRAPOLATED}:
        notes.append(
            f"Predictions are learnt from {len(manifest.training_llms)} LLMs; confirm the choice with a load test."
        )
        if f"model_type={question.spec.model_type}" not in manifest.features:
            notes.append(f"No LLM of the family {question.spec.model_type!r} was measured; the others stand in for it.")
        if (manifest.limits.nttft_ms, manifest.limits.itl_ms) != (question.limits.nttft_ms, question.limits.itl_ms):
            notes.append(
                f"The model is most accurate near nTTFT {manifest.limits.nttft_ms:g} ms and ITL"
                f" {manifest.limits.itl_ms:g} ms; `llm-pilot train` aims it at other limits."
            )
    if Basis.EXTRAPOLATED in bases:
        notes.append(
            "Options marked extrapolated are on GPU types on which nothing was measured; treat them with care."
        )
    if Basis.SIMULATED in bases:
        notes.append("Options marked simulated rest on a simulator, not on a measurement.")
    return tuple(notes)
