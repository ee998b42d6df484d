"""The result of a stage in the words of `vllm bench serve --save-result --save-detailed`.

One JSON object, so one file, per stage, as vLLM writes one per run: whatever reads vLLM's reads these. The names are
those of vllm/benchmarks/serve.py (2026); `itls` are gaps between chunks there, so they are here, and the figures
`*_itl_ms` belong to them. Rates are of what came in the window, not totals by its length: its requests may end later.
Invariant: every name that vLLM always writes for text generation is there; what nobody reported is null, where vLLM
writes 0.
"""

from dataclasses import dataclass

import numpy as np

from llmpilot_loadtester.domain.records import UNKNOWN, RecordBatch
from llmpilot_loadtester.domain.results import LatencySummary, StageMetrics
from llmpilot_loadtester.domain.spec import RATED, Load, LoadKind
from llmpilot_loadtester.domain.window import NANOS_PER_SECOND, Window
from llmpilot_loadtester.outputs.number_format import utc
from llmpilot_loadtester.outputs.run_facts import RunFacts
from llmpilot_loadtester.outputs.stage_report import StageReport

Json = str | int | float | bool | None | list[str] | list[int] | list[float] | list[list[float]]

_BACKENDS = {"openai-completions": "openai", "openai-chat": "openai-chat", "tgi": "tgi", "tgis": "tgis"}


def vllm_result(facts: RunFacts, report: StageReport, records: RecordBatch) -> dict[str, Json]:
    """Return the object of one stage; the records are all of it, those of the measured window are told."""
    counted = records.take(report.facts.window.holds(records.send_nanos))
    metrics = report.result.metrics
    backend = _BACKENDS.get(facts.protocol, facts.protocol)
    return {
        "date": utc(report.facts.start_unix_nanos).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": report.facts.label,
        "model_id": facts.served_model,
        "tokenizer_id": None,
        "num_prompts": metrics.request_count,
        **_traffic(report.facts.stage.load),
        **_totals(metrics, counted),
        **_details(counted),
        **_peaks(records, report.facts.window),
        **_latencies(metrics),
        "simulated": facts.simulated,
        "valid": report.result.verdict.is_valid,
        "not_valid_because": list(report.result.verdict.reasons),
    }


def _traffic(load: Load) -> dict[str, Json]:
    burstiness = {LoadKind.GAMMA: load.burstiness, LoadKind.CONSTANT: None}.get(load.kind, 1.0)
    return {
        "request_rate": load.rate_per_second if load.kind in RATED else "inf",
        "burstiness": burstiness,
        "max_concurrency": load.most_users,
    }


def _totals(metrics: StageMetrics, counted: RecordBatch) -> dict[str, Json]:
    ok = counted.is_ok
    known = ok & (counted.input_tokens != UNKNOWN)
    inputs, outputs = int(counted.input_tokens[known].sum()), int(counted.output_tokens[ok].sum())
    total = metrics.output_tokens_per_second + (metrics.input_tokens_per_second or 0.0)
    return {
        "duration": metrics.window_seconds,
        "completed": metrics.ok_count,
        "failed": metrics.error_count,
        "total_input_tokens": inputs if known.any() or not ok.any() else None,
        "total_output_tokens": outputs,
        "request_throughput": metrics.requests_per_second,
        "request_goodput": metrics.goodput_requests_per_second,
        "output_throughput": metrics.output_tokens_per_second,
        "total_token_throughput": None if metrics.input_tokens_per_second is None else total,
    }


def _details(counted: RecordBatch) -> dict[str, Json]:
    """Lists with an entry per request; as in vLLM, a failed one has 0 where it has nothing."""
    starts, moments = counted.chunk_starts, counted.chunk_nanos
    has_tokens = np.diff(starts) > 0
    first = np.where(has_tokens, moments[np.minimum(starts[:-1], len(moments) - 1)], 0) if len(moments) else 0
    ttfts = np.where(has_tokens & counted.is_ok, (first - counted.send_nanos) / 1e9, 0.0)
    gaps = (np.diff(moments) / 1e9).tolist()
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), counted.is_ok.tolist(), strict=True)
    return {
        "input_lens": np.maximum(counted.input_tokens, 0).tolist(),
        "output_lens": np.where(counted.is_ok, counted.output_tokens, 0).tolist(),
        "ttfts": np.asarray(ttfts, dtype=np.float64).tolist(),
        "itls": [gaps[start : max(start, end - 1)] if is_ok else [] for start, end, is_ok in bounds],
        "latencies": np.where(counted.is_ok, (counted.end_nanos - counted.send_nanos) / 1e9, 0.0).tolist(),
        "start_times": (counted.send_nanos / 1e9).tolist(),
        "queue_times": ((counted.send_nanos - counted.scheduled_nanos) / 1e9).tolist(),
        "generated_texts": [""] * len(counted),
        "errors": list(counted.errors),
    }


def _peaks(records: RecordBatch, window: Window) -> dict[str, Json]:
    """Return the largest values in the window, whenever their requests were sent."""
    ok = records.take(records.is_ok)
    moments = np.concatenate([ok.send_nanos, ok.end_nanos])
    changes = np.repeat([1, -1], len(ok))
    order = np.lexsort((changes, moments))
    under_way = np.cumsum(changes[order])[window.holds(moments[order])]
    before = int((ok.send_nanos < window.from_nanos).sum() - (ok.end_nanos < window.from_nanos).sum())
    arrived = window.holds(ok.chunk_nanos)
    seconds = (ok.chunk_nanos[arrived] - window.from_nanos) // NANOS_PER_SECOND
    by_second = np.bincount(seconds, weights=ok.chunk_tokens[arrived], minlength=1)
    return {
        "max_output_tokens_per_s": float(by_second.max()),
        "max_concurrent_requests": int(under_way.max(initial=before)),
        "rtfx": 0.0,
    }


@dataclass(frozen=True, slots=True)
class _Named:
    name: str
    summary: LatencySummary


def _latencies(metrics: StageMetrics) -> dict[str, Json]:
    """Mean, median, standard deviation and percentiles, each under the name of vLLM."""
    cells: dict[str, Json] = {}
    for latency in (
        _Named("ttft", metrics.ttft),
        _Named("tpot", metrics.tpot),
        _Named("itl", metrics.chunk_gap),
        _Named("e2el", metrics.end_to_end),
        _Named("client_queue_time", metrics.send_lateness),
        _Named("e2el_including_client_queue", metrics.end_to_end_from_schedule),
    ):
        for statistic in ("mean", "median", "std", "p90", "p95", "p99"):
            cells[f"{statistic}_{latency.name}_ms"] = getattr(latency.summary, f"{statistic}_ms")
    return cells
