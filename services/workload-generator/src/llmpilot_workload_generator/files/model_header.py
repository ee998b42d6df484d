"""The forms in which a model's description stands in JSON: the header of a model file, and the edges file.

Invariant: a form that was read is whole and within bounds; every violation of a form that is not is reported at once.
"""

from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from llmpilot_contracts.errors import Violation
from llmpilot_workload_generator.files.model_checks import LARGEST_WHOLE
from llmpilot_workload_generator.model import (
    LARGEST_KEY_BITS,
    ArrivalKind,
    Arrivals,
    Bins,
    Kind,
    Provenance,
    WorkloadModel,
    key_bits,
)

MOST_BINS = 256
"""A bin's number is kept in a byte."""


class Form(BaseModel):
    """What forms have in common: nothing unknown, nothing converted, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _rising(edges: list[float]) -> list[float]:
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError("must rise strictly")
    return edges


def _distinct(texts: list[str]) -> list[str]:
    if len(set(texts)) < len(texts):
        raise ValueError("must be distinct")
    return texts


class BinsForm(Form):
    """The bins of a parameter."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Kind
    edges: Annotated[list[float], Field(min_length=1, max_length=MOST_BINS), AfterValidator(_rising)]
    categories: Annotated[list[str], AfterValidator(_distinct)] = []

    def to_bins(self) -> Bins:
        """Return the bins."""
        edges = np.array(self.edges, np.float64)
        return Bins(name=self.name, kind=self.kind, edges=edges, categories=tuple(self.categories))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong between the fields."""
        if not self.name.isprintable():
            yield f"the name {self.name!r} must be one line of text"
        if (self.kind is Kind.CATEGORY) != bool(self.categories):
            yield f"categories go with the kind {Kind.CATEGORY.value}, and it with them"
        if self.kind is Kind.CATEGORY and not all(e.is_integer() and 0 <= e < len(self.categories) for e in self.edges):
            yield "the edges must be positions in the categories"
        if self.kind is not Kind.NUMBER and not all(abs(edge) <= LARGEST_WHOLE for edge in self.edges):
            yield "the edges must be at most 2^53"


def bins_form(bins: Bins) -> BinsForm:
    """Return the form of bins."""
    edges = bins.edges.tolist()
    return BinsForm(name=bins.name, kind=bins.kind, edges=edges, categories=list(bins.categories))


def bins_problems(forms: list[BinsForm]) -> Iterator[str]:
    """Yield what is wrong with the bins of all parameters together."""
    for form in forms:
        yield from (f"{form.name}: {problem}" for problem in form.problems())
    if len({form.name for form in forms}) < len(forms):
        yield "parameters must have distinct names"
    if key_bits([len(form.edges) for form in forms]) > LARGEST_KEY_BITS:
        yield f"the bins of all parameters have more than 2^{LARGEST_KEY_BITS} combinations"


class SketchForm(Form):
    """What is known of a parameter's values beside their counts, which are in sections of the file."""

    exact: bool
    low: float
    high: float


class ParameterForm(Form):
    """A parameter of a model."""

    bins: BinsForm
    lows: list[float]
    highs: list[float]
    sketch: SketchForm


class ProvenanceForm(Form):
    """Where a model comes from."""

    source: str
    licence: str
    command: str
    row_count: Annotated[int, Field(ge=0)]
    skipped_row_count: Annotated[int, Field(ge=0)]
    first_time: datetime | None
    last_time: datetime | None

    def to_provenance(self) -> Provenance:
        """Return the provenance."""
        return Provenance(**dict(self))


class ArrivalsForm(Form):
    """The arrival process that a model goes with."""

    kind: ArrivalKind
    rate_per_second: Annotated[float, Field(ge=0)]
    burstiness: Annotated[float, Field(gt=0)]
    speed: Annotated[float, Field(gt=0)]

    def to_arrivals(self) -> Arrivals:
        """Return the arrival process."""
        return Arrivals(**dict(self))


class SectionForm(Form):
    """One column of numbers or texts behind the header."""

    name: str
    coding: str
    value_count: Annotated[int, Field(ge=0)]
    raw_bytes: Annotated[int, Field(ge=0)]
    stored_bytes: Annotated[int, Field(ge=0)]


class ReplayForm(Form):
    """What is known of the kept requests beside their columns."""

    prefix_block_tokens: Annotated[int, Field(ge=0)]


class Header(Form):
    """All of a model file but its columns."""

    parameters: Annotated[list[ParameterForm], Field(min_length=1, max_length=LARGEST_KEY_BITS)]
    provenance: ProvenanceForm
    arrivals: ArrivalsForm
    replay: ReplayForm | None
    sections: list[SectionForm]


def header_of(model: WorkloadModel, sections: list[SectionForm]) -> Header:
    """Return the header of a model's file."""
    provenance, arrivals = model.provenance, model.arrivals
    return Header(
        parameters=[
            ParameterForm(
                bins=bins_form(parameter.bins),
                lows=parameter.lows.tolist(),
                highs=parameter.highs.tolist(),
                sketch=SketchForm(
                    exact=parameter.sketch.exact, low=float(parameter.sketch.low), high=float(parameter.sketch.high)
                ),
            )
            for parameter in model.parameters
        ],
        provenance=ProvenanceForm(**{name: getattr(provenance, name) for name in ProvenanceForm.model_fields}),
        arrivals=ArrivalsForm(**{name: getattr(arrivals, name) for name in ArrivalsForm.model_fields}),
        replay=ReplayForm(prefix_block_tokens=model.replay.prefix_block_tokens) if model.replay else None,
        sections=sections,
    )


def form_violations(error: ValidationError, label: str) -> list[Violation]:
    """Return what a form says is wrong, each with its place."""
    return [
        Violation(": ".join([label, ".".join(map(str, found["loc"]))]).rstrip(": "), found["msg"])
        for found in error.errors(include_url=False, include_context=False, include_input=False)
    ]
