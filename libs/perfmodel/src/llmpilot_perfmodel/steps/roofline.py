"""Step constants of an LLM that nobody has measured, from its sizes and those of a GPU.

Each constant is a sum of times that follow from the sizes: bytes over memory bandwidth, floating-point operations over
peak, exchanged bytes over the interconnect, and the host's work per layer or per request. How many times longer the
real server takes than each is a factor (data/roofline_constants.csv), fitted on measured servers of the same kind.
Invariant: no time is negative, and of two LLMs of a kind the one that is larger in every size is never faster on a GPU.
Sources: Williams et al., "Roofline", 2009; Lazuka et al., 2024, for the measurements.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.csv_table import CsvTable, bundled_table
from llmpilot_perfmodel.gpu_catalogue import Gpu, GpuProfile
from llmpilot_perfmodel.sizes import LlmWork
from llmpilot_perfmodel.steps.calibration import StepPrior
from llmpilot_perfmodel.steps.step_time import StepConstants

_TABLE = "roofline_constants.csv"
_COLUMNS = ("kind", "constant", "part", "factor", "uncertainty_percent")
_TERA = 1e12
_PCIE_GB_PER_SECOND: Mapping[int, float] = {3: 16, 4: 32, 5: 64}
"""One direction of 16 lanes, PCI-SIG, by generation."""
_NVLINK_SHARE = 0.5
"""Datasheets state both directions together."""
_OLDEST_PCIE = 3
_ROUNDS = 10
_FARTHEST = 10.0
"""Times: a fit farther away counts as that far."""


class ServerKind(StrEnum):
    """How a server executes an LLM; each kind has factors of its own."""

    FLASH = "flash"
    """A decoder with flash attention."""
    PADDED = "padded"
    """A decoder whose sequences take the length of the longest."""
    ENCODER_DECODER = "encoder-decoder"
    """The same with an encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineFactors:
    """How many times longer a server takes than each part of a constant, by constant and part."""

    factors: Mapping[str, Mapping[str, float]]
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    """Median relative error of each constant on LLMs that it was not fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredConstants:
    """Constants of a measured server, to fit the factors on."""

    llm: str
    work: LlmWork
    profile: GpuProfile
    constants: StepConstants


def kind_of(work: LlmWork) -> ServerKind:
    """Return the kind of server that an LLM gets."""
    if work.encoder_layer_count:
        return ServerKind.ENCODER_DECODER
    return ServerKind.PADDED if work.is_padded else ServerKind.FLASH


def roofline_constants(work: LlmWork, profile: GpuProfile, factors: RooflineFactors | None = None) -> StepConstants:
    """Return step constants from sizes alone; factors: None: the bundled ones of its kind.

    Raises InvalidInputError where the GPU's figures are missing or zero.
    """
    factors = factors or bundled_factors()[kind_of(work)]
    parts = _parts(work, profile)
    values = {
        constant: sum(factor * parts[constant][part] for part, factor in by_part.items())
        for constant, by_part in factors.factors.items()
    }
    return StepConstants(**values)


def peak_flops_per_second(gpu: Gpu) -> float:
    """Return the fastest dense rate for 16-bit numbers that is stated of a GPU. Raises InvalidInputError."""
    stated = gpu.tensor_fp16_tflops or gpu.tensor_bf16_tflops or gpu.cuda_mixed_tflops or gpu.cuda_fp32_tflops or 0
    if stated <= 0:
        raise InvalidInputError(
            [Violation(f"gpu {gpu.name}", "states no TFLOPS; add tensor_fp16_tflops or cuda_fp32_tflops to its row")]
        )
    return stated * _TERA


def link_bytes_per_second(gpu: Gpu) -> float:
    """Return what a GPU can send to its neighbours: over NVLink if its figure is stated, else over PCIe."""
    if gpu.interconnect_gb_per_second:
        return gpu.interconnect_gb_per_second * _NVLINK_SHARE * 1e9
    return _PCIE_GB_PER_SECOND.get(gpu.pcie_generation or _OLDEST_PCIE, _PCIE_GB_PER_SECOND[_OLDEST_PCIE]) * 1e9


def _parts(work: LlmWork, profile: GpuProfile) -> dict[str, dict[str, float]]:
    """Return the seconds of every part of every constant."""
    gpu = profile.gpu
    bandwidth = gpu.memory_bandwidth_bytes_per_second
    if not bandwidth > 0:
        raise InvalidInputError(
            [Violation(f"gpu {gpu.name} memory_bandwidth_gb_per_second", f"must be > 0, is {bandwidth:g}")]
        )
    peak = peak_flops_per_second(gpu)
    layers = work.layer_count + work.encoder_layer_count
    is_split = float(work.gpu_count > 1)
    weights = work.weight_bytes_read(1) / bandwidth
    all_weights = work.weight_bytes / bandwidth  # the tokens of a prompt choose every expert
    # Two all-reduces a layer; a ring sends every number (n - 1) / n times each way.
    exchanged = 4 * layers * work.hidden_size * work.activation_bytes * (work.gpu_count - 1) / work.gpu_count
    if gpu.is_nvlink is False:
        exchanged *= work.gpu_count / 2  # pairs take turns on what leads through the host
    exchange = exchanged / link_bytes_per_second(gpu)
    return {
        "decode_seconds": {"layer": work.layer_count, "split_layer": is_split * work.layer_count, "weights": weights},
        "decode_seconds_per_sequence": {
            "request": 1.0,
            "flops": work.decode_flops_per_token / peak,
            "exchange": exchange,
        },
        "decode_seconds_per_cached_token": {
            "cache": work.kv_bytes_per_token / bandwidth,
            "flops": work.decode_attention_flops_per_pair / peak,
        },
        "decode_seconds_per_moved_token": {"cache": work.kv_bytes_per_token / bandwidth},
        "prefill_seconds": {"layer": layers, "split_layer": is_split * layers, "weights": all_weights},
        "prefill_seconds_per_token": {"flops": work.prefill_flops_per_token / peak, "exchange": exchange},
        "prefill_seconds_per_request": {"request": 1.0, "weights": weights},
    }


def fit_factors(measured: Iterable[MeasuredConstants], *, otherwise: RooflineFactors | None = None) -> RooflineFactors:
    """Return the factors >= 0 that come nearest to measured constants, relative to each. Raises InvalidInputError.

    otherwise: the factors of parts that cost none of these servers anything, as exchanges do on one GPU; None: 0.
    """
    samples = [(_parts(sample.work, sample.profile), sample.constants) for sample in measured]
    if not samples:
        raise InvalidInputError([Violation("measured", "must have at least one server; give fitted constants")])
    factors = {}
    for constant, by_part in samples[0][0].items():
        rows = np.array([list(parts[constant].values()) for parts, _ in samples])
        values = np.array([getattr(constants, constant) for _, constants in samples])
        solved = _nearest(rows[values > 0], values[values > 0])
        factors[constant] = dict(zip(by_part, solved.tolist(), strict=True))
        if otherwise is not None:
            unseen = [part for part, seconds in zip(by_part, rows.max(axis=0), strict=True) if not seconds]
            factors[constant] |= {part: otherwise.factors[constant][part] for part in unseen}
    return RooflineFactors(factors=factors)


def with_uncertainty(
    measured: Iterable[MeasuredConstants], *, otherwise: RooflineFactors | None = None
) -> RooflineFactors:
    """Return the factors of all measured servers, and how far those of the other LLMs' servers are from each LLM's.

    otherwise: see `fit_factors`.
    """
    measured = list(measured)
    factors = fit_factors(measured, otherwise=otherwise)
    deviations: dict[str, list[float]] = {constant: [] for constant in factors.factors}
    for llm in {sample.llm for sample in measured}:
        others = fit_factors(sample for sample in measured if sample.llm != llm)
        for sample in measured:
            if sample.llm == llm:
                foretold = roofline_constants(sample.work, sample.profile, others)
                for constant, of_constant in deviations.items():
                    if (value := getattr(sample.constants, constant)) > 0:
                        of_constant.append(abs(getattr(foretold, constant) / value - 1))
    uncertainty = {
        constant: float(np.median(of_constant)) for constant, of_constant in deviations.items() if of_constant
    }
    return RooflineFactors(factors=factors.factors, uncertainty=uncertainty)


def priors_from_others(measured: Iterable[MeasuredConstants]) -> dict[tuple[str, str], StepPrior]:
    """Return what the other LLMs' servers say of each server's constants, by LLM and name of the GPU profile.

    Raises InvalidInputError where there are fewer than two other LLMs: their spread is the uncertainty.
    """
    measured = list(measured)
    priors = {}
    for llm in sorted({sample.llm for sample in measured}):
        factors = with_uncertainty(sample for sample in measured if sample.llm != llm)
        for sample in measured:
            if sample.llm == llm:
                priors[llm, sample.profile.name] = StepPrior(
                    constants=roofline_constants(sample.work, sample.profile, factors), uncertainty=factors.uncertainty
                )
    return priors


def _nearest(rows: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x >= 0 with rows @ x nearest to values: twice as much is as far as half."""
    scale = values
    for _ in range(_ROUNDS):
        solved = _not_negative(rows / scale[:, None], values / scale)
        scale = np.sqrt(values * np.maximum(rows @ solved, values / _FARTHEST))
    return solved


