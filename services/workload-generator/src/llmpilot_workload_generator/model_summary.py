"""What a list of models shows of each: kept beside the model, so that listing reads no model."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from llmpilot_workload_generator.model import Arrivals, Kind, Parameter, Provenance, WorkloadModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSummary:
    """A parameter in a few numbers."""

    name: str
    kind: Kind
    bin_count: int
    low: float
    high: float
    mean: float | None
    """None: of a category."""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A model in a few numbers."""

    parameters: tuple[ParameterSummary, ...]
    request_count: int
    cell_count: int
    provenance: Provenance
    arrivals: Arrivals
    replay_request_count: int
    """0: none are kept."""
    size_bytes: int
    """Of the model file."""


_ADAPTER = TypeAdapter(ModelSummary)


def summarize(model: WorkloadModel, *, size_bytes: int) -> ModelSummary:
    """Return a model's summary."""
    return ModelSummary(
        parameters=tuple(_summarize_parameter(parameter) for parameter in model.parameters),
        request_count=model.request_count,
        cell_count=len(model.keys),
        provenance=model.provenance,
        arrivals=model.arrivals,
        replay_request_count=0 if model.replay is None else len(model.replay),
        size_bytes=size_bytes,
    )


def summary_to_text(summary: ModelSummary) -> str:
    """Return a summary as JSON."""
    return _ADAPTER.dump_json(summary, exclude_defaults=True).decode()


def summary_from_text(text: str) -> ModelSummary:
    """Return the summary in a JSON text that `summary_to_text` made."""
    return _ADAPTER.validate_json(text)


def _summarize_parameter(parameter: Parameter) -> ParameterSummary:
    sketch = parameter.sketch
    mean = float((sketch.values * sketch.counts).sum() / sketch.total)
    return ParameterSummary(
        name=parameter.name,
        kind=parameter.kind,
        bin_count=len(parameter.bins),
        low=sketch.low,
        high=sketch.high,
        mean=None if parameter.kind is Kind.CATEGORY else mean,
        categories=parameter.bins.categories,
    )
