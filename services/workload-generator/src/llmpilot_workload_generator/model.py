"""A workload model: a sparse joint histogram of the parameters of requests.

Invariant: `keys` rise strictly, and key, edges and radices say together which bin of every parameter a cell is in.
Models over the same edges are merged by adding what they count (`fitting/merging.py`).
Source: Lazuka et al., 2024, section III-B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Column = npt.NDArray[np.int64] | npt.NDArray[np.float64] | npt.NDArray[np.str_]
Columns = Mapping[str, Column]
"""A column per parameter, all of the same length: int64, float64, or text where the parameter is categorical."""

INPUT_TOKENS = "input_tokens"
OUTPUT_TOKENS = "output_tokens"
BATCH_SIZE = "batch_size"
TEMPERATURE = "temperature"
TOP_P = "top_p"
TOP_K = "top_k"
IS_GREEDY = "is_greedy"
"""The parameters that requests are made of. Others are kept and drawn, and mean nothing to a server."""

MAX_BINS = 64
LARGEST_KEY_BITS = 63


class Kind(StrEnum):
    """What the values of a parameter are."""

    INTEGER = "integer"
    NUMBER = "number"
    CATEGORY = "category"
    """Values are positions in `categories`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Where the bins of a parameter begin: what models must share to be merged."""

    name: str
    kind: Kind
    edges: Floats
    """The smallest value of each bin, rising strictly; the first bin takes what is smaller, too."""
    categories: tuple[str, ...] = ()
    """What the values of a categorical parameter stand for, the most frequent first."""

    def __len__(self) -> int:
        return len(self.edges)

    def find(self, values: Floats) -> npt.NDArray[np.intp]:
        """Return the bin of each value."""
        return np.maximum(np.searchsorted(self.edges, values, side="right") - 1, 0)

    def same_as(self, other: "Bins") -> bool:
        """Whether both divide the same parameter in the same way."""
        return (self.name, self.kind, self.categories) == (other.name, other.kind, other.categories) and np.array_equal(
            self.edges, other.edges
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """How often which values occur, mergeable: what is known about values inside a bin.

    Exact where there are few enough distinct values, else on a grid of fixed relative precision (`fitting/sketch.py`).
    """

    values: Floats
    """Rise strictly; on the grid where not exact."""
    counts: Integers
    """All > 0."""
    exact: bool
    low: float
    """The smallest value seen."""
    high: float
    """The largest value seen."""

    @property
    def total(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The marginal distribution of a parameter and its bins."""

    bins: Bins
    sketch: Sketch
    lows: Floats
    """The smallest value seen in each bin; where a bin is empty, its edge."""
    highs: Floats
    """The largest value seen in each bin; where a bin is empty, its edge."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.bins.name

    @property
    def kind(self) -> Kind:
        """What its values are."""
        return self.bins.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a model comes from."""

    source: str
    """What was read, e.g. "Azure LLM inference trace 2023, conversation"."""
    licence: str = ""
    command: str = ""
    """What made the model."""
    row_count: int = 0
    """Rows read, of which every one became a request of the model unless `skipped_row_count` says otherwise."""
    skipped_row_count: int = 0
    """Rows of failed requests, which have no output."""
    first_time: datetime | None = None
    last_time: datetime | None = None


class ArrivalKind(StrEnum):
    """When requests are sent."""

    CLOSED = "closed"
    """No times: a user sends when the last reply has come."""
    CONSTANT = "constant"
    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"
    """At the times of the trace that the model was fitted to."""
    ALL_AT_ONCE = "all-at-once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """An arrival process."""

    kind: ArrivalKind = ArrivalKind.CLOSED
    rate_per_second: float = 0.0
    """Mean rate of constant, Poisson and gamma arrivals."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps, 1 / CV^2: 1 is Poisson, less is burstier (as `vllm bench serve`)."""
    speed: float = 1.0
    """How many times faster than recorded a trace is replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The requests of a trace in their order, kept on request beside the histogram."""

    columns: Columns
    arrival_nanos: Integers
    """When each arrived, from the first on, never falling."""
    prefix_ids: Integers
    """The ids of the blocks of all prompts, one request after another; equal ids are equal text. Empty: unknown."""
    prefix_starts: Integers
    """Where each request's ids begin, and one entry more for where the last ones end."""
    prefix_block_tokens: int = 0
    """Tokens of a block; the last one of a prompt may have fewer. 0: no ids."""

    def __len__(self) -> int:
        return len(self.arrival_nanos)


@dataclass(frozen=True, kw_only=True)
class WorkloadModel:
    """A fitted model. Build one with `fitting/fit.py`, read one with `files/model_file.py`."""

    parameters: tuple[Parameter, ...]
    keys: Keys
    """One for each cell that is not empty: the sum over the parameters of bin * stride (`strides`)."""
    counts: Integers
    """Requests in each cell, all > 0."""
    provenance: Provenance
    arrivals: Arrivals = Arrivals()
    """What the requests' arrivals are unless asked otherwise."""
    replay: Replay | None = None

    @property
    def request_count(self) -> int:
        """How many requests the model was fitted to."""
        return int(self.counts.sum())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of the cells."""
        return tuple(parameter.name for parameter in self.parameters)

    def index_of(self, name: str) -> int:
        """Return the position of a parameter; raises ValueError where there is none of that name."""
        return self.names.index(name)

    @cached_property
    def codes(self) -> npt.NDArray[np.uint8]:
        """The bin of every parameter (rows) in every cell (columns)."""
        return decode_keys(self.keys, [len(parameter.bins) for parameter in self.parameters])


def strides(bin_counts: Sequence[int]) -> Keys:
    """Return what one step of each parameter adds to a key; the last parameter varies fastest."""
    products = np.cumprod(np.array([1, *bin_counts[:0:-1]], np.uint64), dtype=np.uint64)
    return products[::-1].copy()


def key_bits(bin_counts: Sequence[int]) -> float:
    """Return how many bits the largest key takes; more than LARGEST_KEY_BITS do not fit."""
    return float(np.log2(np.array(bin_counts, np.float64)).sum())


def encode_keys(codes: npt.NDArray[np.integer], bin_counts: Sequence[int]) -> Keys:
    """Return the key of every cell (column) from the bins of its parameters (rows)."""
    keys: Keys = (codes.astype(np.uint64) * strides(bin_counts)[:, None]).sum(axis=0, dtype=np.uint64)
    return keys


def decode_keys(keys: Keys, bin_counts: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the bin of every parameter (rows) in every cell (columns)."""
    rows = [keys // stride % np.uint64(count) for stride, count in zip(strides(bin_counts), bin_counts, strict=True)]
    return np.array(rows, np.uint8).reshape(len(bin_counts), len(keys))


def bin_counts(parameter: Parameter) -> Integers:
    """Return how many requests each bin of a parameter holds."""
    found = parameter.bins.find(parameter.sketch.values)
    return np.bincount(found, weights=parameter.sketch.counts, minlength=len(parameter.bins)).astype(np.int64)


def bin_centres(parameter: Parameter) -> Floats:
    """Return the mean of the values in each bin; its edge where it is empty, its most frequent one of categories."""
    sketch, bins = parameter.sketch, parameter.bins
    if parameter.kind is Kind.CATEGORY:
        return bins.edges
    found = bins.find(sketch.values)
    counts = np.bincount(found, weights=sketch.counts, minlength=len(bins))
    sums = np.bincount(found, weights=sketch.counts * sketch.values, minlength=len(bins))
    return np.where(counts > 0, sums / np.maximum(counts, 1), bins.edges)