def _not_negative(rows: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x >= 0 with rows @ x nearest to values, leaving out the most negative until none is."""
    solved = np.zeros(rows.shape[1])
    free = np.flatnonzero(np.abs(rows).max(axis=0, initial=0.0) > 0)
    while len(free):
        scale = np.abs(rows[:, free]).max(axis=0)
        part = np.linalg.lstsq(rows[:, free] / scale, values, rcond=None)[0]
        if (part >= 0).all():
            solved[free] = part / scale
            break
        free = np.delete(free, np.argmin(part))
    return solved


@cache
def bundled_factors() -> dict[ServerKind, RooflineFactors]:
    """Return the factors that travel with the package, fitted on data/step_constants.csv."""
    return read_factors(bundled_table(_TABLE), label=_TABLE)


def read_factors(text: str, *, label: str) -> dict[ServerKind, RooflineFactors]:
    """Read a table of factors. Raises InvalidInputError that lists every bad cell, else every kind without factors."""
    table = CsvTable(text, label=label, required=_COLUMNS, optional=())
    factors: dict[ServerKind, dict[str, dict[str, float]]] = {kind: {} for kind in ServerKind}
    uncertainty: dict[ServerKind, dict[str, float]] = {kind: {} for kind in ServerKind}
    for row in table.rows():
        constant = row.text("constant")
        if row.text("kind") not in set(ServerKind):
            table.refuse(row.line, "kind", f"must be one of {', '.join(ServerKind)}, is {row.text('kind')[:40]!r}")
            continue
        kind = ServerKind(row.text("kind"))
        cells = {}
        for column in ("factor", "uncertainty_percent"):
            try:
                cells[column] = float(row.text(column))
            except ValueError:
                cells[column] = -1.0
            if not 0 <= cells[column] < np.inf:
                table.refuse(row.line, column, f"must be a number >= 0, is {row.text(column)[:40]!r}")
        factors[kind].setdefault(constant, {})[row.text("part")] = cells["factor"]
        uncertainty[kind][constant] = cells["uncertainty_percent"] / 100
    table.raise_violations()
    if missing := [kind for kind in ServerKind if not factors[kind]]:
        raise InvalidInputError([Violation(label, f"has no factors of kind {kind}") for kind in missing])
    return {kind: RooflineFactors(factors=factors[kind], uncertainty=uncertainty[kind]) for kind in ServerKind}


def write_factors(factors: Mapping[ServerKind, RooflineFactors], comments: Mapping[str, str]) -> str:
    """Return the text of a table, under comment lines such as its source, licence and command."""
    out = io.StringIO(newline="")
    out.writelines(f"# {key}: {value}\n" for key, value in comments.items())
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for kind, of_kind in factors.items():
        for constant, by_part in of_kind.factors.items():
            percent = f"{100 * of_kind.uncertainty.get(constant, 0.0):.0f}"
            writer.writerows([kind, constant, part, f"{factor:.4g}", percent] for part, factor in by_part.items())
    return out.getvalue()
