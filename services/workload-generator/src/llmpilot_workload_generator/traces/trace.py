"""A trace: requests that were really sent, as columns in batches, whatever file they came from.

Invariant: every value of a batch was checked where it was read; there is no NaN, no empty cell, no length < 1 of a
format that is known, and rows of failed requests are counted and not delivered.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmpilot_workload_generator.model import Integers, Kind

TraceColumn: TypeAlias = npt.NDArray[np.integer[Any]] | npt.NDArray[np.float64] | pa.Array
"""A value per request: whole numbers of any width, float64, or text (Arrow string or dictionary of strings)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBatch:
    """Some requests of a trace, in its order."""

    columns: Mapping[str, TraceColumn]
    """The columns of `Trace.kinds`, in that order. Integers are as narrow as the file has them."""
    arrival_nanos: Integers | None = None
    """When each request arrived, as the file says: since 1970 or since the trace's own start. None: nobody recorded."""
    prefix_ids: Integers | None = None
    """The ids of the blocks of all prompts, one request after another; equal ids are equal text."""
    prefix_starts: Integers | None = None
    """Where each request's ids begin, and one entry more for where the last ones end."""
    skipped_row_count: int = 0
    """Rows of failed requests that were left out since the batch before."""
    bytes_done: int = 0
    """How much of `Trace.size_bytes` is read, this batch included."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is known of a trace before it is read. `trace_reader.open_trace` makes one."""

    source: str
    """What it is, e.g. "Azure LLM inference trace 2023"; of a format of no publisher, the file's name."""
    format_name: str
    kinds: Mapping[str, Kind]
    """The parameters and what their values are. They may be called other than the columns of the file."""
    read: Callable[[], Iterator[TraceBatch]]
    """Reads the trace from its start."""
    licence: str = ""
    prefix_block_tokens: int = 0
    """Tokens of a block of `prefix_ids`; 0: there are none."""
    has_absolute_times: bool = False
    """Whether arrivals count from 1970 (UTC) rather than from the trace's own start."""
    size_bytes: int = 0
    """Of all partitions, as they are stored."""

    def batches(self) -> Iterator[TraceBatch]:
        """Read the trace from its start; may be called again. Raises InvalidInputError where a row cannot be used."""
        return self.read()
