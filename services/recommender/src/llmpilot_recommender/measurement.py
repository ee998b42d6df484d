"""A measurement: the performance of one LLM on one GPU profile under one load.

Invariant: `from_cells(to_cells(m)) == m`, exactly, for every measurement that fits the dataset schema.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmpilot_contracts.dataset_schema import COLUMN_NAMES


class Origin(StrEnum):
    """How the numbers of a measurement came about."""

    MEASURED = "measured"
    PUBLISHED_MEDIAN = "published_median"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Quantiles of one latency; None: nobody reported it."""

    median_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One load test; None: nobody reported it."""

    llm: str
    gpu_profile: str
    """Catalogue name, e.g. 1xA100-40GB."""
    users_count: int
    origin: Origin
    test_seconds: float | None = None
    ttft: Quantiles = Quantiles()
    """Time to first token, queue included."""
    nttft: Quantiles = Quantiles()
    """Time to first token divided by the request's input tokens, so milliseconds per token."""
    itl: Quantiles = Quantiles()
    """Inter-token latency."""
    throughput_tokens_per_second: float | None = None
    """Output tokens of the successful requests per second of the test."""
    request_count: int | None = None
    error_count: int | None = None
    oom_count: int | None = None
    """Requests that failed because the GPU ran out of memory; part of `error_count`."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What a dataset holds at most once: LLM, GPU profile, users."""
        return self.llm, self.gpu_profile, self.users_count

    @property
    def error_rate(self) -> float | None:
        """Share of the requests that failed, 0 to 1; None when it is not known."""
        if self.error_count is None or not self.request_count:
            return None
        return self.error_count / self.request_count


def to_cells(measurement: Measurement) -> tuple[str, ...]:
    """Return the row of the dataset file, in the schema's column order."""
    return (
        measurement.llm,
        measurement.gpu_profile,
        str(measurement.users_count),
        measurement.origin.value,
        _float_cell(measurement.test_seconds),
        *_quantile_cells(measurement.ttft),
        *_quantile_cells(measurement.nttft),
        *_quantile_cells(measurement.itl),
        _float_cell(measurement.throughput_tokens_per_second),
        _int_cell(measurement.request_count),
        _int_cell(measurement.error_count),
        _float_cell(measurement.error_rate),
        _int_cell(measurement.oom_count),
    )


def canonical_bytes(measurement: Measurement) -> bytes:
    """Return the row as bytes to hash: equal for equal measurements only."""
    return "\x1f".join(to_cells(measurement)).encode()


def from_cells(cells: Sequence[str]) -> Measurement:
    """Return the measurement of a row in which the schema finds no problem."""
    cell = dict(zip(COLUMN_NAMES, cells, strict=True))
    return Measurement(
        llm=cell["llm"],
        gpu_profile=cell["gpu_profile"],
        users_count=int(cell["users_count"]),
        origin=Origin(cell["origin"]),
        test_seconds=_float(cell["test_seconds"]),
        ttft=_quantiles(cell, "ttft"),
        nttft=_quantiles(cell, "nttft"),
        itl=_quantiles(cell, "itl"),
        throughput_tokens_per_second=_float(cell["throughput_tokens_per_second"]),
        request_count=_int(cell["request_count"]),
        error_count=_int(cell["error_count"]),
        oom_count=_int(cell["oom_count"]),
    )


def _quantile_cells(quantiles: Quantiles) -> tuple[str, ...]:
    return tuple(
        _float_cell(value) for value in (quantiles.median_ms, quantiles.p90_ms, quantiles.p95_ms, quantiles.p99_ms)
    )


def _quantiles(cell: dict[str, str], latency: str) -> Quantiles:
    return Quantiles(
        median_ms=_float(cell[f"{latency}_ms_median"]),
        p90_ms=_float(cell[f"{latency}_ms_p90"]),
        p95_ms=_float(cell[f"{latency}_ms_p95"]),
        p99_ms=_float(cell[f"{latency}_ms_p99"]),
    )


def _float_cell(value: float | None) -> str:
    return "" if value is None else repr(float(value))  # float(): numpy's scalars have another repr


def _int_cell(value: int | None) -> str:
    return "" if value is None else str(value)


def _float(cell: str) -> float | None:
    return float(cell) if cell else None


def _int(cell: str) -> int | None:
    return int(cell) if cell else None
