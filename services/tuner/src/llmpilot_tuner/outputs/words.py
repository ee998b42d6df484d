"""Memory, batches and verdicts as people read them. Invariant: what nobody knows is a dash, never 0."""

from collections.abc import Iterable

from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.probing import ProbeKind

NOTHING = "–"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

EVIDENCE = {
    ProbeKind.ANALYTIC: "predicted by formulas, not measured",
    ProbeKind.DRY: "counted, not allocated: every tensor of the LLM, but not what a kernel takes for itself",
    ProbeKind.CPU: "measured on the CPU, under a limit that really failed",
    ProbeKind.TORCH: "measured on the GPU",
    ProbeKind.SERVER: "measured with the inference server",
}
WEIGHT_UNITS = {
    WeightDefinition.TOKENS: "tokens",
    WeightDefinition.PADDED_SQUARED: "requests × longest² tokens",
}
LIMITS = {
    "memory": "more would run out of memory",
    "limits": "no batch that the limits allow has more",
}


def memory(byte_count: float | None) -> str:
    """Return a number of bytes in the largest unit of 1,024s that it reaches, with three digits or more."""
    if byte_count is None:
        return NOTHING
    for unit, size in _UNITS:
        if abs(byte_count) >= size:
            return f"{byte_count / size:,.2f} {unit}"
    return f"{byte_count:,.0f} B"


def count(number: int | None) -> str:
    """Return a whole number with its thousands apart."""
    return NOTHING if number is None else f"{number:,}"


def seconds(number: float) -> str:
    """Return a length of time."""
    return f"{number:.1f} s" if number < 60 else f"{int(number) // 60} min {int(number) % 60} s"  # noqa: PLR2004


def batch_words(batch: Batch) -> str:
    """Return what is in a batch, e.g. "prefill of 2 × 4,096, beside 54 × 8,143"."""
    parts = []
    if batch.prefill:
        parts.append(f"prefill of {_all(map(_prefill, batch.prefill))}")
    if batch.decode:
        parts.append(f"decode of {_all(map(_shape, batch.decode))}")
    if batch.residents:
        parts.append(f"beside {_all(map(_shape, batch.residents))}")
    if batch.copied_tokens:
        parts.append(f"{batch.copied_tokens:,} tokens copied")
    if batch.all_logits:
        parts.append("logits of the whole input")
    return ", ".join(parts)


def _all(texts: Iterable[str]) -> str:
    return " and ".join(texts)


def _prefill(rows: Rows) -> str:
    after = f" after {rows.context_tokens:,}" if rows.context_tokens else ""
    return f"{rows.request_count:,} × {rows.input_tokens:,}{after}"


def _shape(rows: Rows) -> str:
    return f"{rows.request_count:,} × {rows.sequence_tokens:,}"
